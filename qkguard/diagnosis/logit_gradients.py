"""The loss's gradient with respect to attention logits, by distance, and what of it reaches W_Q and W_K.

A logit is what enters the softmax for one query and one key. With probabilities P and the gradient dO of a head's
output, dP = dO V^T and the gradient of the logits is P * (dP - sum(P * dP)). It is computed from the queries, keys
and values that pass the attention function, a block of queries at a time: no layer's logits are ever all in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qkguard.distributed.sharding import unwrap
from qkguard.errors import QKGuardError, first_line
from qkguard.layout import AttentionSpec, ParamMap, find_attention
from qkguard.probe.attention import AttentionCall, softmax_with_sinks, watch_attention
from qkguard.probe.passes import IGNORED, LastLogits, input_device

_BLOCK = 1 << 22  # logits held at a time (16 MiB in float32, in a handful of copies)
Seen = tuple[AttentionCall, Tensor]
"""A call of a layer's attention function, and its output."""

_MASKED = -1e30  # masks write -inf, or the lowest number of some dtype

RECOMPUTED = {torch.float32: 5e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest relative difference between a layer's output and P V as computed here. On the exact types of the tests it is
below 1e-5 in float32 (TF32 rounds to 5e-4) and within a few roundings in half precision; a mask, bias or kernel that
is not followed gives 0.1 and more."""


@dataclass(frozen=True)
class LayerGradients:
    """What one row of text asks of one softmax layer.

    Attributes:
        layer: its number.
        by_distance: float64 (tokens,), at each distance the root mean square over pairs of a query and a key of the
            loss's gradient with respect to their logit, mean over heads.
        pairs: float64 (tokens,) how many pairs; 0 where the layer does not look (sliding windows).
        q: float64 (heads + 1, 3) norms of the gradient of W_Q: its part from far keys, from near ones, and all of it;
            the last row is of weights that serve several heads (MLA).
        k: float64 (key heads + 1, 3) the same of W_K.
    """

    layer: int
    by_distance: np.ndarray
    pairs: np.ndarray
    q: np.ndarray
    k: np.ndarray


class LogitGradients:
    """Gradients on the attention of a model, a row of text at a time; nothing is kept in the model.

    Call it inside `probe.passes.undisturbed(model)`.

    Args:
        model: a causal language model, in one process.
        far: keys more than this many tokens back count as far.

    Raises:
        QKGuardError: the layout is not known, or weights are quantised.
    """

    def __init__(self, model: nn.Module, far: int) -> None:
        self.model, self.far = model, far
        self.name = type(unwrap(model)).__name__
        self._specs = {spec.module: spec for spec in find_attention(model)}
        self._maps = {name: _projections(spec) for name, spec in self._specs.items()}
        params = dict(model.named_parameters())
        self._weights = {param.name: params[param.name] for maps in self._maps.values() for param in maps}
        for name, weight in self._weights.items():
            if not weight.is_floating_point():
                raise QKGuardError(
                    f"{name} is quantised ({weight.dtype}) and has no gradient. Give the model in bfloat16 or float32."
                )
        owners = Counter(param.name for maps in self._maps.values() for param in maps)
        self._tied = [name for name, maps in self._maps.items() if any(owners[param.name] > 1 for param in maps)]
        self._pushing = False

    def __call__(self, ids: Tensor, labels: Tensor, scale: float) -> list[LayerGradients]:
        """Every softmax layer's gradients of one row's loss.

        Args:
            ids: int64 (tokens,).
            labels: int64 (tokens,), the tokens to be predicted at their own places, `IGNORED` where none is.
            scale: the loss is the summed negative log-likelihood of the labels, times this.

        Raises:
            QKGuardError: the model's attention cannot be followed, or memory does not suffice.
        """
        device = input_device(self.model)
        with torch.enable_grad(), self._only_queries_and_keys():
            try:
                seen, loss = self._forward(ids.to(device), labels, scale)
                calls = self._calls(seen)
                outputs = [out for _, _, out in calls]
                gradients = torch.autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True)
            except torch.OutOfMemoryError as error:
                raise QKGuardError(
                    f"Out of memory with a row of {len(ids)} tokens. Give a smaller max_length, or bfloat16."
                ) from error
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, IndexError) as error:
                raise self._refusal(f"its forward or backward pass fails: {first_line(error)}") from error
            return [
                self._layer(spec, call, out, gradient)
                for (spec, call, out), gradient in zip(calls, gradients, strict=True)
            ]

    def _forward(self, ids: Tensor, labels: Tensor, scale: float) -> tuple[list[Seen], Tensor]:
        """Attention calls with their outputs, and the loss, all with their graph."""
        seen: list[Seen] = []

        def note(call: AttentionCall, out: Tensor) -> None:
            seen.append((call, out))

        first = max(1, int((labels != IGNORED).nonzero()[0]))  # nothing predicts the first token
        with watch_attention(self.model, _pass_by, note), self._stops():
            # All logits: asked for the last ones alone, Gemma 4 leaves earlier queries out of its upper layers.
            logits = LastLogits(self.model)(ids[None], len(ids))[0, first - 1 : -1]
        wanted = labels[first:].to(logits.device)
        loss = cross_entropy(logits.float(), wanted, ignore_index=IGNORED, reduction="sum")
        return seen, loss * scale

    def _calls(self, seen: Sequence[Seen]) -> list[tuple[AttentionSpec, AttentionCall, Tensor]]:
        """The calls of the softmax layers, one each, in order; attention over other things is left out."""
        found: dict[str, tuple[AttentionSpec, AttentionCall, Tensor]] = {}
        for call, out in seen:
            spec = self._spec_of(call.name)
            if spec is None:
                continue
            if spec.module in found:
                raise self._refusal(f"{spec.module} attends several times in one pass")
            found[spec.module] = (spec, call, out)
        unseen = [module for module in self._specs if module not in found]
        if unseen:
            raise self._refusal(
                f"{unseen[0]} computes its softmax itself, not through transformers' AttentionInterface"
            )
        return list(found.values())

    def _spec_of(self, name: str) -> AttentionSpec | None:
        """The layer whose module attends, or holds the module that does."""
        while name and name not in self._specs:
            name = name.rpartition(".")[0]
        return self._specs.get(name)

    def _layer(self, spec: AttentionSpec, call: AttentionCall, out: Tensor, gradient: Tensor) -> LayerGradients:
        if call.query.shape[0] != 1 or call.query.shape[2] != call.key.shape[2]:
            raise self._refusal(f"{spec.module} attends to {call.key.shape[2]} keys for {call.query.shape[2]} tokens")
        walk = _Blocks(call, out, gradient, self.far)
        walk.run()
        limit = RECOMPUTED.get(out.dtype, RECOMPUTED[torch.float32])
        if not walk.error <= limit:
            raise self._refusal(
                f"the output of {spec.module} is not softmax(logits) V as computed here (relative difference "
                f"{walk.error:.2g}, at most {limit:g} is expected): it looks ahead, or attends in a way of its own"
            )
        q, k = self._norms(spec, call, walk)
        mean_square = walk.squares / walk.pairs.clamp(min=1)
        by_distance = mean_square.sqrt().mean(0).cpu().numpy()
        layer = -1 if spec.layer is None else spec.layer
        return LayerGradients(layer, by_distance, walk.pairs.cpu().numpy(), q, k)

    def _norms(self, spec: AttentionSpec, call: AttentionCall, walk: _Blocks) -> tuple[np.ndarray, np.ndarray]:
        """Norms of the gradients that the far, the near and all logits send to W_Q and W_K, by head."""
        maps = self._maps[spec.module]
        squares = {"q": np.zeros((spec.num_heads + 1, 3)), "k": np.zeros((spec.num_kv_heads + 1, 3))}
        parts = {part: self._pushed(maps, call, walk, index) for index, part in enumerate(("far", "near"))}
        for param in maps:
            far, near = (parts[part][param.name].float() for part in ("far", "near"))
            for column, whole in enumerate((far, near, far + near)):
                others = [dim for dim in range(whole.dim()) if dim != param.dim]
                by_row = whole.square().sum(others).double().cpu().numpy()
                for block in param.blocks:
                    for role in set(block.role) & set("qk"):
                        head = -1 if block.head is None else block.head
                        squares[role][head, column] += by_row[block.start : block.stop].sum()
        return np.sqrt(squares["q"]), np.sqrt(squares["k"])

    def _pushed(self, maps: Sequence[ParamMap], call: AttentionCall, walk: _Blocks, part: int) -> Mapping[str, Tensor]:
        """Gradients of this layer's weights from one part of its logits."""
        weights = [self._weights[param.name] for param in maps]
        given = ((call.query, walk.d_query[part]), (call.key, walk.d_key[part]))
        used = [(tensor, back[None].to(tensor.dtype)) for tensor, back in given if tensor.requires_grad]
        tensors, backs = zip(*used, strict=True)
        self._pushing = True
        try:
            found = torch.autograd.grad(tensors, weights, backs, retain_graph=True, materialize_grads=True)
        finally:
            self._pushing = False
        return {param.name: gradient for param, gradient in zip(maps, found, strict=True)}

    @contextmanager
    def _stops(self) -> Iterator[None]:
        """Where layers share weights (Zamba2), gradients pushed to one layer's must not pass its entry.

        They would reach the same weights in an earlier layer, and count what hidden states did there.
        """

        def stop(gradient: Tensor) -> Tensor:
            return torch.zeros_like(gradient) if self._pushing else gradient

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return tuple(marked(value) for value in args), {name: marked(value) for name, value in kwargs.items()}

        def marked(value: Any) -> Any:
            if isinstance(value, Tensor) and value.requires_grad:
                value = value.view_as(value)
                value.register_hook(stop)
            return value

        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True) for name in self._tied
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _only_queries_and_keys(self) -> Iterator[None]:
        """Let W_Q and W_K alone ask for gradients: autograd then keeps nothing for the other weights."""
        flags = [(param, param.requires_grad) for param in self.model.parameters()]
        try:
            for param, _ in flags:
                param.requires_grad_(False)
            for weight in self._weights.values():
                weight.requires_grad_(True)
            yield
        finally:
            for param, flag in flags:
                param.requires_grad_(flag)

    def _refusal(self, why: str) -> QKGuardError:
        return QKGuardError(f"{self.name} cannot be diagnosed: {why}.")


class _Blocks:
    """One layer's logit gradients, a block of queries at a time, added up.

    Attributes:
        squares: (heads, tokens) sums of squares by distance; `pairs` (tokens,) counts.
        d_query: far and near part of the gradient of the queries, each (heads, tokens, size); `d_key` of the keys.
        error: norm of the difference between the layer's own output and P V, relative to that output's.
    """

    def __init__(self, call: AttentionCall, out: Tensor, gradient: Tensor, far: int) -> None:
        self.call, self.far = call, far
        self.query, self.key = (tensor.detach()[0].float() for tensor in (call.query, call.key))
        heads, tokens, _ = self.query.shape
        value = call.value.detach()[0].float()
        self.value = value.repeat_interleave(heads // len(value), 0)
        self.out, self.d_out = (t.detach().reshape(tokens, heads, -1).transpose(0, 1).float() for t in (out, gradient))
        device = self.query.device
        self.squares = torch.zeros(heads, tokens, dtype=torch.float64, device=device)
        self.pairs = torch.zeros(tokens, dtype=torch.float64, device=device)
        self.d_query = [torch.zeros_like(self.query) for _ in range(2)]
        self.d_key = [torch.zeros_like(self.key) for _ in range(2)]
        self.error = float("nan")

    def run(self) -> None:
        """All blocks."""
        heads, tokens, _ = self.query.shape
        step = max(1, _BLOCK // (heads * tokens))
        wrong = torch.zeros((), dtype=torch.float64, device=self.query.device)
        for start in range(0, tokens, step):
            wrong += self._block(start, min(start + step, tokens))
        norm = self.out.double().square().sum()
        self.error = float((wrong / norm.clamp(min=1e-30)).sqrt())

    def _block(self, start: int, stop: int) -> Tensor:
        """Add the queries `start:stop`; the squared difference of their outputs."""
        rows = torch.arange(start, stop, device=self.query.device)
        keys = torch.arange(stop, device=self.query.device)  # `error` shows it where a model looks ahead
        heads = range(len(self.query))
        query, key = self.query[:, rows].requires_grad_(), self.key[:, :stop].requires_grad_()
        scores = self.call.scores(0, heads, rows, rows, keys, query, key)
        with torch.no_grad():
            distance = rows[:, None] - keys
            probabilities = softmax_with_sinks(scores.detach(), self.call.sinks(heads)) * (distance >= 0)
            wrong = (probabilities @ self.value[:, :stop] - self.out[:, rows]).double().square().sum()
            back = self.d_out[:, rows] @ self.value[:, :stop].transpose(1, 2)
            gradient = probabilities * (back - (probabilities * back).sum(-1, keepdim=True))
            looked = (scores[0] > _MASKED) & (distance >= 0)
            place = distance.clamp(min=0).flatten()
            self.squares.index_add_(1, place, (gradient.double().square() * looked).flatten(1))
            self.pairs.index_add_(0, place, looked.double().flatten())
        is_far = distance > self.far
        for part, mask in enumerate((is_far, ~is_far)):
            d_query, d_key = torch.autograd.grad(scores, (query, key), gradient * mask, retain_graph=part == 0)
            self.d_query[part][:, rows] = d_query
            self.d_key[part][:, :stop] += d_key
        return wrong


def _projections(spec: AttentionSpec) -> list[ParamMap]:
    """W_Q and W_K of a layer: the weights with rows that make queries or keys, norms and biases left out."""
    return [p for p in spec.params if p.kind == "weight" and any(set(b.role) & set("qk") for b in p.blocks)]


def _pass_by(call: AttentionCall) -> None:
    """What is to be done before a layer attends: nothing."""
