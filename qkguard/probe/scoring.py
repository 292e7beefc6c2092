"""Verdicts by teacher forcing: one forward pass per sample decides it.

All answer tokens are the model's first choice, given the true tokens before them, if and only if greedy decoding
begins with exactly these tokens (same numerics, no ties). It implies RULER's string match; the converse is false
(RULER also accepts other words before the answer, other case, another tokenisation).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qkguard.errors import QKGuardError
from qkguard.probe.answer_formats import SLACK, AllReduce, other_format
from qkguard.probe.passes import LastLogits, Past, input_device
from qkguard.probe.prompt import AnswerFormat
from qkguard.probe.recorder import AttentionRecorder, Target
from qkguard.probe.results import AttentionMass
from qkguard.probe.retrieval import RetrievalScores
from qkguard.probe.samples import Sample, SampleKey, SampleMaker

T = TypeVar("T")
_ROUNDS = 4  # other answer formats that one sample may lead on to; after these its last verdict counts


def alone(vector: Tensor) -> Tensor:
    """The all-reduce of a single process."""
    return vector


@dataclass(frozen=True)
class Assignment:
    """One sample for one rank; `place` is its place in the probe's list, None for padding that is not counted."""

    key: SampleKey
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

    def agrees_with(self, other: Outcome, tolerance: float) -> bool:
        """Whether they are the same but for rounding, which may move the log-probability by `tolerance`."""
        if math.isnan(self.logprob) or math.isnan(other.logprob):
            return math.isnan(self.logprob) and math.isnan(other.logprob)
        same = (self.correct, self.left_at, self.said) == (other.correct, other.left_at, other.said)
        return same and abs(self.logprob - other.logprob) <= tolerance


@dataclass(frozen=True)
class Retry:
    """A sample whose model follows another answer format, and the answer's tokens in that format."""

    assignment: Assignment
    format: AnswerFormat
    answer: tuple[int, ...]


def divide(keys: Sequence[SampleKey], rank: int, world: int, batch_tokens: int) -> list[list[Assignment]]:
    """This rank's batches: every sample on one rank, equal shapes and numbers of batches on all.

    Samples of one length are dealt out in turn; where they do not divide, some ranks score one a second time without
    counting it. A batch holds samples of one length, at most `batch_tokens` tokens (but at least one sample).
    """
    batches = []
    for length in sorted({key.length for key in keys}):
        assignments = [Assignment(key, place) for place, key in enumerate(keys) if key.length == length]
        assignments += [Assignment(assignments[0].key, None)] * (-len(assignments) % world)
        batches += batches_of(assignments[rank::world], length, batch_tokens)
    return batches


def score_batch(
    forward: LastLogits,
    samples: Sequence[Sample],
    places: Sequence[int | None] = (),
    recorder: AttentionRecorder | None = None,
    past: Past | None = None,
) -> list[Outcome]:
    """Score samples of one length in one pass; `places` say under which number a recorder keeps each, if at all.

    `past`: what the model has read of them, up to their questions at most.
    """
    ids = torch.stack([s.ids for s in samples]).long()
    if recorder is not None:
        recorder.expect(
            Target(
                rows=tuple(s.answer_rows for s in samples),
                needles=tuple(s.needles for s in samples),
                places=tuple(places),
                questions=tuple(s.question_rows for s in samples),
            )
        )
    keep = max(s.answer_size for s in samples)
    before_piece = None if recorder is None else recorder.reached
    read = 0 if past is None else past.tokens
    logits = forward(ids[:, read:-1].to(input_device(forward.model)), keep, before_piece, past)
    return [_judge(logits[row, -s.answer_size :], s.answer, s.lead) for row, s in enumerate(samples)]


def score_retries(forward: LastLogits, pairs: Sequence[tuple[Sample, Sequence[int]]], length: int) -> list[Outcome]:
    """Score prompts of samples of one length with other answers, in one pass of a fixed width."""
    width = length + SLACK
    ids = torch.zeros(len(pairs), width, dtype=torch.long)  # what follows an answer changes nothing before it
    for row, (sample, answer) in enumerate(pairs):
        ids[row, : len(sample.prompt) + len(answer)] = torch.tensor([*sample.prompt.tolist(), *answer])
    keep = width - min(len(sample.prompt) for sample, _ in pairs) + 1
    logits = forward(ids.to(input_device(forward.model)), keep)
    outcomes = []
    for row, (sample, answer) in enumerate(pairs):
        first = len(sample.prompt) - 1 - (width - keep)
        outcomes.append(_judge(logits[row, first : first + len(answer)], torch.tensor(list(answer)), 0))
    return outcomes


class Tally:
    """Verdicts of this rank's samples; `reduce` sums up all ranks'."""

    def __init__(self, keys: Sequence[SampleKey], maker: SampleMaker) -> None:
        self.keys = keys
        self.maker = maker
        self.lengths = [key.length for key in keys]
        self.verdicts = torch.zeros(5, len(keys), dtype=torch.float64)  # scored, correct, finite, logprob, retried
        self.retries: list[Retry] = []

    def add(self, assignments: Sequence[Assignment], outcomes: Sequence[Outcome]) -> None:
        """Enter first outcomes; `retries` collects what should be scored in another format."""
        for assignment, outcome in zip(assignments, outcomes, strict=True):
            if assignment.place is None:
                continue
            finite = not math.isnan(outcome.logprob)
            values = [1.0, outcome.correct, finite, outcome.logprob if finite else 0.0, 0.0]
            self.verdicts[:, assignment.place] = torch.tensor(values, dtype=torch.float64)
            self._follow(assignment, self.maker.make(assignment.key).format, outcome)

    def retry(self, forward: LastLogits, rank: int, world: int, all_reduce: AllReduce, batch_tokens: int) -> None:
        """Score samples again whose model follows another answer format.

        ALL ranks must call this; they run equally many passes of equal shapes.
        """
        for _ in range(_ROUNDS):
            due, self.retries = self.retries, []
            counts, lengths = Counter(retry.assignment.key.length for retry in due), sorted(set(self.lengths))
            table = torch.zeros(world, len(lengths), dtype=torch.float64)
            table[rank] = torch.tensor([counts[n] for n in lengths], dtype=torch.float64)
            most = all_reduce(table.flatten()).view(world, -1).amax(0).long().tolist()
            if not any(most):
                return
            for length, count in zip(lengths, most, strict=True):
                mine = [retry for retry in due if retry.assignment.key.length == length]
                mine += [self._padding(length)] * (count - len(mine))
                for batch in batches_of(mine, length + SLACK, batch_tokens):
                    self._score_again(forward, batch, length)

    def reduce(
        self, recorder: AttentionRecorder | None, all_reduce: AllReduce
    ) -> tuple[tuple[bool, ...], tuple[float, ...], AttentionMass | None, RetrievalScores | None, int]:
        """Verdicts, log-probabilities, attention, its scores, and the number of samples right in another format.

        ALL ranks must call this; all get the sums of all.
        """
        own = [self.verdicts.flatten()]
        if recorder is not None:
            own.append(recorder.totals(self.lengths, self.verdicts[1].bool().tolist()))
        vector = all_reduce(torch.cat(own)).cpu()
        scored, correct, finite, logprob, retried = vector[: self.verdicts.numel()].view(5, -1)
        if not bool((scored == 1).all()):
            raise QKGuardError(
                "The ranks did not score every probe sample exactly once; they must share all settings."
            )
        attention, retrieval = None, None
        if recorder is not None:
            totals = vector[self.verdicts.numel() :]
            attention, retrieval = recorder.read(totals, self.lengths, right=int(correct.sum()))
        logprobs = torch.where(finite > 0, logprob, torch.nan)
        others = int((correct * retried).sum())
        return tuple(bool(v) for v in correct), tuple(logprobs.tolist()), attention, retrieval, others

    def _score_again(self, forward: LastLogits, batch: Sequence[Retry], length: int) -> None:
        pairs = [(self.maker.make(retry.assignment.key), retry.answer) for retry in batch]
        for retry, outcome in zip(batch, score_retries(forward, pairs, length), strict=True):
            place = retry.assignment.place
            if place is not None:
                self.verdicts[1, place] = float(outcome.correct)
                self.verdicts[4, place] = 1.0
                self._follow(retry.assignment, retry.format, outcome)

    def _follow(self, assignment: Assignment, tried: AnswerFormat, outcome: Outcome) -> None:
        if outcome.left_at < 0:
            return
        sample = self.maker.make(assignment.key)
        other = other_format(self.maker.encoder, sample, tried, outcome.left_at, outcome.said)
        if other is not None:
            self.retries.append(Retry(assignment, other[0], tuple(other[1])))

    def _padding(self, length: int) -> Retry:
        """Keeps a rank in step that has fewer samples to score again than another one."""
        spare = next(key for key in self.keys if key.length == length)
        return Retry(Assignment(spare, None), AnswerFormat(), tuple(self.maker.make(spare).answer.tolist()))


def _judge(logits: Tensor, answer: Tensor, lead: int) -> Outcome:
    """`logits` (answer tokens, vocabulary) against the true answer's tokens."""
    answer = answer.long().to(logits.device)
    scores = logits.float()
    logprob = scores.log_softmax(-1).gather(-1, answer[:, None])[lead:].mean()
    if bool(scores.isnan().any()) or not bool(torch.isfinite(logprob)):
        return Outcome(False, math.nan)
    choices = scores.argmax(-1)
    wrong = (choices != answer).nonzero()
    if len(wrong) == 0:
        return Outcome(True, float(logprob))
    at = int(wrong[0])
    return Outcome(False, float(logprob), at, int(choices[at]))


def batches_of(items: Sequence[T], length: int, batch_tokens: int) -> list[list[T]]:
    """Items of `length` tokens each in batches of at most `batch_tokens`, but at least one item."""
    size = max(1, batch_tokens // length)
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
