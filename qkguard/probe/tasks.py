"""What a probe asks: RULER's needle-in-a-haystack tasks, in RULER's wording.

Source: RULER (Hsieh et al. 2024, arXiv 2404.06654), `scripts/data/synthetic/{niah,constants}.py`; the task names are
RULER's without the `niah_`. Text alone lives here: tokens and exact lengths are `samples.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from uuid import UUID

from qkguard.errors import QKGuardError
from qkguard.probe import words

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_OPENING = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards."
)
_QUESTION = "What are all the special magic {kind} for {query} mentioned in the provided text?"
_PREFIX = "The special magic {kind} for {query} mentioned in the provided text are"
_SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))


@dataclass(frozen=True)
class Task:
    """One task of the family.

    `haystack` is "noise" (RULER's repeated lines), "prose" (essays; here any text) or "needles" (every line looks
    like the needle). `keys` needles carry different keys, `values` values belong to each, `queries` keys are asked.
    """

    name: str
    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def separator(self) -> str:
        """What RULER puts between the units of the haystack."""
        return " " if self.haystack == "prose" else "\n"


TASKS = {
    task.name: task
    for task in (
        Task("single_1", "noise"),
        Task("single_2", "prose"),
        Task("single_3", "prose", value_kind="uuids"),
        Task("multikey_1", "prose", keys=4),
        Task("multikey_2", "needles"),
        Task("multikey_3", "needles", key_kind="uuids", value_kind="uuids"),
        Task("multivalue", "prose", values=4),
        Task("multiquery", "prose", keys=4, queries=4),
    )
}
_ALIASES = {"s1": "single_1", "s2": "single_2", "s3": "single_3"}
_ALIASES |= {"mk1": "multikey_1", "mk2": "multikey_2", "mk3": "multikey_3", "mv": "multivalue", "mq": "multiquery"}


def find_task(name: str) -> Task:
    """A task by RULER's name, with or without `niah_`, or by its short name ("S2", "mk1"); any case."""
    key = name.strip().lower().removeprefix("niah_").replace("-", "_")
    key = _ALIASES.get(key, key)
    if key not in TASKS:
        known = ", ".join([*TASKS, *_ALIASES])
        raise QKGuardError(f"unknown probe task {name!r}; expected one of: {known}")
    return TASKS[key]


@dataclass(frozen=True)
class Puzzle:
    """Needles, question and answers of one sample; the haystack comes later.

    `needles` are sentences with the depth (0 first, 1 last) at which each goes; the first `asked` of them hold the
    answers. `answers` are in the order a reader would list them: as asked, and for several values of one key as they
    occur in the text.
    """

    task: Task
    needles: tuple[tuple[str, float], ...]
    asked: int
    keys: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def query(self) -> str:
        """The asked keys as RULER lists them."""
        return self.keys[0] if len(self.keys) == 1 else ", ".join(self.keys[:-1]) + ", and " + self.keys[-1]

    @property
    def opening(self) -> str:
        return self._say(_OPENING)

    @property
    def question(self) -> str:
        return self._say(_QUESTION)

    @property
    def answer_prefix(self) -> str:
        """The beginning of the answer, given to the model; the values follow it."""
        return self._say(_PREFIX)

    def user_text(self, context: str) -> str:
        """What the user says: opening, context, question."""
        return f"{self.opening}\n{context}\n{self.question}"

    def _say(self, template: str) -> str:
        kind = self.task.value_kind
        if self.asked == 1:
            # RULER makes the singular by these very replacements; its wording is kept to the letter.
            for plural, singular in _SINGULAR:
                template = template.replace(plural, singular)
            kind = kind.removesuffix("s")
        return template.format(kind=kind, query=self.query)


def draw(task: Task, rng: Random, depth: float) -> Puzzle:
    """A fresh puzzle whose asked needle lies at `depth`.

    Where several needles are asked for they are spread evenly from `depth` on (wrapping round), in random order;
    needles that are not asked for lie anywhere.
    """
    keys = _distinct(task.keys, lambda: _value(task.key_kind, rng))
    values = iter(_distinct(task.keys * task.values, lambda: _value(task.value_kind, rng)))
    pairs = [(key, [next(values) for _ in range(task.values)]) for key in keys]
    asked = task.queries * task.values
    depths = [depth + i / asked for i in range(asked)]
    depths = [d if d <= 1 else d - 1 for d in depths]
    if asked > 1:
        rng.shuffle(depths)
    depths += [rng.random() for _ in range((task.keys - task.queries) * task.values)]
    flat = [(key, value) for key, vs in pairs for value in vs]
    needles = tuple(
        (NEEDLE.format(kind=task.value_kind, key=k, value=v), d) for (k, v), d in zip(flat, depths, strict=True)
    )
    answers = [value for _, value in flat[:asked]]
    if task.values > 1:
        answers = [value for _, value in sorted(zip(depths[:asked], answers, strict=True))]
    return Puzzle(task, needles, asked, tuple(keys[: task.queries]), tuple(answers))


def haystack(puzzle: Puzzle, rng: Random, prose: Iterator[str] | None = None) -> Iterator[str]:
    """Endless units (lines or sentences) of haystack; `prose` replaces the built-in sentences.

    Units in which an asked key or an answer occurs are left out: with a short list of keys a haystack of needles
    would soon hold the asked one a second time.
    """
    taboo = (*puzzle.keys, *puzzle.answers)
    for unit in _units(puzzle.task, rng, prose):
        if not any(word in unit for word in taboo):
            yield unit


def weave(
    units: Sequence[str], puzzle: Puzzle, sizes: Sequence[int] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Haystack units with the needles between them, and the characters `start:stop` of every needle.

    A needle of depth `d` goes to the boundary between units nearest to the share `d` of the haystack, measured in
    `sizes` (tokens of each unit; every unit counts the same without).
    """
    sizes = [1] * len(units) if sizes is None else sizes
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    at = [_nearest(ends, depth * ends[-1]) for _, depth in puzzle.needles]
    order = sorted(range(len(at)), key=lambda n: (at[n], puzzle.needles[n][1]))
    pieces: list[str] = []
    spans = [(0, 0)] * len(at)
    done = 0
    length = 0  # characters so far, separators included
    for n in order:
        sentence = puzzle.needles[n][0]
        for piece in (*units[done : at[n]], sentence):
            pieces.append(piece)
            length += len(piece) + len(puzzle.task.separator)
        done = at[n]
        stop = length - len(puzzle.task.separator)
        spans[n] = (stop - len(sentence), stop)
    pieces += units[done:]
    return puzzle.task.separator.join(pieces), spans


def example(
    task: Task, rng: Random, units: int, depth: float | None = None, prose: Iterator[str] | None = None
) -> tuple[str, tuple[str, ...]]:
    """One plain-text example with `units` haystack units: the prompt up to the answer prefix, and the answers.

    The prompt ends without a blank; the answer is expected as " " + value. For making training data for small
    models; probes build theirs to an exact length in tokens (`samples.py`).
    """
    puzzle = draw(task, rng, rng.random() if depth is None else depth)
    text, _ = weave(list(islice(haystack(puzzle, rng, prose), units)), puzzle)
    return f"{puzzle.user_text(text)} {puzzle.answer_prefix}", puzzle.answers


def _units(task: Task, rng: Random, prose: Iterator[str] | None) -> Iterator[str]:
    if task.haystack == "prose":
        yield from words.prose(rng) if prose is None else prose
    while task.haystack == "noise":
        yield NOISE
    while task.haystack == "needles":
        key, value = _value(task.key_kind, rng), _value(task.value_kind, rng)
        yield NEEDLE.format(kind=task.value_kind, key=key, value=value)


def _nearest(ends: Sequence[int], target: float) -> int:
    """Index of the entry of the rising list `ends` nearest to `target`."""
    after = min(bisect_left(ends, target), len(ends) - 1)
    return after if after == 0 or ends[after] - target <= target - ends[after - 1] else after - 1


def _value(kind: str, rng: Random) -> str:
    if kind == "words":
        return words.key(rng)
    if kind == "uuids":
        return str(UUID(int=rng.getrandbits(128), version=4))
    return str(rng.randint(10**6, 10**7 - 1))


def _distinct(count: int, make: Callable[[], str]) -> list[str]:
    out: list[str] = []
    while len(out) < count:
        candidate = make()
        if candidate not in out:
            out.append(candidate)
    return out
