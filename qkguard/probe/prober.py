"""The probe: makes samples once, finds the model's answer form, scores at any time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from qkguard.errors import QKGuardError
from qkguard.probe.attention import AttentionRecorder
from qkguard.probe.forms import AllReduce, continuations, elect, read_continuation
from qkguard.probe.forward import LastLogits
from qkguard.probe.haystack import Prose, load_prose
from qkguard.probe.prompt import AnswerForm, Encoder, make_frame
from qkguard.probe.results import ProbeResult
from qkguard.probe.samples import Cell, SampleMaker, plan
from qkguard.probe.scoring import Tally, alone, divide, score_batch
from qkguard.probe.undisturbed import undisturbed

TASKS = ("single_1", "single_2", "single_3")
"""The tasks of the paper's table: S1, S2, S3."""

FORM_SAMPLES = 4  # continuations in which a task's answer form is looked for
FORM_TOKENS = 256  # of them, at most
Progress = Callable[[int, int], None]


class Prober:
    """Needle-in-a-haystack recall of one model on a fixed set of samples.

    Args:
        tokenizer: the model's tokenizer, or a processor holding it; it is not changed.
        lengths: context lengths in tokens; prompt and answer together have exactly these.
        depths: a number of evenly spread needle depths, or depths from 0 (start) to 1 (end).
        samples: samples for every task, length and depth.
        tasks: RULER's names (`tasks.py`).
        haystack: text for the prose tasks: None (generated), a text, a file, rows of text, or a `Prose`.
        seed: of the samples; equal seeds and settings give equal samples.
        mode: "auto", "chat" or "plain".
        attention: whether attention mass is measured in the same passes.
        local_window: how many most recent tokens count as local attention.
        batch_tokens: tokens in one forward pass, where more than one sample fits.
        chunk: read longer contexts through the model's cache in pieces of this many tokens.

    Raises:
        QKGuardError: settings that make no samples.

    Ranks of a sharded or replicated model make the same `Prober` and call the same methods: samples are divided
    over them. `prepare` does the work that can fail on one rank alone; where there are several, call it (and agree on
    its success) before `find_forms` and again, for the form found, before `run`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        lengths: Sequence[int],
        depths: int | Sequence[float] = 5,
        samples: int = 2,
        tasks: Sequence[str] = TASKS,
        haystack: Any = None,
        seed: int = 0,
        mode: str = "auto",
        attention: bool = True,
        local_window: int = 128,
        batch_tokens: int = 16384,
        chunk: int | None = None,
    ) -> None:
        self.cells = plan(tasks, lengths, depths, samples)
        self.attention = attention
        self.local_window = local_window
        self.batch_tokens = batch_tokens
        self.chunk = chunk
        self.forms_seen: dict[str, str] = {}
        encoder = Encoder(tokenizer, make_frame(tokenizer, mode))
        prose = haystack
        if not isinstance(prose, Prose):
            prose = load_prose(haystack, without=encoder.special_strings(), decode=encoder.decode)
        self.maker = SampleMaker(encoder, prose, seed)

    def prepare(self, rank: int = 0, world: int = 1) -> None:
        """Make this rank's samples in the form known so far; what is made already costs nothing."""
        for batch in (*divide(self.cells, rank, world, self.batch_tokens), *self._form_batches(rank, world)):
            for job in batch:
                self.maker.make(job.cell)

    def find_forms(
        self, model: nn.Module, *, rank: int = 0, world: int = 1, all_reduce: AllReduce = alone
    ) -> dict[str, AnswerForm]:
        """Let the model begin a few answers per task, at the shortest length, and score its own way of writing.

        ALL ranks must call this. To be called once, on the model before training; see `state`.
        """
        forward = LastLogits(model, None)
        with undisturbed(model):
            for batch in self._form_batches(rank, world):
                cells = self._form_cells(batch[0].cell.task)
                said = torch.zeros(len(cells), FORM_TOKENS, dtype=torch.float64)  # token + 1; 0 for none
                continued = continuations(
                    forward, self.maker.encoder, [self.maker.make(j.cell) for j in batch], all_reduce
                )
                for job, ids in zip(batch, continued, strict=True):
                    if job.place is not None:
                        row = torch.tensor(ids[:FORM_TOKENS], dtype=torch.float64)
                        said[job.place, : len(row)] = row + 1
                everybodys = all_reduce(said.flatten()).view(len(cells), FORM_TOKENS)
                self._elect(cells, [[int(t) - 1 for t in row if t > 0] for row in everybodys.tolist()])
        return dict(self.maker.forms)

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
        batches = divide(self.cells, rank, world, self.batch_tokens)
        tally = Tally(self.cells, self.maker)
        forward = LastLogits(model, self.chunk)
        recorder = AttentionRecorder(model, self.local_window) if self.attention else None
        with undisturbed(model):
            with recorder or nullcontext():
                for done, batch in enumerate(batches):
                    weights = [float(job.place is not None) for job in batch]
                    tally.add(batch, score_batch(forward, [self.maker.make(j.cell) for j in batch], weights, recorder))
                    if progress is not None:
                        progress(done + 1, len(batches))
            tally.retry(forward, rank, world, all_reduce, self.batch_tokens)
        correct, logprob, attention, other_forms = tally.reduce(recorder, all_reduce)
        seconds = time.perf_counter() - began
        return ProbeResult(self.cells, correct, logprob, self.settings(), attention, seconds, other_forms)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the samples, as JSON."""
        frame = self.maker.encoder.frame
        return {
            "tasks": sorted({c.task for c in self.cells}),
            "lengths": sorted({c.length for c in self.cells}),
            "depths": sorted({c.depth for c in self.cells}),
            "samples": 1 + max(c.index for c in self.cells),
            "seed": self.maker.seed,
            "haystack": self.maker.prose.origin,
            "mode": frame.mode,
            "thinking": frame.thinking,
            "forms": {task: form.to_json() for task, form in sorted(self.maker.forms.items())},
            "forms_seen": dict(self.forms_seen),
            "digest": self.maker.digest(self.cells),
        }

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to ask the same questions: the answer forms, and the digest to check by."""
        return {key: self.settings()[key] for key in ("forms", "forms_seen", "digest")}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over the answer forms of an earlier run.

        Raises:
            QKGuardError: the samples would not be the same.
        """
        self.maker.forms = {task: AnswerForm.from_json(form) for task, form in state["forms"].items()}
        self.forms_seen = dict(state["forms_seen"])
        if (mine := self.maker.digest(self.cells)) != state["digest"]:
            raise QKGuardError(
                f"the probe's samples changed (digest {mine}, expected {state['digest']}): its settings, haystack or "
                "tokenizer differ from the earlier run's; use the same ones, or start a new baseline"
            )

    def _form_cells(self, task: str) -> list[Cell]:
        """A few cells of the shortest length, at depths from everywhere."""
        same = [c for c in self.cells if c.task == task]
        same = [c for c in same if c.length == same[0].length]
        step = max(1, len(same) // FORM_SAMPLES)
        return same[::step][:FORM_SAMPLES]

    def _form_batches(self, rank: int, world: int) -> list[list[Any]]:
        tasks = sorted({c.task for c in self.cells})
        return [b for task in tasks for b in divide(self._form_cells(task), rank, world, 1 << 40)]

    def _elect(self, cells: Sequence[Cell], continued: Sequence[Sequence[int]]) -> None:
        samples = [self.maker.make(cell) for cell in cells]
        form, count = elect(
            [read_continuation(self.maker.encoder, *pair) for pair in zip(samples, continued, strict=True)]
        )
        self.maker.forms[cells[0].task] = form
        self.forms_seen[cells[0].task] = f"{count} of {len(cells)}"


def probe(
    model: nn.Module,
    tokenizer: Any,
    *,
    lengths: Sequence[int] = (512, 1024, 2048),
    depths: int | Sequence[float] = 5,
    samples: int = 2,
    tasks: Sequence[str] = TASKS,
    haystack: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> ProbeResult:
    """Recall of a model in one process: RULER's needle-in-a-haystack tasks, scored by teacher forcing.

    The model is left exactly as it was. The arguments, and `options` (mode, attention, local_window, batch_tokens,
    chunk), are those of `Prober`, which also serves many ranks and repeated probes of one run.

    Returns:
        Verdicts, log-probabilities and attention mass; `result.recall`, `result.by("task", "length")`,
        `result.to_json()`.

    Raises:
        QKGuardError: settings that make no samples, or a model that cannot be probed.
    """
    prober = Prober(
        tokenizer,
        lengths=lengths,
        depths=depths,
        samples=samples,
        tasks=tasks,
        haystack=haystack,
        seed=seed,
        **options,
    )
    prober.find_forms(model)
    return prober.run(model, progress=progress)
