"""Probe samples: token ids of an exact length, the same at every probe of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import TYPE_CHECKING

from qkguard.errors import QKGuardError
from qkguard.probe.haystack import Prose
from qkguard.probe.prompt import AnswerFormat, Encoder
from qkguard.probe.tasks import TextSample, draw, draw_one_of, find_task, haystack_units, weave

if TYPE_CHECKING:
    from torch import Tensor

Unit = tuple[str, int]
"""A line or sentence of haystack, and its size in tokens."""

_FILLERS = (" and", " so", ".", " the", "!", "~", " 1")


@dataclass(frozen=True, order=True)
class SampleKey:
    """Which sample it is: with the seed this decides everything about it."""

    length: int
    task: str
    depth: float
    index: int


@dataclass(frozen=True, eq=False)
class Sample:
    """One question with its true answer.

    `ids`: int32 (length,), the prompt followed by the answer's canonical tokens in one `format`: the last
    `answer_size` ones, of which the first `lead` come before the first value (": "). `needles`: tokens `start:stop` of
    the needle sentences that are asked for. `answers`: the values. `prefix`: the last words of the prompt. `question`:
    the token at which the question begins, after the context; None where it is not known.
    """

    key: SampleKey
    format: AnswerFormat
    ids: Tensor
    answer_size: int
    lead: int
    needles: tuple[tuple[int, int], ...]
    answers: tuple[str, ...]
    prefix: str
    question: int | None = None

    @property
    def answer_rows(self) -> tuple[int, ...]:
        """The positions whose next token is one of the values'."""
        return tuple(range(len(self.ids) - self.answer_size + self.lead - 1, len(self.ids) - 1))

    @property
    def question_rows(self) -> tuple[int, ...]:
        """The positions of question and answer prefix, up to the answer's."""
        return () if self.question is None else tuple(range(self.question, self.answer_rows[0]))

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
            raise QKGuardError(f"Invalid probe depths {depths}: expected at least 1.")
        return (0.5,) if depths == 1 else tuple(round(i / (depths - 1), 4) for i in range(depths))
    out = tuple(float(d) for d in depths)
    if not out or not all(0 <= d <= 1 for d in out):
        raise QKGuardError(f"Invalid probe depths {list(depths)}: expected numbers from 0 (start) to 1 (end).")
    return out


def plan(
    tasks: Sequence[str], lengths: Sequence[int], depths: int | Sequence[float], samples: int
) -> tuple[SampleKey, ...]:
    """All samples of a probe, sorted by length: `samples` for every task, length and depth."""
    if samples < 1 or not tasks or not lengths:
        raise QKGuardError("A probe needs at least one task, one length and one sample.")
    names = dict.fromkeys(find_task(t).name for t in tasks)
    places = depths_of(depths)
    keys = {SampleKey(int(n), task, d, i) for n in lengths for task in names for d in places for i in range(samples)}
    return tuple(sorted(keys))


class SampleMaker:
    """Makes the samples that keys name, and remembers them.

    Args:
        encoder: of the model's tokenizer, with its prompt template.
        prose: haystack of the prose tasks.
        seed: of all samples; the global random state is neither read nor moved.
        depths: of all samples where those of one length share a haystack; empty where every sample has its own.

    `formats` says how the model writes the answers of a task; RULER's own " v" where it is silent.
    """

    def __init__(self, encoder: Encoder, prose: Prose, seed: int, depths: Sequence[float] = ()) -> None:
        self.encoder = encoder
        self.prose = prose
        self.seed = seed
        self.depths = tuple(depths)
        self.formats: dict[str, AnswerFormat] = {}
        self._made: dict[tuple[SampleKey, AnswerFormat], Sample] = {}

    def make(self, key: SampleKey) -> Sample:
        """The sample of a key, its prompt and answer together exactly `key.length` tokens.

        Raises:
            QKGuardError: the length is too short for the task, or cannot be hit with this tokenizer.
        """
        answer_format = self.formats.get(key.task, AnswerFormat())
        if (key, answer_format) not in self._made:
            if self.depths:
                fit, name = self._in_shared_haystack(key, answer_format)
            else:
                name = f"{self.seed}/{key.task}/{key.length}/{key.depth}/{key.index}"
                text = draw(find_task(key.task), Random(f"{name}/needle"), key.depth)
                fit = _ExactFit(self.encoder, text, answer_format, key)
            rng = Random(f"{name}/haystack")
            self._made[key, answer_format] = fit.fit(haystack_units(fit.text, rng, self.prose.stream(rng)))
        return self._made[key, answer_format]

    def _in_shared_haystack(self, key: SampleKey, answer_format: AnswerFormat) -> tuple[_ExactFit, str]:
        """The sample that goes into the one haystack of its task and length, and that haystack's name.

        A task that may ask a text several questions has so many needles in it, those of samples that follow one
        another. Their questions differ in size, and so would the places of needles: the first one's size counts.
        """
        task = find_task(key.task)
        number = key.index * len(self.depths) + self.depths.index(key.depth)
        asked = number % task.questions
        needle = f"{self.seed}/{key.task}/{key.length}/{number - asked}/needle"
        if task.questions == 1:
            texts = [draw(task, Random(needle), key.depth)]
        else:
            depths = [self.depths[(number - asked + i) % len(self.depths)] for i in range(task.questions)]
            texts = [draw_one_of(task, Random(needle), depths, i) for i in (0, asked)]
        fits = [_ExactFit(self.encoder, text, answer_format, key) for text in texts]
        fits[-1].whole = fits[0].space
        return fits[-1], f"{self.seed}/{key.task}/{key.length}"

    def digest(self, keys: Sequence[SampleKey]) -> str:
        """A short hash of what decides the samples of these keys: equal digests mean equal samples."""
        shown = [self.encoder.encode(self.encoder.template.prompt("The quick brown fox, 1234567.", "is"))]
        shared = (self.depths,) if self.depths else ()  # nothing otherwise, as before samples could share a haystack
        facts = repr((self.seed, self.prose.digest(), sorted(self.formats.items()), shown, tuple(keys), *shared))
        # The names that these classes had in 0.1, so that files of earlier runs keep their digests
        facts = facts.replace("AnswerFormat(", "AnswerForm(").replace("SampleKey(", "Cell(")
        return sha256(facts.encode()).hexdigest()[:16]


class _ExactFit:
    """Finds the haystack that makes one sample exactly as long as its key says."""

    def __init__(self, encoder: Encoder, text: TextSample, answer_format: AnswerFormat, key: SampleKey) -> None:
        self.encoder, self.text, self.format, self.key = encoder, text, answer_format, key
        self.whole: int | None = None  # tokens of haystack that depths are shares of; None for those there are
        self.separator = text.task.separator
        self.answer_ids = encoder.answer_ids(text.answer_prefix, answer_format.render(text.answers))
        if encoder.unknown_token in self.answer_ids:
            raise QKGuardError(
                f"The tokenizer cannot spell the answers of {key.task} ({text.answers[0]}). Leave this task out."
            )
        self.room = key.length - len(self.answer_ids)  # for the prompt

    @property
    def space(self) -> int:
        """Tokens of haystack that there is room for."""
        return self.room - self._count([])

    def fit(self, source: Iterator[str]) -> Sample:
        least = self._count([])
        if least > self.room:
            raise QKGuardError(
                f"Probe length {self.key.length} is too short for {self.key.task}: its question, needles and answer "
                f"take {least + len(self.answer_ids)} tokens; give a longer length or another task"
            )
        import torch  # here, because the page of a run reads results and their keys without it

        units = self._last_words(self._whole_units(source, least))
        prompt, needles, question = self._prompt(units)
        ids = self.encoder.encode(prompt)
        assert len(ids) == self.room
        *spans, (asked, _) = self.encoder.token_spans(prompt, [*needles[: self.text.asked], question])
        both = torch.tensor([*ids, *self.answer_ids], dtype=torch.int32)
        prefix, answers = self.text.answer_prefix, self.text.answers
        lead = self.encoder.answer_lead(prefix, self.format.before, answers[0])
        return Sample(self.key, self.format, both, len(self.answer_ids), lead, tuple(spans), answers, prefix, asked)

    def _whole_units(self, source: Iterator[str], least: int) -> list[Unit]:
        """The shortest list of whole units that is too long."""
        units = self._take(source, self.room - least)
        # Sizes of pieces need not add up to the size of the whole: count that, and move the end
        for _ in range(100):
            missing = self.room - self._count(units)
            if missing >= 0:
                units += self._take(source, missing // 2)
                continue
            surplus = self._count(units[:-1]) - self.room
            if surplus <= 0:
                return units
            del units[-max(1, surplus // max(size for _, size in units)) :]
        raise self._unreachable()

    def _take(self, source: Iterator[str], tokens: int) -> list[Unit]:
        """So many units from the source that they have more than `tokens` tokens."""
        units: list[Unit] = []
        while tokens >= 0:
            units.append(self._unit(next(source)))
            tokens -= max(1, units[-1][1])
        return units

    def _last_words(self, units: list[Unit]) -> list[Unit]:
        """Cut the last unit, which is too much, to words and fillers that hit the length."""
        for drop in range(min(3, len(units))):  # a filler may fit after the unit before, where it does not by itself
            end = len(units) - drop - 1
            found = self._cut(units[:end], units[end][0].split())
            if found is not None:
                return found
        raise self._unreachable()

    def _cut(self, units: list[Unit], words: list[str]) -> list[Unit] | None:
        """`units` and a piece of the first of `words` and fillers, exactly as long as there is room; or None."""
        most = self._most_words(units, words)
        for count in range(most, max(-1, most - 8), -1):
            piece = " ".join(words[:count])
            tried = self._ended(units, piece)
            missing = self.room - self._count(tried)
            if missing == 0:
                return tried
            for filler in _FILLERS:
                for times in range(missing, 0, -1):
                    tried = self._ended(units, (piece + filler * times).lstrip())
                    if self._count(tried) == self.room:
                        return tried
        return None

    def _most_words(self, units: list[Unit], words: list[str]) -> int:
        """How many of `words` there is room for after `units`, by bisection."""
        low, high = 0, len(words)
        while low < high:
            middle = (low + high + 1) // 2
            if self._count(self._ended(units, " ".join(words[:middle]))) <= self.room:
                low = middle
            else:
                high = middle - 1
        return low

    def _ended(self, units: list[Unit], piece: str) -> list[Unit]:
        return [*units, self._unit(piece)] if piece else units

    def _unit(self, text: str) -> Unit:
        return text, self.encoder.size(self.separator + text)

    def _prompt(self, units: list[Unit]) -> tuple[str, list[tuple[int, int]], tuple[int, int]]:
        """Prompt text, the characters of every needle in it, and those of question and answer prefix."""
        context, spans = weave([text for text, _ in units], self.text, [size for _, size in units], self.whole)
        template = self.encoder.template
        shift = len(template.head) + len(self.text.opening) + 1
        prompt = template.prompt(self.text.user_text(context), self.text.answer_prefix)
        question = (shift + len(context) + 1, len(prompt))
        return prompt, [(start + shift, stop + shift) for start, stop in spans], question

    def _count(self, units: list[Unit]) -> int:
        return len(self.encoder.encode(self._prompt(units)[0]))

    def _unreachable(self) -> QKGuardError:
        return QKGuardError(
            f"Cannot make a {self.key.task} sample of exactly {self.key.length} tokens with this tokenizer. "
            "Try another probe length."
        )
