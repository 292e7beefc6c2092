# ruff: noqa: SIM905 - word lists read better as text than as Python lists
"""What a probe asks: RULER's needle-in-a-haystack tasks, in RULER's wording.

Source: RULER (Hsieh et al. 2024, arXiv 2404.06654), `scripts/data/synthetic/{niah,constants}.py`; the task names are
RULER's without the `niah_`. Text alone lives here: tokens and exact lengths are `samples.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from uuid import UUID

from qkguard.errors import QKGuardError
from qkguard.probe.haystack import generated_prose, prose_vocabulary

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_OPENING = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards."
)
_QUESTION = "What are all the special magic {kind} for {query} mentioned in the provided text?"
_PREFIX = "The special magic {kind} for {query} mentioned in the provided text are"
_QUESTIONS = 4  # asked of one haystack of needles, as of one with RULER's four keys
_SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))

ADJECTIVES = """
able absent amber ancient bitter blunt bold brave brisk calm careful cheerful clever coarse crisp cunning daring deep
distant eager elastic faint fierce fragile frosty gentle giant golden graceful grumpy hasty hidden hollow humble icy
jolly keen lazy lively lonely loyal mellow mighty modest narrow nimble noisy odd orange patient plain polite proud
purple quick rapid rare rough royal rusty secret shaky sharp shiny silent silver simple sleepy smooth solid spicy
""".split()
"""First halves of needle keys."""

NOUNS = """
acorn anchor apple arrow badge banjo barrel basket beacon bell blanket bottle bracelet bridge bucket button cabin
camera candle canoe carpet castle chimney circle compass cradle crystal curtain desert dragon drum eagle engine falcon
feather fiddle forest fountain garden glacier hammer harbor helmet island jacket kettle ladder lantern lemon lion
magnet maple marble meadow mirror monkey orchid otter paddle pebble pencil pepper piano pillow planet pocket
puzzle rabbit ribbon rocket saddle scarf shovel spoon thunder trumpet tunnel violin walnut window
""".split()
"""Second halves of needle keys."""


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

    @property
    def questions(self) -> int:
        """How many needles of one text can each be asked for, one by one: those of all keys, and in a haystack of
        needles some of its lines; 1 where a question asks for all.
        """
        if self.values > 1 or self.queries > 1:
            return 1
        return _QUESTIONS if self.haystack == "needles" else self.keys


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
        raise QKGuardError(f"Unknown probe task {name!r}; expected one of: {known}")
    return TASKS[key]


@dataclass(frozen=True)
class TextSample:
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


def draw(task: Task, rng: Random, depth: float) -> TextSample:
    """A fresh sample whose asked needle lies at `depth`.

    Several asked needles are spread evenly from `depth` on (wrapping round), in random order; needles that are not
    asked for lie anywhere.
    """
    keys = _distinct(task.keys, task.key_kind, rng)
    values = _distinct(task.keys * task.values, task.value_kind, rng)
    asked = task.queries * task.values
    depths = [depth + i / asked for i in range(asked)]
    depths = [d if d <= 1 else d - 1 for d in depths]
    if asked > 1:
        rng.shuffle(depths)
    depths += [rng.random() for _ in range(len(values) - asked)]
    sentences = [
        NEEDLE.format(kind=task.value_kind, key=keys[i // task.values], value=value) for i, value in enumerate(values)
    ]
    answers = values[:asked]
    if task.values > 1:  # in the order of the text
        answers = [value for _, value in sorted(zip(depths[:asked], answers, strict=True))]
    needles = tuple(zip(sentences, depths, strict=True))
    return TextSample(task, needles, asked, tuple(keys[: task.queries]), tuple(answers))


def draw_one_of(task: Task, rng: Random, depths: Sequence[float], asked: int) -> TextSample:
    """A sample that asks for one of several needles: number `asked` of those at `depths`, which equal generators make
    the same whichever is asked for.
    """
    keys = _distinct(len(depths), task.key_kind, rng)
    values = _distinct(len(depths), task.value_kind, rng)
    needles = [
        (NEEDLE.format(kind=task.value_kind, key=key, value=value), depth)
        for key, value, depth in zip(keys, values, depths, strict=True)
    ]
    needles.insert(0, needles.pop(asked))
    return TextSample(task, tuple(needles), 1, (keys[asked],), (values[asked],))


def haystack_units(sample: TextSample, rng: Random, prose: Iterator[str] | None = None) -> Iterator[str]:
    """Endless units (lines or sentences) of haystack; `prose` replaces the built-in sentences.

    Units in which an asked key or an answer occurs are left out: with a short list of keys a haystack of needles
    would soon hold the asked one a second time.
    """
    taboo = (*sample.keys, *sample.answers)
    for unit in _endless(sample.task, rng, prose):
        if not any(word in unit for word in taboo):
            yield unit


def weave(
    units: Sequence[str], sample: TextSample, sizes: Sequence[int] | None = None, whole: int | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Haystack units with the needles between them, and the characters `start:stop` of every needle.

    A needle of depth `d` goes to the boundary between units nearest to the share `d` of the haystack, measured in
    `sizes` (tokens of each unit; every unit counts the same without). `whole`: the size of the haystack that depths
    are shares of, by default that of all units.
    """
    sizes = [1] * len(units) if sizes is None else sizes
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    whole = ends[-1] if whole is None else whole
    targets = [ends[-1] if depth == 1 else depth * whole for _, depth in sample.needles]
    places = [_nearest(ends, target) for target in targets]  # before which unit each needle goes
    place_depth_text = [(place, depth, text) for place, (text, depth) in zip(places, sample.needles, strict=True)]
    order = sorted(range(len(places)), key=place_depth_text.__getitem__)
    separator = sample.task.separator
    pieces: list[str] = []
    spans = [(0, 0)] * len(places)
    characters = done = 0  # characters so far, separators included; units so far
    for n in order:
        sentence = sample.needles[n][0]
        before = units[done : places[n]]
        characters += sum(len(unit) + len(separator) for unit in before)
        spans[n] = (characters, characters + len(sentence))
        characters += len(sentence) + len(separator)
        pieces += [*before, sentence]
        done = places[n]
    return separator.join([*pieces, *units[done:]]), spans


def example(
    task: Task, rng: Random, units: int, depth: float | None = None, prose: Iterator[str] | None = None
) -> tuple[str, tuple[str, ...]]:
    """One plain-text example with `units` haystack units: the prompt up to the answer prefix, and the answers.

    The prompt ends without a blank; the answer is expected as " " + value. For making training data for small
    models; probes build theirs to an exact length in tokens (`samples.py`).
    """
    sample = draw(task, rng, rng.random() if depth is None else depth)
    text, _ = weave(list(islice(haystack_units(sample, rng, prose), units)), sample)
    return f"{sample.user_text(text)} {sample.answer_prefix}", sample.answers


def vocabulary() -> list[str]:
    """Every word of needle keys and of generated prose, in lower case, sorted."""
    return sorted({*ADJECTIVES, *NOUNS} | prose_vocabulary())


def _endless(task: Task, rng: Random, prose: Iterator[str] | None) -> Iterator[str]:
    if task.haystack == "prose":
        yield from generated_prose(rng) if prose is None else prose
    while True:
        if task.haystack == "noise":
            yield NOISE
        else:
            key, value = _value(task.key_kind, rng), _value(task.value_kind, rng)
            yield NEEDLE.format(kind=task.value_kind, key=key, value=value)


def _nearest(ends: Sequence[int], target: float) -> int:
    """Index of the entry of the rising list `ends` nearest to `target`."""
    after = min(bisect_left(ends, target), len(ends) - 1)
    return after if after == 0 or ends[after] - target <= target - ends[after - 1] else after - 1


def _value(kind: str, rng: Random) -> str:
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "uuids":
        return str(UUID(int=rng.getrandbits(128), version=4))
    return str(rng.randint(10**6, 10**7 - 1))


def _distinct(count: int, kind: str, rng: Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_value(kind, rng)] = None
    return list(found)
