"""One forward pass that returns the logits of the last positions only, whole or in chunks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.distributed.sharding import unwrap
from qkguard.errors import QKGuardError

Progress = Callable[[int], None]


class LastLogits:
    """Calls a causal language model for the logits of its last positions.

    `chunk` bounds the memory of activations for long contexts: the prompt then goes through the model's own cache in
    pieces of that many tokens (the cache itself remains). Without it there is no cache.
    """

    def __init__(self, model: nn.Module, chunk: int | None = None) -> None:
        self.model = model
        self.chunk = chunk
        self.cuts = _cuts_logits(model)

    def __call__(self, ids: Tensor, keep: int, progress: Progress | None = None) -> Tensor:
        """Logits (batch, keep, vocabulary) of the last `keep` positions of `ids` (batch, length).

        `progress(n)` is called before every forward pass whose last token is the n-th.
        """
        if self.chunk is not None and ids.shape[1] > self.chunk:
            return self._chunked(ids, keep, progress)
        if progress is not None:
            progress(ids.shape[1])
        return self._last(self.model(input_ids=ids, use_cache=False, **self._keeping(keep)), keep)

    def _chunked(self, ids: Tensor, keep: int, progress: Progress | None) -> Tensor:
        assert self.chunk is not None
        length = ids.shape[1]
        tail = max(keep, (length - 1) % self.chunk + 1)  # the last piece holds every position that is asked for
        starts = [*range(0, length - tail, self.chunk), length - tail]
        cache = None
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            if progress is not None:
                progress(stop)
            out = self.model(
                input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **self._keeping(keep)
            )
            cache = getattr(out, "past_key_values", None)
            if cache is None and stop < length:
                raise QKGuardError(
                    f"{type(self.model).__name__} returned no cache, so its context cannot be read in chunks; "
                    "probe without chunks"
                )
        return self._last(out, keep)

    def _keeping(self, keep: int) -> dict[str, int]:
        return {"logits_to_keep": keep} if self.cuts else {}

    def _last(self, out: Any, keep: int) -> Tensor:
        logits = out.logits if hasattr(out, "logits") else out[0]
        return logits[:, -keep:]


def check_chunks(model: nn.Module, ids: Tensor, chunk: int, keep: int) -> float:
    """Largest total variation (0 to 1) between next-token distributions at the last `keep` positions of `ids`, read in
    chunks and as a whole.

    Hybrids differ in whether their caches can be gone on from with more than one token: where they cannot, this is
    large (1 where the model refuses), and chunks must not be used. Text whose end depends on all of it shows it best.
    """
    whole = LastLogits(model)(ids, keep).float().softmax(-1)
    try:
        parts = LastLogits(model, chunk)(ids, keep).float().softmax(-1)
    except (QKGuardError, RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError):
        return 1.0
    return float((whole - parts).abs().sum(-1).max() / 2)


def greedy(
    forward: LastLogits,
    prompts: Sequence[Tensor],
    propose: Callable[[int, list[int]], list[int]],
    passes: int,
    width: int,
    go_on: Callable[[list[list[int]]], bool] = lambda done: True,
) -> list[list[int]]:
    """Beginnings of greedy continuations, by at most `passes` forward passes without a cache, while `go_on` says so.

    Before each pass `propose(i, ids)` guesses how continuation i goes on after `ids`; the pass checks the guess, and
    what the model itself would have said is kept, with its own next token: every pass gains a token, a right guess
    many. All passes have the shape (len(prompts), `width`), beyond which nothing is continued: ranks of a sharded
    model stay in step (where `go_on` says the same to all), which `generate` does not promise. Positions after a
    row's end hold token 0; under causal attention they change nothing before them.
    """
    device = input_device(forward.model)
    starts = [len(p) for p in prompts]
    keep = width - min(starts) + 1
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    out: list[list[int]] = [[] for _ in prompts]
    for _ in range(passes):
        drafts = [propose(i, done)[: width - starts[i] - len(done)] for i, done in enumerate(out)]
        for row, (start, done, draft) in enumerate(zip(starts, out, drafts, strict=True)):
            ids[row, start : start + len(done) + len(draft)] = torch.tensor([*done, *draft], dtype=torch.long)
        choices = forward(ids.to(device), keep).argmax(-1).cpu()
        for row, (start, done, draft) in enumerate(zip(starts, out, drafts, strict=True)):
            first = start + len(done) - 1 - (width - keep)  # the output that follows what is done
            said = choices[row, first : first + len(draft) + 1].tolist()
            right = next((i for i, (a, b) in enumerate(zip(said, draft, strict=False)) if a != b), len(draft))
            out[row] = [*done, *said[: right + 1]][: width - start]
        if not go_on(out):
            break
    return out


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its token ids."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device


def _cuts_logits(model: nn.Module) -> bool:
    """Whether the model, inside its wrappers, takes `logits_to_keep`."""
    inner = unwrap(model)
    base = getattr(inner, "get_base_model", None)
    if callable(base):  # PEFT hands keywords through
        inner = base()
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters
