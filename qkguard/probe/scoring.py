"""Verdicts by teacher forcing: one forward pass per sample decides it.

All answer tokens are the model's first choice, given the true tokens before them, if and only if greedy decoding
begins with exactly these tokens (same numerics, no ties): METHOD in the documentation says what follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from qkguard.errors import QKGuardError
from qkguard.probe.attention import AttentionRecorder, HeadSums, Target, layer_number
from qkguard.probe.forward import LastLogits, input_device
from qkguard.probe.results import AttentionMass
from qkguard.probe.samples import Cell, Sample

AllReduce = Callable[[Tensor], Tensor]


def alone(vector: Tensor) -> Tensor:
    """The all-reduce of a single process."""
    return vector


@dataclass(frozen=True)
class Job:
    """One sample for one rank; `place` is its place in the probe's list, None for padding that is not counted."""

    cell: Cell
    place: int | None


def divide(cells: Sequence[Cell], rank: int, world: int, batch_tokens: int) -> list[list[Job]]:
    """This rank's batches: every sample on one rank, equal shapes and numbers of batches on all.

    Samples of one length are dealt out in turn; where they do not divide, some ranks score one a second time without
    counting it. A batch holds samples of one length, at most `batch_tokens` tokens (but at least one sample).
    """
    batches = []
    numbered = sorted(enumerate(cells), key=lambda pair: pair[1].length)
    for length, same in groupby(numbered, key=lambda pair: pair[1].length):
        jobs = [Job(cell, place) for place, cell in same]
        jobs += [Job(jobs[0].cell, None)] * (-len(jobs) % world)
        mine = jobs[rank::world]
        size = max(1, batch_tokens // length)
        batches += [mine[i : i + size] for i in range(0, len(mine), size)]
    return batches


def score_batch(
    forward: LastLogits,
    samples: Sequence[Sample],
    weights: Sequence[float],
    recorder: AttentionRecorder | None = None,
) -> list[tuple[bool, float]]:
    """Verdict and mean answer log-probability (nats; nan where the output is not finite) of samples of one length."""
    length = samples[0].cell.length
    ids = torch.stack([s.ids for s in samples]).long()
    if recorder is not None:
        rows = tuple(tuple(range(length - s.answer_size - 1, length - 1)) for s in samples)
        recorder.expect(Target(rows, tuple(s.needles for s in samples), tuple(weights), group=length))
    keep = max(s.answer_size for s in samples)
    progress = None if recorder is None else recorder.reached
    logits = forward(ids[:, :-1].to(input_device(forward.model)), keep, progress)
    out = []
    for row, sample in enumerate(samples):
        answer = sample.answer.long().to(logits.device)
        scores = logits[row, -sample.answer_size :].float()
        logprob = scores.log_softmax(-1).gather(-1, answer[:, None]).mean()
        finite = bool(torch.isfinite(logprob))
        out.append((bool((scores.argmax(-1) == answer).all()) and finite, float(logprob) if finite else float("nan")))
    return out


class Tally:
    """Verdicts of this rank's samples, and the sums of all ranks'."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = cells
        self.verdicts = torch.zeros(4, len(cells), dtype=torch.float64)  # scored, correct, finite, log-probability

    def add(self, jobs: Sequence[Job], scores: Sequence[tuple[bool, float]]) -> None:
        for job, (correct, logprob) in zip(jobs, scores, strict=True):
            if job.place is not None:
                finite = logprob == logprob
                values = [1.0, float(correct), float(finite), logprob if finite else 0.0]
                self.verdicts[:, job.place] = torch.tensor(values, dtype=torch.float64)

    def reduce(
        self, recorder: AttentionRecorder | None, all_reduce: AllReduce
    ) -> tuple[tuple[bool, ...], tuple[float, ...], AttentionMass | None]:
        """One all-reduce for everything; a collective."""
        lengths = sorted({c.length for c in self.cells})
        layers = [] if recorder is None else sorted(recorder.sums.items(), key=lambda item: _layer_order(item[0]))
        mass = _stack(layers, lengths)
        vector = all_reduce(torch.cat([self.verdicts.flatten(), mass])).cpu()
        scored, correct, finite, logprob = vector[: self.verdicts.numel()].view(4, -1)
        if not bool((scored == 1).all()):
            raise QKGuardError("the ranks did not score every probe sample exactly once; they must share all settings")
        attention = None
        if recorder is not None and layers:
            counts = [sum(c.length == n for c in self.cells) for n in lengths]
            attention = _unstack(vector[self.verdicts.numel() :], layers, lengths, counts, recorder.window)
        logprobs = torch.where(finite > 0, logprob, torch.nan)
        return tuple(bool(v) for v in correct), tuple(logprobs.tolist()), attention


def _layer_order(name: str) -> tuple[int, str]:
    number = layer_number(name)
    return (-1 if number is None else number, name)


def _stack(layers: Sequence[tuple[str, HeadSums]], lengths: Sequence[int]) -> Tensor:
    parts = [
        kind.get(n, torch.zeros(sums.heads, dtype=torch.float64))
        for n in lengths
        for _, sums in layers
        for kind in (sums.needle, sums.local)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _unstack(
    vector: Tensor,
    layers: Sequence[tuple[str, HeadSums]],
    lengths: Sequence[int],
    counts: Sequence[int],
    window: int,
) -> AttentionMass:
    sizes = [sums.heads for _ in lengths for _, sums in layers for _ in range(2)]
    parts = iter(vector.split(sizes))
    needle: dict[int, list[list[float]]] = {}
    local: dict[int, list[list[float]]] = {}
    for length, count in zip(lengths, counts, strict=True):
        for _ in layers:
            needle.setdefault(length, []).append((next(parts) / count).tolist())
            local.setdefault(length, []).append((next(parts) / count).tolist())
    numbers = tuple(_layer_order(name)[0] for name, _ in layers)
    return AttentionMass(window, numbers, needle, local)
