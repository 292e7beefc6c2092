"""Where the prose of a haystack comes from: a user's text, the run's training data, or generated sentences."""

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
from qkguard.probe import words
from qkguard.probe.undisturbed import random_states

MAX_CHARACTERS = 8_000_000
"""How much of a source is read: some two million tokens, enough for the longest haystack without repeating much."""

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
            yield from words.prose(rng)
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
    texts: Iterable[str]
    if isinstance(source, Path) or (isinstance(source, str) and _looks_like_path(source)):
        texts, found = _read(Path(source)), Path(source).name
    elif isinstance(source, str):
        texts, found = [source], "text"
    else:
        texts, found = _texts(_spread(source), decode), "rows"
    with random_states():
        sentences = tuple(_sentences(texts, without))
    if not sentences:
        raise QKGuardError(f"haystack {origin or found}: no text found; give a text file, or rows with text in them")
    return Prose(sentences, origin or found)


def _looks_like_path(source: str) -> bool:
    return (
        len(source) < 1024
        and "\n" not in source
        and (Path(source).is_file() or not re.search(r"[.!?]\s|\s\S+\s", source))
    )


def _read(path: Path) -> Iterable[str]:
    if not path.is_file():
        raise QKGuardError(f"haystack {path}: no such file; give a .txt, .md, .json or .jsonl file")
    kind = path.suffix.lower()
    if kind not in (".txt", ".md", ".json", ".jsonl"):
        raise QKGuardError(
            f"haystack {path}: cannot read {kind or 'a file without suffix'}; expected .txt, .md, .json or .jsonl"
        )
    try:
        with path.open(encoding="utf-8") as file:
            if kind in (".txt", ".md"):
                return [file.read(MAX_CHARACTERS)]
            if kind == ".json":
                return list(_texts([json.load(file)]))
            return list(_texts(json.loads(line) for line in file if line.strip()))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QKGuardError(f"haystack {path}: not valid UTF-8 {kind}: {error}") from error


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
