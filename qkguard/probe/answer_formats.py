"""How models write their answers: " 123", ": 123", lists with or without "and".

A model that copies the needle's ": 123" knows the answer as well as one that says " 123", and fine-tuning changes such
habits. So the format is found out before training, and where a model begins otherwise it is scored in that format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qkguard.probe.passes import LastLogits, input_device
from qkguard.probe.prompt import AnswerFormat, Encoder
from qkguard.probe.samples import Sample

AllReduce = Callable[[Tensor], Tensor]
"""Sum over ranks of a float64 CPU vector; ALL ranks must call it, equally often."""

Reading = tuple[AnswerFormat, bool]
"""The answer format of a continuation, and whether the continuation holds the right values."""

SLACK = 16
"""Tokens that a continuation, or the answer in another format, may be longer than the sample's own answer.

Four values in the longest formats below have 9 characters more than in RULER's, so at most 9 tokens more where every
character is one; the rest is room for continuations that go on.
"""

BEFORE = (" ", ": ", ":\n", ":\n\n", "\n", "\n\n", " **", ": **", ":\n\n**", ' "', ': "', " `", ": `", " '", " the ")
"""What may stand between RULER's answer prefix and the first value."""

BETWEEN = ((", ", ", and "), (", ", ", "), (", ", " and "), (" and ", " and "), ("\n", "\n"))
"""What may stand between values, and before the last."""

_CONTEXT = 8  # tokens of the prompt that decoding is given, so that a tokenizer's rules for beginnings do not apply
_HEAD = 4  # characters of a value by which its beginning is recognised
_LONGEST = 16  # characters that may stand before or between values


def other_format(
    encoder: Encoder, sample: Sample, tried: AnswerFormat, at: int, said: int
) -> tuple[AnswerFormat, list[int]] | None:
    """The format that a model follows which left the format `tried` at answer token `at` by saying `said`.

    Returns the format and the answer's tokens in it, or None: what the model says is no known format of the answer.
    """
    own = encoder.answer_ids(sample.prefix, tried.render(sample.answers))
    between = BETWEEN if len(sample.answers) > 1 else BETWEEN[:1]
    for candidate in (AnswerFormat(before, joiner, last) for before in BEFORE for joiner, last in between):
        ids = encoder.answer_ids(sample.prefix, candidate.render(sample.answers))
        if len(ids) <= sample.answer_size + SLACK and ids[:at] == own[:at] and ids[at : at + 1] == [said]:
            return candidate, ids
    return None


class Continuations:
    """How a model begins to answer samples of one task and length, in as few forward passes as may be.

    `draft` guesses each answer's next tokens in the usual formats, so that one pass usually checks a whole answer.
    """

    def __init__(self, encoder: Encoder, samples: Sequence[Sample], all_reduce: AllReduce) -> None:
        self.encoder, self.samples, self.all_reduce = encoder, samples, all_reduce

    def run(self, forward: LastLogits) -> list[list[int]]:
        """Token ids of every sample's continuation. ALL ranks must call this, with equally many samples."""
        values = len(self.samples[0].answers)
        passes = 4 + (values if values > 1 else 0)
        width = self.samples[0].key.length + SLACK
        return greedy(forward, [s.prompt for s in self.samples], self._propose, passes, width, self._unsettled)

    def _propose(self, i: int, ids: list[int]) -> list[int]:
        before, text = _texts(self.encoder, self.samples[i], ids)
        return draft(self.encoder, before, text, self.samples[i].answers)

    def _unsettled(self, continued: list[list[int]]) -> bool:
        """Whether some continuation on some rank has not shown its format yet. ALL ranks must call this."""
        waiting = sum(not self._is_settled(sample, ids) for sample, ids in zip(self.samples, continued, strict=True))
        return bool(self.all_reduce(torch.tensor([float(waiting)], dtype=torch.float64)).item())

    def _is_settled(self, sample: Sample, ids: Sequence[int]) -> bool:
        """All values are there, or a wrong one is."""
        text = _texts(self.encoder, sample, ids)[1]
        reading = read_format(text, sample.answers)
        return reading is not None and (reading[1] or sample.answers[0][:_HEAD] not in text)


def read_continuation(encoder: Encoder, sample: Sample, ids: Sequence[int]) -> Reading | None:
    """`read_format` of what a model said after a sample's prompt."""
    return read_format(_texts(encoder, sample, ids)[1], sample.answers)


def _texts(encoder: Encoder, sample: Sample, ids: Sequence[int]) -> tuple[str, str]:
    """The end of a sample's prompt, and its continuation by `ids`."""
    end = sample.prompt[-_CONTEXT:].tolist()
    before = encoder.decode(end)
    return before, encoder.decode([*end, *ids])[len(before) :]


def greedy(
    forward: LastLogits,
    prompts: Sequence[Tensor],
    propose: Callable[[int, list[int]], list[int]],
    passes: int,
    width: int,
    go_on: Callable[[list[list[int]]], bool] | None = None,
) -> list[list[int]]:
    """Beginnings of greedy continuations, by at most `passes` forward passes without a cache, while `go_on` says so.

    Before each pass `propose(i, ids)` guesses how continuation i goes on after `ids`; the pass checks the guess, and
    what the model itself would have said is kept, with its own next token: every pass gains a token, a right guess
    many. All passes have the shape (len(prompts), `width`), beyond which nothing is continued: ranks of a sharded
    model stay in step (where `go_on` says the same to all), which `generate` does not promise. Positions after a
    row's end hold token 0; under causal attention they change nothing before them.
    """
    device = input_device(forward.model)
    starts = [len(prompt) for prompt in prompts]
    keep = width - min(starts) + 1
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    out: list[list[int]] = [[] for _ in prompts]
    for _ in range(passes):
        drafts = [propose(i, done)[: width - starts[i] - len(done)] for i, done in enumerate(out)]
        for row, (start, done, guess) in enumerate(zip(starts, out, drafts, strict=True)):
            ids[row, start : start + len(done) + len(guess)] = torch.tensor([*done, *guess], dtype=torch.long)
        choices = forward(ids.to(device), keep).argmax(-1).cpu()
        for row, (start, done, guess) in enumerate(zip(starts, out, drafts, strict=True)):
            first = start + len(done) - 1 - (width - keep)  # the output that follows what is done
            said = choices[row, first : first + len(guess) + 1].tolist()
            right = next((i for i, (a, b) in enumerate(zip(said, guess, strict=False)) if a != b), len(guess))
            out[row] = [*done, *said[: right + 1]][: width - start]
        if go_on is not None and not go_on(out):
            break
    return out


def draft(encoder: Encoder, before: str, text: str, answers: Sequence[str]) -> list[int]:
    """A guess at the tokens after `before` + `text`, where `text` is the beginning of a list of `answers`."""
    at = given = 0
    for answer in answers:
        found = text.find(answer, at)
        if found < 0:
            break
        at = found + len(answer)
        given += 1
    if given == len(answers):
        return []
    rest, value = text[at:], answers[given]
    begun = max(k for k in range(len(value)) if rest.endswith(value[:k]))
    blank = "" if begun or rest.endswith((" ", "\n")) else ", " if given and not rest else " "
    following = AnswerFormat("").render([value[begun:], *answers[given + 1 :]])
    return encoder.answer_ids(before + text, blank + following)


def read_format(text: str, answers: Sequence[str]) -> Reading | None:
    """The format of one generated continuation, and whether it holds the right values; None where none is seen.

    A wrong value still shows the format before it: ": 7654321" for 1234567 says ": ".
    """
    default = AnswerFormat()
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
        return AnswerFormat(gaps[0], joiner, gaps[-1] if complete else default.last), len(gaps) == len(answers)
    guess = re.match(r"([^0-9a-zA-Z]{1,8})[0-9a-f]{2}", text)
    return (AnswerFormat(guess.group(1), default.joiner, default.last), False) if guess else None


def elect(readings: Sequence[Reading | None]) -> tuple[AnswerFormat, int]:
    """The commonest format and how many continuations showed it; right values count first. RULER's without any."""
    for wanted in (True, False):
        votes = Counter(r[0] for r in readings if r is not None and r[1] is wanted)
        if votes:
            return votes.most_common(1)[0]
    return AnswerFormat(), 0
