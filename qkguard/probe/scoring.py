"""Verdicts by teacher forcing: one forward pass per sample decides it.

All answer tokens are the model's first choice, given the true tokens before them, if and only if greedy decoding
begins with exactly these tokens (same numerics, no ties). It implies RULER's string match; the converse is false
(RULER also accepts other words before the answer, other case, another tokenisation).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from qkguard.errors import QKGuardError
from qkguard.probe.attention import AttentionRecorder, HeadSums, Target, layer_number
from qkguard.probe.forms import SLACK, AllReduce, other_form
from qkguard.probe.forward import LastLogits, input_device
from qkguard.probe.prompt import AnswerForm
from qkguard.probe.results import AttentionMass
from qkguard.probe.samples import Cell, Sample, SampleMaker

T = TypeVar("T")
_ROUNDS = 4  # other forms a sample may lead on to


def alone(vector: Tensor) -> Tensor:
    """The all-reduce of a single process."""
    return vector


@dataclass(frozen=True)
class Job:
    """One sample for one rank; `place` is its place in the probe's list, None for padding that is not counted."""

    cell: Cell
    place: int | None


@dataclass(frozen=True)
class Outcome:
    """Of one teacher-forced answer: verdict, mean log-probability of the values' tokens in nats (nan where the model's
    output is not finite), and the first answer token at which the model would have said something else, with it.
    """

    correct: bool
    logprob: float
    left_at: int = -1
    said: int = -1


@dataclass(frozen=True)
class Retry:
    """A sample whose model follows another form of the answer."""

    job: Job
    form: AnswerForm
    answer: tuple[int, ...]


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
        batches += _batches(jobs[rank::world], length, batch_tokens)
    return batches


def score_batch(
    forward: LastLogits, samples: Sequence[Sample], weights: Sequence[float], recorder: AttentionRecorder | None = None
) -> list[Outcome]:
    """Score samples of one length in one pass; `weights` say how much each counts in the attention sums."""
    length = samples[0].cell.length
    ids = torch.stack([s.ids for s in samples]).long()
    if recorder is not None:
        rows = tuple(tuple(range(length - s.answer_size + s.lead - 1, length - 1)) for s in samples)
        recorder.expect(Target(rows, tuple(s.needles for s in samples), tuple(weights), group=length))
    keep = max(s.answer_size for s in samples)
    progress = None if recorder is None else recorder.reached
    logits = forward(ids[:, :-1].to(input_device(forward.model)), keep, progress)
    return [_judge(logits[row, -s.answer_size :], s.answer, s.lead) for row, s in enumerate(samples)]


def score_retries(forward: LastLogits, pairs: Sequence[tuple[Sample, Sequence[int]]], length: int) -> list[Outcome]:
    """Score prompts of samples of one length with other answers, in one pass of a fixed width."""
    width = length + SLACK
    ids = torch.zeros(len(pairs), width, dtype=torch.long)  # what follows an answer changes nothing before it
    for row, (sample, answer) in enumerate(pairs):
        ids[row, : len(sample.prompt) + len(answer)] = torch.tensor([*sample.prompt.tolist(), *answer])
    keep = width - min(len(sample.prompt) for sample, _ in pairs) + 1
    logits = forward(ids.to(input_device(forward.model)), keep)
    out = []
    for row, (sample, answer) in enumerate(pairs):
        first = len(sample.prompt) - 1 - (width - keep)
        out.append(_judge(logits[row, first : first + len(answer)], torch.tensor(list(answer)), 0))
    return out


class Tally:
    """Verdicts of this rank's samples, and the sums of all ranks'."""

    def __init__(self, cells: Sequence[Cell], maker: SampleMaker) -> None:
        self.cells = cells
        self.maker = maker
        self.verdicts = torch.zeros(5, len(cells), dtype=torch.float64)  # scored, correct, finite, logprob, retried
        self.retries: list[Retry] = []

    def add(self, jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> None:
        """Enter first outcomes; `retries` collects what should be scored in another form."""
        for job, outcome in zip(jobs, outcomes, strict=True):
            if job.place is not None:
                finite = outcome.logprob == outcome.logprob
                values = [1.0, outcome.correct, finite, outcome.logprob if finite else 0.0, 0.0]
                self.verdicts[:, job.place] = torch.tensor(values, dtype=torch.float64)
                self._follow(job, self.maker.make(job.cell).form, outcome)

    def retry(self, forward: LastLogits, rank: int, world: int, all_reduce: AllReduce, batch_tokens: int) -> None:
        """Score samples again whose model follows another form; a collective, with equal passes on all ranks."""
        lengths = sorted({c.length for c in self.cells})
        for _ in range(_ROUNDS):
            due, self.retries = self.retries, []
            counts = Counter(r.job.cell.length for r in due)
            table = torch.zeros(world, len(lengths), dtype=torch.float64)
            table[rank] = torch.tensor([counts[n] for n in lengths], dtype=torch.float64)
            most = all_reduce(table.flatten()).view(world, -1).amax(0).long().tolist()
            if not any(most):
                return
            for length, count in zip(lengths, most, strict=True):
                mine = [r for r in due if r.job.cell.length == length]
                spare = next(c for c in self.cells if c.length == length)
                padding = Retry(Job(spare, None), AnswerForm(), tuple(self.maker.make(spare).answer.tolist()))
                mine += [padding] * (count - len(mine))
                for batch in _batches(mine, length + SLACK, batch_tokens):
                    pairs = [(self.maker.make(r.job.cell), r.answer) for r in batch]
                    for again, outcome in zip(batch, score_retries(forward, pairs, length), strict=True):
                        if (place := again.job.place) is not None:
                            self.verdicts[1, place] = float(outcome.correct)
                            self.verdicts[4, place] = 1.0
                            self._follow(again.job, again.form, outcome)

    def reduce(
        self, recorder: AttentionRecorder | None, all_reduce: AllReduce
    ) -> tuple[tuple[bool, ...], tuple[float, ...], AttentionMass | None, int]:
        """Verdicts, log-probabilities, attention and the number of samples right in another form; a collective."""
        lengths = sorted({c.length for c in self.cells})
        layers = [] if recorder is None else sorted(recorder.sums.items(), key=lambda item: _layer_order(item[0]))
        mass = _stack(layers, lengths)
        vector = all_reduce(torch.cat([self.verdicts.flatten(), mass])).cpu()
        scored, correct, finite, logprob, retried = vector[: self.verdicts.numel()].view(5, -1)
        if not bool((scored == 1).all()):
            raise QKGuardError("the ranks did not score every probe sample exactly once; they must share all settings")
        attention = None
        if recorder is not None and layers:
            counts = [sum(c.length == n for c in self.cells) for n in lengths]
            attention = _unstack(vector[self.verdicts.numel() :], layers, lengths, counts, recorder.window)
        logprobs = torch.where(finite > 0, logprob, torch.nan)
        return (
            tuple(bool(v) for v in correct),
            tuple(logprobs.tolist()),
            attention,
            int((correct * retried).sum()),
        )

    def _follow(self, job: Job, tried: AnswerForm, outcome: Outcome) -> None:
        if outcome.left_at < 0:
            return
        sample = self.maker.make(job.cell)
        other = other_form(self.maker.encoder, sample, tried, outcome.left_at, outcome.said)
        if other is not None:
            self.retries.append(Retry(job, other[0], tuple(other[1])))


def _judge(logits: Tensor, answer: Tensor, lead: int) -> Outcome:
    """`logits` (answer tokens, vocabulary) against the true answer's tokens."""
    answer = answer.long().to(logits.device)
    scores = logits.float()
    logprob = scores.log_softmax(-1).gather(-1, answer[:, None])[lead:].mean()
    if bool(scores.isnan().any()) or not bool(torch.isfinite(logprob)):
        return Outcome(False, float("nan"))
    choices = scores.argmax(-1)
    wrong = (choices != answer).nonzero()
    if len(wrong) == 0:
        return Outcome(True, float(logprob))
    at = int(wrong[0])
    return Outcome(False, float(logprob), at, int(choices[at]))


def _batches(jobs: Sequence[T], length: int, batch_tokens: int) -> list[list[T]]:
    size = max(1, batch_tokens // length)
    return [list(jobs[i : i + size]) for i in range(0, len(jobs), size)]


def _layer_order(name: str) -> tuple[int, str]:
    number = layer_number(name)
    return (-1 if number is None else number, name)


def _stack(layers: Sequence[tuple[str, HeadSums]], lengths: Sequence[int]) -> Tensor:
    parts = [sums.of(n).flatten() for n in lengths for _, sums in layers]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _unstack(
    vector: Tensor, layers: Sequence[tuple[str, HeadSums]], lengths: Sequence[int], counts: Sequence[int], window: int
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
