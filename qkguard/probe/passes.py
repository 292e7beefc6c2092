"""Forward passes in the middle of a training: they leave nothing behind, and return the last logits only."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.distributed.sharding import unwrap
from qkguard.errors import QKGuardError

IGNORED = -100  # transformers' label of a token that is not to be predicted

REFUSALS = (QKGuardError, RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
"""What models raise whose cache cannot be read on from."""

_SMALL = 1 << 16  # elements; smaller buffers are copied, so that a write in place can be undone


@dataclass
class Past:
    """What a model has read of some texts, and can read on from: its cache, and how many tokens that is of each."""

    cache: Any = None
    tokens: int = 0

    def copied(self) -> Past:
        return Past(deepcopy(self.cache), self.tokens)

    def repeated(self, rows: int) -> Past:
        """That of one text for so many; the same cache, not to be used as it was."""
        if rows > 1 and self.cache is not None:
            self.cache.reorder_cache(torch.zeros(rows, dtype=torch.long))
        return self


class LastLogits:
    """Calls a causal language model for the logits of its last positions.

    `chunk` bounds the memory of activations for long contexts: the prompt then goes through the model's own cache in
    pieces of that many tokens (the cache itself remains). Without it there is no cache. `calls` counts the calls.
    """

    def __init__(self, model: nn.Module, chunk: int | None = None) -> None:
        self.model = model
        self.chunk = chunk
        self.calls = 0
        self._takes_logits_to_keep = _takes_logits_to_keep(model)

    def __call__(
        self,
        ids: Tensor,
        keep: int,
        before_piece: Callable[[int], None] | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Logits (batch, keep, vocabulary) of the last `keep` positions of `ids` (batch, length).

        `before_piece(n)` is called before every forward pass; n is the number of tokens read when that pass ends.
        `past` is what was read before `ids`; afterwards it holds these too.
        """
        self.calls += 1
        length = ids.shape[1]
        if self.chunk is None or length <= max(self.chunk, keep):
            ends = [length]
        else:
            # The last piece holds all positions that are asked for
            tail = max(keep, (length - 1) % self.chunk + 1)
            ends = [*range(self.chunk, length - tail, self.chunk), length - tail, length]
        caching = past is not None or len(ends) > 1
        past = Past() if past is None else past
        options: dict[str, Any] = {"logits_to_keep": keep} if self._takes_logits_to_keep else {}
        start = 0
        for end in ends:
            if before_piece is not None:
                before_piece(past.tokens + end - start)
            if caching:
                options["past_key_values"] = past.cache
            out = self.model(input_ids=ids[:, start:end], use_cache=caching, **options)
            if caching:
                past.cache, past.tokens = self._cache_of(out), past.tokens + end - start
            start = end
        logits = out.logits if hasattr(out, "logits") else out[0]
        return logits[:, -keep:]

    def _cache_of(self, out: Any) -> Any:
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise QKGuardError(
                f"{type(self.model).__name__} returned no cache, so it cannot read a context in chunks; "
                "probe without chunks"
            )
        return cache


def check_chunks(model: nn.Module, ids: Tensor, chunk: int, keep: int) -> float:
    """Largest total variation (0 to 1) between the next-token distributions of a context read in chunks and at once.

    It is taken over the last `keep` positions of `ids` (batch, length). Hybrids differ in whether their caches can be
    continued with more than one token: where they cannot, this is large (1 where the model refuses), and chunks must
    not be used. Text whose end depends on all of it shows it best.
    """
    whole = LastLogits(model)(ids, keep).float().softmax(-1)
    try:
        pieces = LastLogits(model, chunk)(ids, keep).float().softmax(-1)
    except REFUSALS:
        return 1.0
    return float((whole - pieces).abs().sum(-1).max() / 2)


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its token ids."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device


def _takes_logits_to_keep(model: nn.Module) -> bool:
    inner = unwrap(model)
    base = getattr(inner, "get_base_model", None)
    if callable(base):  # PEFT hands keywords through
        inner = base()
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters


# -- leaving nothing behind --------------------------------------------------------------------------------------


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, in which everything is afterwards as it was, also after an exception.

    Restored: every module's training flag (modules may differ from one another), random states (Python, numpy,
    torch on the CPU and on the model's devices), buffers, and the state of rotary embeddings that adapt to the
    sequence length (dynamic NTK, LongRoPE), which a long probe would otherwise carry into the next training step.
    Compiled models run eagerly meanwhile: neither their graphs nor their recompilation count change. Gradient
    checkpointing is inert in evaluation mode. Parameters are not touched.
    """
    with ExitStack() as stack:
        stack.enter_context(random_states({p.device for p in model.parameters()}))
        stack.enter_context(_training_flags(model))
        stack.enter_context(_buffers(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _training_flags(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False  # not .eval(): some modules override it to do more than set flags
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def random_states(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Put back the random states of Python, numpy, torch on the CPU, and torch on the accelerators among `devices`."""
    numpy: Any = sys.modules.get("numpy")
    found = {d for d in devices if d.type not in ("cpu", "meta")}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and any(d.type == accelerator.type for d in found):
        found.add(torch.device(accelerator.type, torch.accelerator.current_device_index()))
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    others = [(d, torch.get_device_module(d).get_rng_state(d)) for d in found]
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for device, state in others:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    """Buffers, and what rotary embeddings remember outside of them: `original_inv_freq` and the length last seen."""
    kept: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor]]] = []
    attributes: list[tuple[nn.Module, dict[str, Any]]] = []
    for module in model.modules():
        # torch offers no public way to put a buffer back as the same tensor, persistence included
        buffers = dict(module._buffers)
        copies = {k: b.detach().clone() for k, b in buffers.items() if b is not None and b.numel() <= _SMALL}
        kept.append((module, buffers, copies))
        if any("inv_freq" in name for name in buffers):
            plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | None | Tensor)}
            attributes.append((module, plain))
    try:
        yield
    finally:
        for module, buffers, copies in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, copy in copies.items():
                if not _same(buffers[name], copy):
                    buffers[name].copy_(copy)  # type: ignore[union-attr]
        for module, plain in attributes:
            vars(module).update(plain)


def _same(buffer: Tensor | None, copy: Tensor) -> bool:
    return buffer is None or bool(torch.equal(buffer, copy))
