"""Finding out how a model writes its answers: " 123", ": 123", lists with or without "and"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from qkguard.probe.prompt import AnswerForm

_HEAD = 4  # characters of a value by which its beginning is recognised
_LONGEST = 16  # characters a form may put before or between values


def steps_for(answers: Sequence[str], answer_size: int) -> int:
    """How many tokens to generate: a value's first characters for one answer, all of them for a list."""
    return 8 if len(answers) == 1 else answer_size + 8


def read_form(text: str, answers: Sequence[str]) -> tuple[AnswerForm, bool] | None:
    """The form of one generated continuation, and whether it holds the right values; None where none is seen.

    A wrong value still shows the form before it: ": 7654321" for 1234567 says ": ".
    """
    default = AnswerForm()
    gaps, at = [], 0
    for answer in answers:
        found = text.find(answer[:_HEAD], at)
        if found < 0 or found - at > _LONGEST:
            break
        gaps.append(text[at:found])
        at = found + len(answer)
    if gaps:
        complete = len(gaps) == len(answers) > 1
        inner = gaps[1:-1] if complete else gaps[1:]
        joiner = Counter(inner).most_common(1)[0][0] if inner else default.joiner
        return AnswerForm(gaps[0], joiner, gaps[-1] if complete else default.last), len(gaps) == len(answers)
    guess = re.match(r"([^0-9a-zA-Z]{1,8})[0-9a-f]{2}", text)
    return (AnswerForm(guess.group(1), default.joiner, default.last), False) if guess else None


def elect(readings: Sequence[tuple[AnswerForm, bool] | None]) -> tuple[AnswerForm, int]:
    """The commonest form and how many continuations showed it; right values count first. RULER's form without any."""
    for wanted in (True, False):
        votes = Counter(r[0] for r in readings if r is not None and r[1] is wanted)
        if votes:
            form, count = votes.most_common(1)[0]
            return form, count
    return AnswerForm(), 0
