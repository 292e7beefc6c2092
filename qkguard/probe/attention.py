"""Where the answer positions look: attention mass on the needle and on the most recent tokens, per layer and head."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from qkguard.errors import QKGuardError
from qkguard.probe.results import AttentionMass

_CHUNK = 1 << 22  # probabilities held at a time (16 MiB in float32), so that few keys are copied to float32 at once


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
        query: (heads, rows, head size), after rotary embedding and normalisation.
        key: (key-value heads, keys, head size); query heads share key heads in order, as in `repeat_kv`.
        allowed: bool (rows, keys) or (1 or heads, rows, keys); None where every row sees every key.
        scaling: of the scores.
        bias: added to the scaled scores, broadcastable to (heads, rows, keys).
        softcap: Gemma's bound on scores, before masking.
        sinks: (heads,) GPT-OSS's extra logits, which take probability without being keys.

    Returns:
        (heads, rows, keys); rows sum to 1 (to less with sinks).
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
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


@dataclass(frozen=True)
class Target:
    """What to measure in one batch: for every row of the batch, absolute query positions and needle key ranges.

    `weights` of 0 leave a row out of the sums (it still runs: padding that keeps ranks in step).
    """

    rows: tuple[tuple[int, ...], ...]
    needles: tuple[tuple[tuple[int, int], ...], ...]
    weights: tuple[float, ...]
    group: int = 0


@dataclass
class HeadSums:
    """What the samples of one layer add up to: attention mass on needles and on recent tokens, by head and group."""

    heads: int
    samples: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, group: int, masses: Tensor) -> None:
        """Add (2, heads): needle and local mass. They stay on their device, so that no layer waits for it."""
        self.samples.setdefault(group, []).append(masses)

    def of(self, group: int) -> Tensor:
        """(2, heads) in float64 on the CPU: needle and local mass of all samples."""
        if group not in self.samples:
            return torch.zeros(2, self.heads, dtype=torch.float64)
        return torch.stack(self.samples[group]).cpu().double().sum(0)


@dataclass(frozen=True)
class _Marks:
    """Of one batch item in one piece of the context: which rows to look at, and which keys count.

    `at`: indices of the rows in the piece's queries; `positions`: their places in the context; `counted`: float
    (2, rows, keys), 1 for the needle's keys, and for each row's recent ones; `weight`: of each row in the sums.
    """

    item: int
    at: Tensor
    positions: Tensor
    counted: Tensor
    weight: float


class AttentionRecorder:
    """Context manager that measures a model's softmax attention (`watch_attention`), beside its own computation.

    The probabilities of the answer rows alone are computed again from the same queries and keys, so memory is linear
    in the context. Sums per group (`Target.group`; probes use the context length) and layer are in `sums`, keyed by
    module name; models that do not go through transformers' interface leave it empty.

    Args:
        model: the model whose calls count; calls by other models pass through.
        window: how many most recent tokens, the current one included, count as local.
    """

    def __init__(self, model: nn.Module, window: int) -> None:
        self.window = window
        self.sums: dict[str, HeadSums] = {}
        self._watch = watch_attention(model, self._measure)
        self._target: Target | None = None
        self._stop = 0
        self._marked: dict[tuple[int, int, torch.device], list[_Marks]] = {}  # one piece's, the same for most layers

    def __enter__(self) -> AttentionRecorder:
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._target = None
        self._watch.__exit__(kind, error, tb)

    def expect(self, target: Target | None) -> None:
        """Set what the next forward passes are to be measured for; None to pass through."""
        self._target = target
        self._marked.clear()

    def reached(self, stop: int) -> None:
        """The next forward pass ends with position `stop - 1` (contexts read in chunks end there piece by piece)."""
        self._stop = stop
        self._marked.clear()

    def totals(self, lengths: Sequence[int]) -> Tensor:
        """All sums as one flat float64 vector: by length, layer, needle or local mass, and head."""
        sums = [self.sums[name].of(length).flatten() for length in lengths for name in self._layers()]
        return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64)

    def mass(self, totals: Tensor, samples: Mapping[int, int]) -> AttentionMass | None:
        """Means from `totals` (all ranks'), given the number of samples of every length; None without layers."""
        layers = self._layers()
        if not layers:
            return None
        lengths = sorted(samples)
        sizes = [self.sums[name].heads for _ in lengths for name in layers for _ in range(2)]
        sums = iter(totals.split(sizes))
        needle: dict[int, list[list[float]]] = {length: [] for length in lengths}
        local: dict[int, list[list[float]]] = {length: [] for length in lengths}
        for length in lengths:
            for _ in layers:
                needle[length].append((next(sums) / samples[length]).tolist())
                local[length].append((next(sums) / samples[length]).tolist())
        return AttentionMass(self.window, tuple(_layer_order(name)[0] for name in layers), needle, local)

    def _layers(self) -> list[str]:
        return sorted(self.sums, key=_layer_order)

    def _measure(self, call: AttentionCall) -> None:
        target = self._target
        if target is None:
            return
        sums = self.sums.setdefault(call.name, HeadSums(call.query.shape[1]))
        first_query = self._stop - call.query.shape[2]
        first_key = self._stop - call.key.shape[2]  # a sliding-window cache holds the latest keys only
        piece = (first_query, first_key, call.key.device)
        if piece not in self._marked:
            self._marked[piece] = list(self._marks(target, *piece))
        keys = torch.arange(first_key, self._stop, device=call.key.device)
        for marks in self._marked[piece]:
            masses = []
            for heads in _head_chunks(sums.heads, call.key.shape[1], len(marks.at) * len(keys)):
                probabilities = call.probabilities(marks.item, heads, marks.positions, marks.at, keys)
                masses.append((probabilities * marks.counted[:, None]).sum((2, 3)))
            sums.add(target.group, torch.cat(masses, 1) * marks.weight)

    def _marks(self, target: Target, first_query: int, first_key: int, device: torch.device) -> Iterator[_Marks]:
        keys = torch.arange(first_key, self._stop, device=device)
        for item, (rows, needles, weight) in enumerate(zip(target.rows, target.needles, target.weights, strict=True)):
            here = [r for r in rows if first_query <= r < self._stop]
            if not here or not weight:
                continue
            positions = torch.tensor(here, device=device)
            on_needle = torch.zeros(len(keys), dtype=torch.bool, device=device)
            for start, stop in needles:
                on_needle |= (keys >= start) & (keys < stop)
            recent = (keys <= positions[:, None]) & (keys > positions[:, None] - self.window)
            counted = torch.stack([on_needle.expand_as(recent), recent]).float()
            yield _Marks(item, positions - first_query, positions, counted, weight / len(rows))


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
        bias, allowed = None, None
        if isinstance(self.mask, Tensor) and self.mask.dim() == 4:
            rows = _pick(self.mask, item, heads)[:, at, : len(keys)]
            bias, allowed = (None, rows) if rows.dtype == torch.bool else (rows, None)
        elif callable(getattr(self.mask, "mask_mod", None)):  # flex attention's BlockMask
            zero = torch.zeros((), dtype=torch.long, device=keys.device)
            allowed = self.mask.mask_mod(zero + item, zero, positions[:, None], keys[None])
        elif not self.eager and self._causal():
            allowed = keys <= positions[:, None]
            width = self.options.get("sliding_window")
            if width is not None:
                allowed = allowed & (keys > positions[:, None] - width)
        position_bias = self.options.get("position_bias")
        if position_bias is not None:
            extra = _pick(position_bias, item, heads)[:, at]
            bias = extra if bias is None else bias + extra
        scaling, sinks = self.options.get("scaling"), self.options.get("s_aux")
        return attention_rows(
            self.query[item, heads.start : heads.stop, at],
            self.key[item, heads.start // groups : -(-heads.stop // groups)],
            allowed,
            scaling=float(self.query.shape[-1] ** -0.5 if scaling is None else scaling),
            bias=bias,
            softcap=self.options.get("softcap"),
            sinks=None if sinks is None else sinks.reshape(-1)[heads.start : heads.stop],
        )

    def _causal(self) -> bool:
        said = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if said is None else said)


@contextmanager
def watch_attention(model: nn.Module, on_call: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Tell `on_call` of every softmax attention of a model, before its own function computes the output.

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
        if id(module) in names:
            name = names[id(module)]
            on_call(AttentionCall(name, module, query, key, value, attention_mask, own is None, options))
        return compute(module, query, key, value, attention_mask, *args, **options)

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


def _layer_order(name: str) -> tuple[int, str]:
    number = layer_number(name)
    return (-1 if number is None else number, name)


def _pick(per_head: Tensor, item: int, heads: range) -> Tensor:
    """(1 or heads, rows, keys) of one batch item from a 4-D tensor whose batch and head dimensions may be 1."""
    one = per_head[item if per_head.shape[0] > 1 else 0]
    return one[heads.start : heads.stop] if one.shape[0] > 1 else one


def _head_chunks(heads: int, key_heads: int, cells: int) -> Sequence[range]:
    """Ranges of query heads, whole key-value groups each, with at most `_CHUNK` probabilities where possible."""
    groups = heads // key_heads
    step = max(1, _CHUNK // max(1, cells * groups)) * groups
    return [range(start, min(start + step, heads)) for start in range(0, heads, step)]
