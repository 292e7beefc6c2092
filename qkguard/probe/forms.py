"""How models write their answers: " 123", ": 123", lists with or without "and".

A model that copies the needle's ": 123" knows the answer as well as one that says " 123", and fine-tuning changes such
habits. So the form is found out before training, and where a model begins otherwise it is scored in that form.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qkguard.probe.forward import LastLogits, greedy
from qkguard.probe.prompt import AnswerForm, Encoder
from qkguard.probe.samples import Sample

AllReduce = Callable[[Tensor], Tensor]
"""Sum over ranks of a float64 CPU vector."""

SLACK = 16
"""Tokens a continuation or another form may take beyond a sample's own answer."""

BEFORE = (" ", ": ", ":\n", ":\n\n", "\n", "\n\n", " **", ": **", ":\n\n**", ' "', ': "', " `", ": `", " '", " the ")
"""What may stand between RULER's answer prefix and the first value."""

BETWEEN = ((", ", ", and "), (", ", ", "), (", ", " and "), (" and ", " and "), ("\n", "\n"))
"""What may stand between values, and before the last."""

_CONTEXT = 8  # tokens of the prompt that decoding is given, so that a tokenizer's rules for beginnings do not apply
_HEAD = 4  # characters of a value by which its beginning is recognised
_LONGEST = 16  # characters a form may put before or between values


def other_form(
    encoder: Encoder, sample: Sample, tried: AnswerForm, at: int, said: int
) -> tuple[AnswerForm, list[int]] | None:
    """The form a model is following that left the one `tried` at answer token `at` by saying `said`.

    Returns the form and the answer's tokens in it, or None: then what the model says is no known form of the answer.
    """
    own = encoder.answer_ids(sample.prefix, tried.render(sample.answers))
    for form in _candidates(sample.answers):
        ids = encoder.answer_ids(sample.prefix, form.render(sample.answers))
        if len(ids) <= sample.answer_size + SLACK and ids[:at] == own[:at] and ids[at : at + 1] == [said]:
            return form, ids
    return None


def continuations(
    forward: LastLogits, encoder: Encoder, samples: Sequence[Sample], all_reduce: AllReduce
) -> list[list[int]]:
    """How the model begins to answer: tokens of greedy decoding, in as few forward passes as may be.

    The samples must be of one task and length. A collective: ranks run the same number of passes of the same shape.
    """
    ends = [s.prompt[-_CONTEXT:].tolist() for s in samples]
    before = [encoder.decode(ids) for ids in ends]

    def text(i: int, done: list[int]) -> str:
        return encoder.decode([*ends[i], *done])[len(before[i]) :]

    def propose(i: int, done: list[int]) -> list[int]:
        return draft(encoder, before[i], text(i, done), samples[i].answers)

    def go_on(out: list[list[int]]) -> bool:
        waiting = sum(not _settled(text(i, done), samples[i].answers) for i, done in enumerate(out))
        return bool(all_reduce(torch.tensor([float(waiting)], dtype=torch.float64)).item())

    passes = 4 + (len(samples[0].answers) if len(samples[0].answers) > 1 else 0)
    return greedy(forward, [s.prompt for s in samples], propose, passes, samples[0].cell.length + SLACK, go_on)


def read_continuation(encoder: Encoder, sample: Sample, ids: Sequence[int]) -> tuple[AnswerForm, bool] | None:
    """`read_form` of what a model said after a sample's prompt."""
    end = sample.prompt[-_CONTEXT:].tolist()
    return read_form(encoder.decode([*end, *ids])[len(encoder.decode(end)) :], sample.answers)


def draft(encoder: Encoder, before: str, text: str, answers: Sequence[str]) -> list[int]:
    """A guess at the tokens after `before` + `text`, where `text` is the beginning of a list of `answers`."""
    at = given = 0
    while given < len(answers) and (found := text.find(answers[given], at)) >= 0:
        at = found + len(answers[given])
        given += 1
    if given == len(answers):
        return []
    rest, value = text[at:], answers[given]
    begun = max(k for k in range(len(value)) if rest.endswith(value[:k]))
    blank = "" if begun or rest.endswith((" ", "\n")) else ", " if given and not rest else " "
    following = AnswerForm("").render([value[begun:], *answers[given + 1 :]])
    return encoder.answer_ids(before + text, blank + following)


def read_form(text: str, answers: Sequence[str]) -> tuple[AnswerForm, bool] | None:
    """The form of one generated continuation, and whether it holds the right values; None where none is seen.

    A wrong value still shows the form before it: ": 7654321" for 1234567 says ": ".
    """
    default = AnswerForm()
    gaps: list[str] = []
    at = 0
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


def _settled(text: str, answers: Sequence[str]) -> bool:
    """Whether a continuation has shown its form: all values are there, or a wrong one is."""
    reading = read_form(text, answers)
    return reading is not None and (reading[1] or answers[0][:_HEAD] not in text)


def _candidates(answers: Sequence[str]) -> Iterator[AnswerForm]:
    for before in BEFORE:
        for joiner, last in BETWEEN if len(answers) > 1 else BETWEEN[:1]:
            yield AnswerForm(before, joiner, last)
