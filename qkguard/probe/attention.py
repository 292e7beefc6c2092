"""A model's softmax attention seen from outside: its calls, and the probabilities of a few of their rows."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from qkguard.errors import QKGuardError


def attention_rows(
    query: Tensor,
    key: Tensor,
    allowed: Tensor | None,
    *,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention probabilities of a few query rows, in float32.

    Args:
        query, key, allowed, scaling, bias, softcap: as of `attention_scores`.
        sinks: (heads,) GPT-OSS's extra logits, which take probability without being keys.

    Returns:
        (heads, rows, keys); rows sum to 1 (to less with sinks).
    """
    scores = attention_scores(query, key, allowed, scaling=scaling, bias=bias, softcap=softcap)
    return softmax_with_sinks(scores, sinks)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Probabilities of `attention_scores`; sinks (heads,) take some of them without being keys."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def attention_scores(
    query: Tensor,
    key: Tensor,
    allowed: Tensor | None,
    *,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """What enters the softmax for a few query rows, in float32; -inf where a row must not look.

    Args:
        query: (heads, rows, head size), after rotary embedding and normalisation.
        key: (key-value heads, keys, head size); query heads share key heads in order, as in `repeat_kv`.
        allowed: bool (rows, keys) or (1 or heads, rows, keys); None where every row sees every key.
        scaling: of the scores.
        bias: added to the scaled scores, broadcastable to (heads, rows, keys).
        softcap: Gemma's bound on scores, before masking.

    Returns:
        (heads, rows, keys).
    """
    groups = query.shape[0] // key.shape[0]
    grouped = query.float().reshape(key.shape[0], groups * query.shape[1], -1)
    scores = torch.matmul(grouped, key.float().transpose(1, 2)).reshape(query.shape[0], query.shape[1], -1) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.float()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores


@dataclass(frozen=True)
class AttentionCall:
    """One call of a module's attention function; query, key and value are (batch, heads, positions, head size)."""

    name: str
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    eager: bool
    options: dict[str, Any]

    def probabilities(self, item: int, heads: range, positions: Tensor, at: Tensor, keys: Tensor) -> Tensor:
        """(heads, rows, keys) of one batch item, under the mask that the model's own function applies.

        `positions` are the absolute positions of the rows `at` of `query`, `keys` those of all keys.
        """
        groups = self.query.shape[1] // self.key.shape[1]
        query = self.query[item, heads.start : heads.stop, at]
        key = self.key[item, heads.start // groups : -(-heads.stop // groups)]
        return softmax_with_sinks(self.scores(item, heads, positions, at, keys, query, key), self.sinks(heads))

    def sinks(self, heads: range) -> Tensor | None:
        """(heads,) GPT-OSS's extra logits, where there are any."""
        sinks = self.options.get("s_aux")
        return None if sinks is None else sinks.reshape(-1)[heads.start : heads.stop]

    def scores(
        self, item: int, heads: range, positions: Tensor, at: Tensor, keys: Tensor, query: Tensor, key: Tensor
    ) -> Tensor:
        """(heads, rows, keys) what enters the softmax for these rows of `query` and keys, -inf where masked.

        As `probabilities`; `query` (heads, rows, size) and `key` (key-value heads, keys, size) are this item's own,
        or stand in for them.
        """
        bias, allowed = self._mask(item, heads, positions, at, keys)
        position_bias = self.options.get("position_bias")
        if position_bias is not None:
            extra = _pick(position_bias, item, heads)[:, at]
            bias = extra if bias is None else bias + extra
        scaling = self.options.get("scaling")
        return attention_scores(
            query,
            key,
            allowed,
            scaling=float(self.query.shape[-1] ** -0.5 if scaling is None else scaling),
            bias=bias,
            softcap=self.options.get("softcap"),
        )

    def visible(self, item: int, heads: range, positions: Tensor, at: Tensor, keys: Tensor) -> Tensor:
        """Which keys the rows may attend to: bool, (rows, keys) or (1 or heads, rows, keys); as `probabilities`."""
        bias, allowed = self._mask(item, heads, positions, at, keys)
        if bias is not None:
            return bias > torch.finfo(bias.dtype).min / 2  # what a mask hides has the dtype's lowest number, or -inf
        if allowed is not None:
            return allowed
        return torch.ones(len(positions), len(keys), dtype=torch.bool, device=keys.device)

    def _mask(
        self, item: int, heads: range, positions: Tensor, at: Tensor, keys: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """(added to the scores, allowed): the mask that the model's own function applies; at most one of them."""
        if isinstance(self.mask, Tensor) and self.mask.dim() == 4:
            rows = _pick(self.mask, item, heads)[:, at, : len(keys)]
            return (None, rows) if rows.dtype == torch.bool else (rows, None)
        if callable(getattr(self.mask, "mask_mod", None)):  # flex attention's BlockMask
            zero = torch.zeros((), dtype=torch.long, device=keys.device)
            return None, self.mask.mask_mod(zero + item, zero, positions[:, None], keys[None])
        if self.eager or not self._causal():
            return None, None
        allowed = keys <= positions[:, None]
        width = self.options.get("sliding_window")
        if width is not None:
            allowed = allowed & (keys > positions[:, None] - width)
        return None, allowed

    def _causal(self) -> bool:
        said = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if said is None else said)


@contextmanager
def watch_attention(
    model: nn.Module,
    on_call: Callable[[AttentionCall], None],
    on_output: Callable[[AttentionCall, Tensor], None] | None = None,
) -> Iterator[None]:
    """Tell `on_call` of every softmax attention of a model, before its own function computes the output.

    `on_output` is told of the same call after it, with the output (batch, positions, heads, value size).

    That function is wrapped under its own name in transformers' `AttentionInterface`, in the registries that the
    model's modules read: neither the configuration nor the masks, which transformers chooses by that name, change.
    Everything is taken back on leaving, also after an exception. Models that do not go through the interface (Bloom,
    MPT, remote code with its own kernels) are not seen.
    """
    names = {id(module): name for name, module in model.named_modules()}

    def call(
        own: Callable[..., Any] | None,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        compute = own or _eager_function(module)
        if id(module) not in names:
            return compute(module, query, key, value, attention_mask, *args, **options)
        seen = AttentionCall(names[id(module)], module, query, key, value, attention_mask, own is None, options)
        on_call(seen)
        out = compute(module, query, key, value, attention_mask, *args, **options)
        if on_output is not None:
            on_output(seen, out[0])
        return out

    with ExitStack() as stack:
        for registry in _registries(model):
            # Private in transformers 5.17: the entries of this registry alone. No public call removes an entry of its
            # own and leaves the one that all registries share.
            local = registry._local_mapping
            stack.callback(_put_back, local, dict(local))
            for name in _implementations(model):
                if name == "eager" or name in registry:
                    registry[name] = partial(call, registry.get(name))  # None for "eager"
        yield


def _registries(model: nn.Module) -> list[AttentionInterface]:
    """The registries in the source files of the model's modules: the shared one, and local ones."""
    names = {type(module).__module__ for module in model.modules()}
    files = [vars(sys.modules[name]) for name in names if name in sys.modules]
    found = {id(value): value for file in files for value in file.values() if isinstance(value, AttentionInterface)}
    return list(found.values())


def _implementations(model: nn.Module) -> set[str]:
    """Names of the attention functions that the model's modules are set to."""
    configs = (getattr(module, "config", None) for module in model.modules())
    names = {getattr(config, "_attn_implementation", None) for config in configs}
    return {name for name in names if isinstance(name, str)}


def _eager_function(module: nn.Module) -> Callable[..., Any]:
    """The function for "eager", which no registry holds: each model's source file has its own."""
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise QKGuardError(
            f"{type(module).__name__} has no eager attention function to watch. "
            "Switch attention mass off for this model."
        )
    return found


def _put_back(mapping: dict[str, Any], before: dict[str, Any]) -> None:
    mapping.clear()
    mapping.update(before)


def layer_number(name: str) -> int | None:
    """The layer a module name speaks of: its first whole number ("model.layers.3.self_attn" -> 3)."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else None


def _pick(per_head: Tensor, item: int, heads: range) -> Tensor:
    """(1 or heads, rows, keys) of one batch item from a 4-D tensor whose batch and head dimensions may be 1."""
    one = per_head[item if per_head.shape[0] > 1 else 0]
    return one[heads.start : heads.stop] if one.shape[0] > 1 else one
