"""The probe: makes samples once, finds the model's answer format, scores at any time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import nn

from qkguard.errors import QKGuardError
from qkguard.probe.answer_formats import AllReduce, Continuations, elect, read_continuation
from qkguard.probe.haystack import Prose, load_prose
from qkguard.probe.passes import LastLogits, undisturbed
from qkguard.probe.prompt import AnswerFormat, Encoder, make_template
from qkguard.probe.recorder import AttentionRecorder
from qkguard.probe.results import ProbeResult
from qkguard.probe.samples import Sample, SampleKey, SampleMaker, depths_of, plan
from qkguard.probe.scoring import Assignment, Outcome, Tally, alone, batches_of, divide, score_batch
from qkguard.probe.settings import HAYSTACK_PER, ProbeSettings, Progress
from qkguard.probe.shared_reading import SharedReading

FORMAT_SAMPLES = 4  # continuations in which a task's answer format is looked for
FORMAT_TOKENS = 256  # of each, at most
_UNBOUNDED = 1 << 40  # tokens in a batch: the few samples above go together


class Prober:
    """Needle-in-a-haystack recall of one model on a fixed set of samples.

    Args:
        tokenizer: the model's tokenizer, or a processor holding it; it is not changed.
        settings: which samples, and how they are run. `attention`, `questions`, `batch_tokens` and `chunk` are
            attributes too, and may be changed between runs; so may `sample_keys`, to ask fewer of the samples.

    Raises:
        QKGuardError: settings that make no samples.

    Ranks of a sharded or replicated model make the same `Prober` and call the same methods: samples are divided
    over them. `prepare_formats` and `prepare` do the work that can fail on one rank alone; where there are several,
    call them (and agree on their success) before `find_formats` and `run`.

    Attributes:
        timed_batch: (tokens of a sample, seconds per sample) of the last batch of `find_formats`; None before.
    """

    def __init__(self, tokenizer: Any, settings: ProbeSettings | None = None) -> None:
        settings = settings or ProbeSettings()
        self.sample_keys = plan(settings.tasks, settings.lengths, settings.depths, settings.samples)
        self.attention = settings.attention
        self.questions = settings.questions
        self.local_window = settings.local_window
        self.batch_tokens = settings.batch_tokens
        self.chunk = settings.chunk
        self.formats_seen: dict[str, str] = {}
        self.timed_batch: tuple[int, float] | None = None
        encoder = Encoder(tokenizer, make_template(tokenizer, settings.mode))
        prose = settings.haystack
        if not isinstance(prose, Prose):
            prose = load_prose(prose, without=encoder.special_strings(), decode=encoder.decode)
        if settings.haystack_per not in HAYSTACK_PER:
            expected = " or ".join(HAYSTACK_PER)
            raise QKGuardError(f"Invalid haystack_per {settings.haystack_per!r}: expected {expected}.")
        shared = settings.haystack_per == "length"
        self.sharing = SharedReading() if shared else None
        self.maker = SampleMaker(encoder, prose, settings.seed, depths_of(settings.depths) if shared else ())

    def prepare_formats(self, rank: int = 0, world: int = 1) -> None:
        """Make this rank's samples of `find_formats`."""
        for task in self._tasks():
            self._make(divide(self._format_keys(task), rank, world, _UNBOUNDED))

    def prepare(self, rank: int = 0, world: int = 1) -> None:
        """Make this rank's samples in the formats known so far; what is made already costs nothing."""
        self._make(divide(self.sample_keys, rank, world, self.batch_tokens))

    def _make(self, batches: Sequence[Sequence[Assignment]]) -> None:
        for batch in batches:
            for assignment in batch:
                self.maker.make(assignment.key)

    def find_formats(
        self, model: nn.Module, *, rank: int = 0, world: int = 1, all_reduce: AllReduce = alone
    ) -> dict[str, AnswerFormat]:
        """Let the model begin a few answers per task, at the shortest length, and score its own way of writing.

        ALL ranks must call this. To be called once, on the model before training; see `state`.
        """
        forward = LastLogits(model)
        with undisturbed(model):
            for task in self._tasks():
                keys = self._format_keys(task)
                (batch,) = divide(keys, rank, world, _UNBOUNDED)
                self._continue(forward, keys, batch, all_reduce)
        return dict(self.maker.formats)

    def run(
        self,
        model: nn.Module,
        *,
        rank: int = 0,
        world: int = 1,
        all_reduce: AllReduce = alone,
        progress: Progress | None = None,
    ) -> ProbeResult:
        """Score every sample. ALL ranks must call this; all get the whole result.

        Args:
            model: a causal language model; parameters may be sharded in ways that a forward pass hides.
            rank: this process's number among the `world` that share the samples.
            all_reduce: sum over ranks of a float64 CPU vector.
            progress: called with (forward passes done, passes in all).
        """
        began = time.perf_counter()
        batches = self._batches(model, rank, world)
        tally = Tally(self.sample_keys, self.maker)
        forward = LastLogits(model, self.chunk)
        recorder = None
        if self.attention:
            recorder = AttentionRecorder(model, self.local_window, questions=self.questions)
        with undisturbed(model):
            with recorder or nullcontext():
                for done, batch in enumerate(batches, 1):
                    samples = [self.maker.make(assignment.key) for assignment in batch]
                    places = [assignment.place for assignment in batch]
                    tally.add(batch, self._score(forward, samples, places, recorder))
                    if progress is not None:
                        progress(done, len(batches))
            tally.retry(forward, rank, world, all_reduce, self.batch_tokens)
        correct, logprob, attention, retrieval, other_formats = tally.reduce(recorder, all_reduce)
        return ProbeResult(
            self.sample_keys,
            correct,
            logprob,
            self.record(),
            attention,
            time.perf_counter() - began,
            other_formats,
            retrieval=retrieval,
        )

    def _batches(self, model: nn.Module, rank: int, world: int) -> list[list[Assignment]]:
        """This rank's samples of a length in batches of `batch_tokens`, or by task where samples are read together."""
        if self.sharing is None or not self.sharing.is_possible(model):
            return divide(self.sample_keys, rank, world, self.batch_tokens)
        whole = divide(self.sample_keys, rank, world, _UNBOUNDED)
        return [list(batch) for length in whole for _, batch in groupby(length, lambda found: found.key.task)]

    def _score(
        self,
        forward: LastLogits,
        samples: Sequence[Sample],
        places: Sequence[int | None],
        recorder: AttentionRecorder | None,
    ) -> list[Outcome]:
        if self.sharing is not None and self.sharing.is_possible(forward.model):
            outcomes = self.sharing.score(forward, samples, places, recorder, self.batch_tokens)
            if outcomes is not None:
                return outcomes
        out: list[Outcome] = []
        for rows in batches_of(range(len(samples)), samples[0].key.length, self.batch_tokens):
            out += score_batch(forward, [samples[i] for i in rows], [places[i] for i in rows], recorder)
        return out

    def record(self) -> dict[str, Any]:
        """Everything that decides the samples, as JSON."""
        template = self.maker.encoder.template
        return {
            "tasks": self._tasks(),
            "lengths": sorted({key.length for key in self.sample_keys}),
            "depths": sorted({key.depth for key in self.sample_keys}),
            "samples": 1 + max(key.index for key in self.sample_keys),
            "seed": self.maker.seed,
            "haystack": self.maker.prose.origin,
            "haystack_per": "length" if self.maker.depths else "sample",
            "mode": template.mode,
            "thinking": template.thinking,
            **self.state(),
        }

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to ask the same questions: the answer formats, and the digest to check by.

        `digest` says what decides these samples; `origin` leaves out which ones were asked.
        """
        return {
            "forms": {task: found.to_json() for task, found in sorted(self.maker.formats.items())},
            "forms_seen": dict(self.formats_seen),
            "digest": self.maker.digest(self.sample_keys),
            "origin": self.maker.digest(()),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over the answer formats of an earlier run.

        Raises:
            QKGuardError: the samples would not be the same.
        """
        self.maker.formats = {task: AnswerFormat.from_json(found) for task, found in state["forms"].items()}
        self.formats_seen = dict(state["forms_seen"])
        mine = self.maker.digest(self.sample_keys)
        if mine != state["digest"]:
            raise QKGuardError(
                f"The probe's samples changed (digest {mine}, expected {state['digest']}): its settings, haystack or "
                "tokenizer differ from the earlier run's. Use the same ones, or start a new baseline."
            )

    def adopt_formats(self, other: Prober) -> None:
        """Expect answers as another prober found them."""
        self.maker.formats, self.formats_seen = dict(other.maker.formats), dict(other.formats_seen)

    def _tasks(self) -> list[str]:
        return sorted({key.task for key in self.sample_keys})

    def _format_keys(self, task: str) -> list[SampleKey]:
        """A few samples of a task, of the shortest length, at depths from everywhere."""
        same = [key for key in self.sample_keys if key.task == task]
        same = [key for key in same if key.length == same[0].length]
        step = max(1, len(same) // FORMAT_SAMPLES)
        return same[::step][:FORMAT_SAMPLES]

    def _continue(
        self, forward: LastLogits, keys: Sequence[SampleKey], batch: Sequence[Assignment], all_reduce: AllReduce
    ) -> None:
        """Find one task's answer format from continuations of all ranks. ALL ranks must call this."""
        encoder = self.maker.encoder
        samples = [self.maker.make(assignment.key) for assignment in batch]
        said = torch.zeros(len(keys), FORMAT_TOKENS, dtype=torch.float64)  # token + 1; 0 for none
        began, passes = time.perf_counter(), forward.calls
        continued = Continuations(encoder, samples, all_reduce).run(forward)
        seconds = (time.perf_counter() - began) / (forward.calls - passes)
        self.timed_batch = samples[0].key.length, seconds / len(samples)
        for assignment, ids in zip(batch, continued, strict=True):
            if assignment.place is not None:
                row = torch.tensor(ids[:FORMAT_TOKENS], dtype=torch.float64)
                said[assignment.place, : len(row)] = row + 1
        everybodys = all_reduce(said.flatten()).view(len(keys), FORMAT_TOKENS)
        readings = []
        for key, row in zip(keys, everybodys.tolist(), strict=True):
            ids = [int(token) - 1 for token in row if token > 0]
            readings.append(read_continuation(encoder, self.maker.make(key), ids))
        found, count = elect(readings)
        self.maker.formats[keys[0].task] = found
        self.formats_seen[keys[0].task] = f"{count} of {len(keys)}"


def probe(
    model: nn.Module,
    tokenizer: Any,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> ProbeResult:
    """Recall of a model in one process: RULER's needle-in-a-haystack tasks, scored by teacher forcing.

        result = qkguard.probe.probe(model, tokenizer, lengths=(1024, 4096), tasks=("S2", "mk1"))
        print(result.recall, result.by("length"))

    The model is left exactly as it was.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        progress: called with (forward passes done, passes in all).
        settings: fields of `ProbeSettings`: lengths, depths, samples, tasks, haystack, seed, mode, attention,
            local_window, batch_tokens, chunk, haystack_per.

    Returns:
        Verdicts, log-probabilities and attention mass; `result.recall`, `result.by("task", "length")`,
        `result.to_json()`.

    Raises:
        QKGuardError: settings that make no samples, or a model that cannot be probed.
    """
    prober = Prober(tokenizer, ProbeSettings(**settings))
    prober.find_formats(model)
    return prober.run(model, progress=progress)
