"""Probe samples: token ids of an exact length, the same at every probe of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import Random

import torch
from torch import Tensor

from qkguard.errors import QKGuardError
from qkguard.probe.haystack import Prose
from qkguard.probe.prompt import AnswerForm, Encoder
from qkguard.probe.tasks import Puzzle, draw, find_task, haystack, weave

_FILLERS = (" and", " so", ".", " the", "!", "~", " 1")


@dataclass(frozen=True, order=True)
class Cell:
    """The name of one sample: with the seed it decides everything about it."""

    length: int
    task: str
    depth: float
    index: int


@dataclass(frozen=True, eq=False)
class Sample:
    """One question with its true answer.

    `ids`: int32 (length,), the prompt followed by the answer's canonical tokens in one `form`, the last `answer_size`
    ones, of which the first `lead` come before the first value (": "). `needles`: tokens `start:stop` of the needle
    sentences that are asked for. `answers`: the values. `prefix`: the last words of the prompt.
    """

    cell: Cell
    form: AnswerForm
    ids: Tensor
    answer_size: int
    lead: int
    needles: tuple[tuple[int, int], ...]
    answers: tuple[str, ...]
    prefix: str

    @property
    def prompt(self) -> Tensor:
        return self.ids[: -self.answer_size]

    @property
    def answer(self) -> Tensor:
        return self.ids[-self.answer_size :]


def depths_of(depths: int | Sequence[float]) -> tuple[float, ...]:
    """Needle depths between 0 (first) and 1 (last): as given, or so many evenly spread ones."""
    if isinstance(depths, int):
        if depths < 1:
            raise QKGuardError(f"probe depths {depths}; expected at least 1")
        return (0.5,) if depths == 1 else tuple(round(i / (depths - 1), 4) for i in range(depths))
    out = tuple(float(d) for d in depths)
    if not out or not all(0 <= d <= 1 for d in out):
        raise QKGuardError(f"probe depths {list(depths)}; expected numbers from 0 (start) to 1 (end)")
    return out


def plan(
    tasks: Sequence[str], lengths: Sequence[int], depths: int | Sequence[float], samples: int
) -> tuple[Cell, ...]:
    """All samples of a probe, sorted by length: `samples` for every task, length and depth."""
    if samples < 1 or not tasks or not lengths:
        raise QKGuardError("a probe needs at least one task, one length and one sample")
    names = dict.fromkeys(find_task(t).name for t in tasks)
    cells = {Cell(int(n), t, d, i) for n in lengths for t in names for d in depths_of(depths) for i in range(samples)}
    return tuple(sorted(cells))


class SampleMaker:
    """Makes the samples that cells name, and keeps them.

    Args:
        encoder: of the model's tokenizer, with the prompt's frame.
        prose: haystack of the prose tasks.
        seed: of all samples; the global random state is neither read nor moved.
        forms: how the model writes the answers of a task; RULER's own " v" where missing.
    """

    def __init__(
        self, encoder: Encoder, prose: Prose, seed: int, forms: Mapping[str, AnswerForm] | None = None
    ) -> None:
        self.encoder = encoder
        self.prose = prose
        self.seed = seed
        self.forms: dict[str, AnswerForm] = dict(forms or {})
        self._made: dict[tuple[Cell, AnswerForm], Sample] = {}

    def make(self, cell: Cell) -> Sample:
        """The sample of a cell, its prompt and answer together exactly `cell.length` tokens.

        Raises:
            QKGuardError: the length is too short for the task, or cannot be hit with this tokenizer.
        """
        form = self.forms.get(cell.task, AnswerForm())
        if (cell, form) not in self._made:
            self._made[cell, form] = self._make(cell, form)
        return self._made[cell, form]

    def digest(self, cells: Sequence[Cell]) -> str:
        """A short hash of what decides the samples of these cells: equal digests mean equal samples."""
        shown = [self.encoder.encode(self.encoder.frame.prompt("The quick brown fox, 1234567.", "is"))]
        facts = (self.seed, self.prose.digest(), sorted(self.forms.items()), shown, tuple(cells))
        return sha256(repr(facts).encode()).hexdigest()[:16]

    def _make(self, cell: Cell, form: AnswerForm) -> Sample:
        name = f"{self.seed}/{cell.task}/{cell.length}/{cell.depth}/{cell.index}"
        task = find_task(cell.task)
        puzzle = draw(task, Random(f"{name}/needle"), cell.depth)
        rng = Random(f"{name}/haystack")
        units = haystack(puzzle, rng, self.prose.stream(rng))
        return _Fitter(self.encoder, puzzle, form, cell).fit(units)


class _Fitter:
    """Finds the haystack that makes one sample exactly as long as its cell says."""

    def __init__(self, encoder: Encoder, puzzle: Puzzle, form: AnswerForm, cell: Cell) -> None:
        self.encoder, self.puzzle, self.cell = encoder, puzzle, cell
        self.separator = puzzle.task.separator
        self.form = form
        self.answer_ids = encoder.answer_ids(puzzle.answer_prefix, form.render(puzzle.answers))
        if encoder.unknown_token in self.answer_ids:
            raise QKGuardError(
                f"the tokenizer cannot spell the answers of {cell.task} ({puzzle.answers[0]}); leave this task out"
            )
        self.room = cell.length - len(self.answer_ids)  # for the prompt

    def fit(self, source: Iterator[str]) -> Sample:
        least = self._count([], [])
        if least > self.room:
            raise QKGuardError(
                f"probe length {self.cell.length} is too short for {self.cell.task}: its question, needles and answer "
                f"take {least + len(self.answer_ids)} tokens; give a longer length or another task"
            )
        units, sizes = self._whole_units(source, least)
        units, sizes = self._last_words(units, sizes)
        text, needles = self._prompt(units, sizes)
        ids = self.encoder.encode(text)
        assert len(ids) == self.room
        spans = tuple(self.encoder.token_spans(text, needles[: self.puzzle.asked]))
        both = torch.tensor([*ids, *self.answer_ids], dtype=torch.int32)
        prefix, answers = self.puzzle.answer_prefix, self.puzzle.answers
        lead = self.encoder.answer_lead(prefix, self.form.before, answers[0])
        return Sample(self.cell, self.form, both, len(self.answer_ids), lead, spans, answers, prefix)

    def _whole_units(self, source: Iterator[str], least: int) -> tuple[list[str], list[int]]:
        """The shortest list of whole units that is too long."""
        units: list[str] = []
        sizes: list[int] = []

        def grow(tokens: int) -> None:
            while tokens >= 0:
                units.append(next(source))
                sizes.append(self.encoder.size(self.separator + units[-1]))
                tokens -= max(1, sizes[-1])

        grow(self.room - least)
        # Sizes of pieces need not add up to the size of the whole: count that, and move the end
        for _ in range(100):
            missing = self.room - self._count(units, sizes)
            if missing >= 0:
                grow(missing // 2)
                continue
            surplus = self._count(units[:-1], sizes[:-1]) - self.room
            if surplus <= 0:
                return units, sizes
            drop = max(1, surplus // max(sizes))
            del units[-drop:], sizes[-drop:]
        raise self._unreachable()

    def _last_words(self, units: list[str], sizes: list[int]) -> tuple[list[str], list[int]]:
        """Cut the last unit, which is too much, to words and fillers that hit the length."""
        for drop in range(min(3, len(units))):  # a filler may fit after the unit before, where it does not by itself
            end = len(units) - drop - 1
            found = self._cut(units[:end], sizes[:end], units[end].split())
            if found is not None:
                return found
        raise self._unreachable()

    def _cut(self, units: list[str], sizes: list[int], words: list[str]) -> tuple[list[str], list[int]] | None:
        """`units` and a piece of the first of `words` and fillers, exactly as long as there is room; or None."""

        def ended(piece: str) -> tuple[list[str], list[int]]:
            return ([*units, piece], [*sizes, self.encoder.size(self.separator + piece)]) if piece else (units, sizes)

        most = _last_true(len(words), lambda n: self._count(*ended(" ".join(words[:n]))) <= self.room)
        for count in range(most, max(-1, most - 8), -1):
            piece = " ".join(words[:count])
            missing = self.room - self._count(*ended(piece))
            if missing == 0:
                return ended(piece)
            for filler in _FILLERS:
                for times in range(missing, 0, -1):
                    tried = ended((piece + filler * times).lstrip())
                    if self._count(*tried) == self.room:
                        return tried
        return None

    def _unreachable(self) -> QKGuardError:
        return QKGuardError(
            f"could not make a {self.cell.task} sample of exactly {self.cell.length} tokens with this tokenizer; "
            "try another probe length"
        )

    def _prompt(self, units: list[str], sizes: list[int]) -> tuple[str, list[tuple[int, int]]]:
        """Prompt text and the characters of every needle in it."""
        context, spans = weave(units, self.puzzle, sizes)
        user = self.puzzle.user_text(context)
        shift = len(self.encoder.frame.head) + len(self.puzzle.opening) + 1
        text = self.encoder.frame.prompt(user, self.puzzle.answer_prefix)
        return text, [(a + shift, b + shift) for a, b in spans]

    def _count(self, units: list[str], sizes: list[int]) -> int:
        return len(self.encoder.encode(self._prompt(units, sizes)[0]))


def _last_true(top: int, holds: Callable[[int], bool]) -> int:
    """The largest n in 0..top with `holds(n)`, for a condition that is true up to some point (0 always)."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
