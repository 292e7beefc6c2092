# ruff: noqa: SIM905 - word lists read better as text than as Python lists
"""Where the prose of a haystack comes from: a user's text, the run's training data, or generated sentences.

Generated sentences come from short built-in lists through a `random.Random` that the caller owns, so a probe needs no
download and never touches the global random state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from qkguard.errors import QKGuardError

MAX_CHARACTERS = 8_000_000
"""How much of a source is read: some two million tokens (four characters each), more than the longest haystack."""

_LONGEST_SENTENCE = 60  # words; text without full stops (lists, code, formulas) is cut here, so that depths stay fine
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Prose:
    """Sentences to hide needles in. Without sentences it generates them; `origin` says where they come from."""

    sentences: tuple[str, ...] = ()
    origin: str = "generated"

    def stream(self, rng: Random) -> Iterator[str]:
        """Endless sentences from a random place on, starting over at the end (RULER repeats its essays too)."""
        if not self.sentences:
            yield from generated_prose(rng)
        at = rng.randrange(len(self.sentences))
        while True:
            yield self.sentences[at]
            at = (at + 1) % len(self.sentences)

    def digest(self) -> str:
        """A short hash of the text, by which two probes can be told to use the same haystack."""
        return sha256("\n".join(self.sentences).encode()).hexdigest()[:16]


def load_prose(
    source: Any = None,
    *,
    without: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    origin: str | None = None,
) -> Prose:
    """Prose from whatever the user has.

    Args:
        source: None (generated sentences), a text, the path of a `.txt`, `.md`, `.json` or `.jsonl` file, or rows: a
            dataset or a sequence of texts, of conversations, or of dicts holding them.
        without: strings to cut out, the tokenizer's special tokens: `<|im_end|>` in a haystack ends the turn.
        decode: makes text of rows that hold nothing but `input_ids`, as a trainer's prepared data set does.
        origin: what to record as the source; found out by default.

    Reading rows may run the user's own transforms: the global random states are afterwards as before.

    Raises:
        QKGuardError: no such file, an unknown kind of file, or no text in it.
    """
    if source is None:
        return Prose()
    from qkguard.probe.passes import random_states  # brings torch, which the names of tasks do without

    texts: Iterable[str]
    if _is_path(source):
        texts, found = _read(Path(source)), Path(source).name
    elif isinstance(source, str):
        texts, found = [source], "text"
    else:
        texts, found = _texts(_spread(source), decode), "rows"
    with random_states():
        sentences = tuple(_sentences(texts, without))
    if not sentences:
        raise QKGuardError(f"Haystack {origin or found}: no text found. Give a text file, or rows with text in them.")
    return Prose(sentences, origin or found)


def check_source(source: Any) -> None:
    """Refuse a path that `load_prose` would refuse, before anything else is imported or loaded."""
    if _is_path(source):
        _read(Path(source))


def _is_path(source: Any) -> bool:
    if isinstance(source, Path):
        return True
    return (
        isinstance(source, str)
        and len(source) < 1024
        and "\n" not in source
        and (Path(source).is_file() or not re.search(r"[.!?]\s|\s\S+\s", source))
    )


def _read(path: Path) -> Iterable[str]:
    if not path.is_file():
        raise QKGuardError(f"Haystack {path}: no such file. Give a .txt, .md, .json or .jsonl file.")
    kind = path.suffix.lower()
    if kind not in (".txt", ".md", ".json", ".jsonl"):
        raise QKGuardError(
            f"Haystack {path}: cannot read {kind or 'a file without suffix'}; expected .txt, .md, .json or .jsonl."
        )
    try:
        with path.open(encoding="utf-8") as file:
            if kind in (".txt", ".md"):
                return [file.read(MAX_CHARACTERS)]
            if kind == ".json":
                return list(_texts([json.load(file)]))
            return list(_texts(json.loads(line) for line in file if line.strip()))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QKGuardError(f"Haystack {path}: not valid UTF-8 {kind}: {error}") from error


def _spread(rows: Any) -> Iterator[Any]:
    """Rows in an order that takes from everywhere first, where the source has a length; else as they come."""
    try:
        count = len(rows)
    except TypeError:
        yield from rows
        return
    step = max(1, round(count**0.5))
    for start in range(step):
        for at in range(start, count, step):
            yield rows[at]


def _texts(rows: Iterable[Any], decode: Callable[[list[int]], str] | None = None) -> Iterator[str]:
    """All strings within rows, at any depth of lists and dicts, up to `MAX_CHARACTERS` in all."""
    left = MAX_CHARACTERS
    for row in rows:
        texts = list(_strings(row))
        if not texts and decode is not None and isinstance(row, Mapping) and "input_ids" in row:
            texts = [decode([int(token) for token in row["input_ids"]])]
        for text in texts:
            yield text
            left -= len(text)
            if left <= 0:
                return


def _strings(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, str):
        if name not in ("role", "id", "source", "type", "name"):
            yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner, str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            if isinstance(inner, int | float):  # token ids, embeddings
                return
            yield from _strings(inner, name)


def _sentences(texts: Iterable[str], without: Sequence[str]) -> Iterator[str]:
    cut = re.compile("|".join(re.escape(s) for s in sorted(without, key=len, reverse=True)) or r"(?!)")
    for text in texts:
        for sentence in _SENTENCE_END.split(cut.sub(" ", text)):
            parts = sentence.split()
            for start in range(0, len(parts), _LONGEST_SENTENCE):
                yield " ".join(parts[start : start + _LONGEST_SENTENCE])


# -- generated prose ----------------------------------------------------------------------------------------------

# The words of generated prose. A closed vocabulary of some 160 words: a tokenizer trained on a small model's
# own data can hold all of it. No digit, and none of "special", "magic", "number", occurs.
_QUALITIES = "old young tall quiet busy tired kind small".split()
_PEOPLE = (
    "farmer teacher baker sailor doctor painter miller writer traveler neighbor child merchant student singer".split()
)
_ACTS = ("walked to, returned to, hurried to, stayed near, waited near, worked near, slept near, rested by").split(
    ", "
)
_PLACES = "market river station church field mill road village hill house library lake shop school square wall".split()
_HANDLINGS = "carried found painted repaired sold bought forgot kept lost moved".split()
_THINGS = "book letter boat chair cart coat door lamp table stone map bread clock box plate rope".split()
_LOOKS = "heavy white dark warm broken empty narrow bright clean wooden".split()
_TIMES = (
    "in the morning, before noon, after the rain, late in the evening, on most days, when the wind rose, "
    "at the end of the week, for many years, during the winter, long ago"
).split(", ")
_THOUGHTS = "said believed knew hoped wrote remembered".split()
_WEATHER = (
    "the snow was deep, the light was fading, the bells were ringing, the streets were empty, the harvest was good, "
    "the night was cold"
).split(", ")
_LINKS = "because while although and but so".split()


def generated_prose(rng: Random) -> Iterator[str]:
    """Endless plain English sentences, about ten words each, ending in full stops."""
    while True:
        yield _sentence(rng)


def prose_vocabulary() -> set[str]:
    """Every word that `generated_prose` can write, in lower case."""
    lists: list[str] = [*_QUALITIES, *_PEOPLE, *_PLACES, *_HANDLINGS, *_THINGS, *_LOOKS]
    lists += [*_ACTS, *_THOUGHTS, *_LINKS, *_TIMES, *_WEATHER, "the that and"]
    return set(re.findall(r"[a-z]+", " ".join(lists)))


def _sentence(rng: Random) -> str:
    form = rng.randrange(4)
    if form == 0:
        text = f"{_clause(rng)} {rng.choice(_TIMES)}"
    elif form == 1:
        text = f"{rng.choice(_TIMES)}, {_clause(rng)}"
    elif form == 2:
        text = f"{_clause(rng)} {rng.choice(_LINKS)} {rng.choice((_clause(rng), rng.choice(_WEATHER)))}"
    else:
        text = f"{_someone(rng)} {rng.choice(_THOUGHTS)} that {_clause(rng)}"
    return text[0].upper() + text[1:] + "."


def _clause(rng: Random) -> str:
    if rng.random() < 0.5:
        act = rng.choice(_ACTS)
        return f"{_someone(rng)} {act} the {rng.choice(_PLACES)}"
    return f"{_someone(rng)} {rng.choice(_HANDLINGS)} the {rng.choice(_LOOKS)} {rng.choice(_THINGS)}"


def _someone(rng: Random) -> str:
    person = rng.choice(_PEOPLE)
    return f"the {rng.choice(_QUALITIES)} {person}" if rng.random() < 0.4 else f"the {person}"
