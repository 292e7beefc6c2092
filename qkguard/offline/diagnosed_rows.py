"""Text as a training would read it: rows tokenised, cut and labelled; running text cut into rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qkguard.choice.task import TaskRow, encode_rows
from qkguard.diagnosis.measure import TextRow
from qkguard.errors import QKGuardError
from qkguard.report.numbers import plural

TEXT = (".txt", ".md")
_UNBOUNDED = 1 << 40
_CHARACTERS = 40  # read per token that is needed: no tokenizer's average token is as long


def check_text(data: Any) -> str | None:
    """The text of a .txt or .md file; None for other kinds of data.

    Raises:
        QKGuardError: there is no such file, or it is not UTF-8.
    """
    if not isinstance(data, str | os.PathLike) or Path(data).suffix.lower() not in TEXT:
        return None
    path = Path(data)
    if not path.is_file():
        raise QKGuardError(f"{path}: no such file; expected text.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QKGuardError(f"{path} is not UTF-8 text ({error}).") from None


def spread(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Up to `count` rows from everywhere."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[i] for i in places]


def training_rows(
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    max_length: int,
    completion_only: bool = True,
    assistant_only: bool = False,
) -> tuple[list[TextRow], list[str]]:
    """Rows as TRL's SFTTrainer would train on them, one sample each, and warnings.

    Rows are cut at `max_length`; what then has nothing left to predict is left out.

    Raises:
        QKGuardError: packed rows, rows of another format, or none with anything to predict.
    """
    for number, row in enumerate(rows, 1):
        _refuse_packed(row, number)
    plain = [{k: v for k, v in row.items() if not (k == "answer" and "completion" in row)} for row in rows]
    encoded, _ = encode_rows(tokenizer, plain, _UNBOUNDED)
    out, emptied = [], 0
    for row, task in zip(plain, encoded, strict=True):
        whole = not assistant_only if "messages" in row else not completion_only
        cut = _cut(task, max_length, whole and "input_ids" not in row)
        emptied += not cut.tokens
        out += [cut] if cut.tokens else []
    if not out:
        raise QKGuardError(f"The first {max_length} tokens of every row hold nothing to predict. Raise max_length.")
    warnings = []
    if emptied:
        warnings.append(
            f"max_length={max_length} leaves nothing to predict in {plural(emptied, 'row')} of {len(rows)}"
        )
    return out, warnings


def _refuse_packed(row: Mapping[str, Any], number: int) -> None:
    positions = row.get("position_ids")
    if "seq_lengths" in row or (positions is not None and 0 in list(positions)[1:]):
        raise QKGuardError(
            f"Row {number} is packed: several samples share it, and distances between them mean nothing. Give the "
            "rows as they are before packing."
        )


def _cut(row: TaskRow, max_length: int, whole: bool) -> TextRow:
    left_out = set(row.unscored)
    first = 1 if whole else row.start
    scored = [i >= first and i not in left_out for i in range(min(len(row.ids), max_length))]
    return TextRow(row.ids[:max_length], tuple(scored))


def text_windows(tokenizer: Any, text: str, lengths: Sequence[int], name: str) -> tuple[list[TextRow], list[str]]:
    """Running text as rows of these lengths in tokens, from everywhere in it, and warnings; all tokens are predicted.

    Every row begins as the tokenizer begins a text. Rows do not overlap: a short text gives fewer, or one that is
    shorter.

    Raises:
        QKGuardError: the text has no two tokens.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    begun = list(tokenizer("a")["input_ids"])
    opening = [bos] if bos is not None and begun[:1] == [bos] else []
    text = text[: _CHARACTERS * sum(lengths)]
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    wanted = [max(2, length) - len(opening) for length in lengths]
    fitting, room = [], len(ids)
    for length in wanted:
        if length <= room:
            fitting.append(length)
            room -= length
    if not fitting:
        fitting, room = [len(ids)], 0
    if len(ids) < 2:
        raise QKGuardError(f"{name}: expected text, found {plural(len(ids), 'token')}.")
    gap, at, rows = room // len(fitting), 0, []
    for length in fitting:
        piece = (*opening, *ids[at : at + length])
        rows.append(TextRow(piece, (False, *[True] * (len(piece) - 1))))
        at += length + gap
    warnings = []
    if len(fitting) < len(lengths):
        made = plural(len(fitting), "row")
        warnings.append(f"{name} has {len(ids):,} tokens, enough for {made} of {len(lengths)}")
    return rows, warnings
