"""What a probe records of a model's attention: where answer and question rows look, per sample, layer and head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from qkguard.probe.attention import AttentionCall, layer_number, watch_attention
from qkguard.probe.results import AttentionMass
from qkguard.probe.retrieval import RetrievalScores, beyond_chance

_CHUNK = 1 << 22  # probabilities held at a time (16 MiB in float32), so that few keys are copied to float32 at once

_GROUP = 16  # query heads that share a key head, in most models at most; these are looked at together

Role = Literal["answer", "question"]
NEEDLE, CHANCE, LOCAL, DISTANCE = range(4)
"""What is kept of the answer's rows, in this order; of the question's rows only the first two."""
_COUNTS: dict[Role, int] = {"answer": 4, "question": 2}


@dataclass(frozen=True)
class Target:
    """What to measure in one batch, item by item.

    `rows`: absolute positions of the answer's rows; `needles`: key ranges of the needles asked for; `places`: the
    sample's place in the probe, None for padding that keeps ranks in step and is not counted; `questions`: positions
    of the question's rows, where these are measured.
    """

    rows: tuple[tuple[int, ...], ...]
    needles: tuple[tuple[tuple[int, int], ...], ...]
    places: tuple[int | None, ...]
    questions: tuple[tuple[int, ...], ...] = ()


@dataclass
class LayerSums:
    """What one layer's heads did in every sample: by role and place, (counts, heads) means over the sample's rows.

    They stay on their device, so that no layer waits for it.
    """

    heads: int
    sums: dict[tuple[Role, int], tuple[Tensor, int]] = field(default_factory=dict)  # over rows, and how many

    def add(self, role: Role, place: int, found: Tensor, rows: int) -> None:
        """Add sums over some rows of a sample: those in one piece of its context, of one call of several."""
        held, count = self.sums.get((role, place), (0, 0))
        self.sums[role, place] = held + found, count + rows

    def of(self, role: Role, places: Sequence[int]) -> Tensor:
        """(samples, counts, heads) in float64 on the CPU, of those of these samples that were measured here."""
        here = [self.sums[role, place] for place in places if (role, place) in self.sums]
        if not here:
            return torch.zeros(0, _COUNTS[role], self.heads, dtype=torch.float64)
        rows = torch.tensor([count for _, count in here], dtype=torch.float64)
        return torch.stack([found for found, _ in here]).cpu().double() / rows[:, None, None]


@dataclass(frozen=True)
class _Marks:
    """Some rows of one batch item and role in one piece of the context: where they are, and which keys count.

    `at`: indices of the rows in the piece's queries; `positions`: their places in the context; `needle`: indices of
    the needle's keys; `recent`: bool (rows, keys), each row's recent keys.
    """

    item: int
    place: int
    role: Role
    at: Tensor
    positions: Tensor
    needle: Tensor
    recent: Tensor


class AttentionRecorder:
    """Context manager that measures a model's softmax attention (`watch_attention`), beside its own computation.

    The probabilities of a few rows are computed again from the same queries and keys, a few heads at a time, so memory
    is linear in the context. What came of it is in `sums`, keyed by module name; models that do not go through
    transformers' interface leave it empty.

    Args:
        model: the model whose calls count; calls by other models pass through.
        window: how many most recent tokens, the current one included, count as local.
        questions: whether the question's rows are measured too (`Target.questions`).
    """

    def __init__(self, model: nn.Module, window: int, *, questions: bool = False) -> None:
        self.window = window
        self.questions = questions
        self.sums: dict[str, LayerSums] = {}
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

    def forget(self, places: Sequence[int | None]) -> None:
        """Drop what was measured in these samples, which are going to be read again."""
        for layer in self.sums.values():
            layer.sums = {key: found for key, found in layer.sums.items() if key[1] not in places}

    # -- sums over samples: one vector for an all-reduce, and back ---------------------------------------------------

    def totals(self, lengths: Sequence[int], right: Sequence[bool]) -> Tensor:
        """This rank's sums as one flat float64 vector, to be added to the other ranks' and given to `read`.

        `lengths` and `right` say of every sample how long it is, and whether it was answered rightly (on this rank, if
        it was scored here).
        """
        out = [torch.zeros(0, dtype=torch.float64)]
        for length in sorted(set(lengths)):
            places = [place for place, found in enumerate(lengths) if found == length]
            for name in self._layers():
                sums = self.sums[name].of("answer", places).sum(0)
                out += [sums[NEEDLE], sums[LOCAL], sums[DISTANCE]]
        places = [place for place, found in enumerate(right) if found]
        for name in self._layers():
            for role in self._roles():
                found = self.sums[name].of(role, places)
                out.append(beyond_chance(found[:, NEEDLE], found[:, CHANCE]).sum(0))
        return torch.cat(out)

    def read(
        self, totals: Tensor, lengths: Sequence[int], right: int
    ) -> tuple[AttentionMass, RetrievalScores] | tuple[None, None]:
        """Means from `totals` of all ranks; `right` of the samples were answered rightly. None without layers."""
        layers = self._layers()
        if not layers:
            return None, None
        groups = sorted(set(lengths))
        by_length = [self.sums[name].heads for _ in groups for name in layers for _ in range(3)]
        by_role = [self.sums[name].heads for name in layers for _ in self._roles()]
        parts = iter(totals.split([*by_length, *by_role]))
        grids: tuple[dict[int, list[list[float]]], ...] = ({}, {}, {})  # needle, local, distance
        for length in groups:
            for grid in grids:
                grid[length] = []
            for _ in layers:
                for grid in grids:
                    grid[length].append((next(parts) / lengths.count(length)).tolist())
        scores: dict[Role, list[list[float]]] = {"answer": [], "question": []}
        for _ in layers:
            for role in self._roles():
                scores[role].append((next(parts) / max(1, right)).tolist())
        mass = AttentionMass(self.window, tuple(_layer_order(name)[0] for name in layers), *grids)
        return mass, RetrievalScores(tuple(layers), scores["answer"], scores["question"], right)

    def _layers(self) -> list[str]:
        return sorted(self.sums, key=_layer_order)

    def _roles(self) -> tuple[Role, ...]:
        return ("answer", "question") if self.questions else ("answer",)

    # -- one call ----------------------------------------------------------------------------------------------------

    def _measure(self, call: AttentionCall) -> None:
        target = self._target
        if target is None:
            return
        sums = self.sums.setdefault(call.name, LayerSums(call.query.shape[1]))
        first_query = self._stop - call.query.shape[2]
        first_key = self._stop - call.key.shape[2]  # a sliding-window cache holds the latest keys only
        piece = (first_query, first_key, call.key.device)
        if piece not in self._marked:
            self._marked[piece] = list(self._marks(target, *piece))
        keys = torch.arange(first_key, self._stop, device=call.key.device)
        for marks in self._marked[piece]:
            found = []
            for heads in _head_chunks(sums.heads, call.key.shape[1], len(marks.at) * len(keys)):
                rows = (marks.item, heads, marks.positions, marks.at, keys)
                chance = _chance(call.visible(*rows), marks.needle).expand(len(heads))
                found.append(_counts(call.probabilities(*rows), chance, marks, keys))
            sums.add(marks.role, marks.place, torch.cat(found, 1), len(marks.at))

    def _marks(self, target: Target, first_query: int, first_key: int, device: torch.device) -> Iterator[_Marks]:
        keys = torch.arange(first_key, self._stop, device=device)
        most = max(1, _CHUNK // _GROUP // len(keys))
        rows_of: dict[Role, tuple[tuple[int, ...], ...]] = {"answer": target.rows}
        if self.questions:
            rows_of["question"] = target.questions
        for role, rows_of_items in rows_of.items():
            for item, (rows, needles, place) in enumerate(
                zip(rows_of_items, target.needles, target.places, strict=True)
            ):
                if place is None:
                    continue
                here = [r for r in rows if first_query <= r < self._stop]
                spans = ((max(start, first_key), min(stop, self._stop)) for start, stop in needles)
                on_needle = sorted({n - first_key for start, stop in spans for n in range(start, stop)})
                needle = torch.tensor(on_needle, dtype=torch.long, device=device)
                for begin in range(0, len(here), most):
                    positions = torch.tensor(here[begin : begin + most], device=device)
                    recent = (keys <= positions[:, None]) & (keys > positions[:, None] - self.window)
                    yield _Marks(item, place, role, positions - first_query, positions, needle, recent)


def _counts(probabilities: Tensor, chance: Tensor, marks: _Marks, keys: Tensor) -> Tensor:
    """(counts, heads), summed over rows, from probabilities (heads, rows, keys).

    Distances are in tokens, from a row back to the keys that it attends to; attention sinks are no tokens, so a row's
    mean is over what falls on keys.
    """
    found = [probabilities[:, :, marks.needle].sum((1, 2)), chance.to(probabilities.dtype)]
    if marks.role == "answer":
        found.append((probabilities * marks.recent).sum((1, 2)))
        back = (marks.positions[:, None] - keys).to(probabilities.dtype)
        on_keys = probabilities.sum(-1).clamp_min(torch.finfo(probabilities.dtype).tiny)
        found.append(((probabilities * back).sum(-1) / on_keys).sum(-1))
    return torch.stack(found)


def _chance(visible: Tensor, needle: Tensor) -> Tensor:
    """What uniform attention over the keys that a row may see would put on the needle, summed over rows: one number,
    or (1 or heads,).

    `visible`: bool, (rows, keys) or (1 or heads, rows, keys).
    """
    return (visible[..., needle].sum(-1) / visible.sum(-1).clamp_min(1)).sum(-1)


def _layer_order(name: str) -> tuple[int, str]:
    number = layer_number(name)
    return (-1 if number is None else number, name)


def _head_chunks(heads: int, key_heads: int, cells: int) -> Sequence[range]:
    """Ranges of query heads, whole key-value groups each, with at most `_CHUNK` probabilities where possible."""
    groups = heads // key_heads
    step = max(1, _CHUNK // max(1, cells * groups)) * groups
    return [range(start, min(start + step, heads)) for start in range(0, heads, step)]
