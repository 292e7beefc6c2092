"""Styles in which a chain of thought is written out, chains with slips in them, and a task without any."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from qkguard.demo.arithmetic import Chain
from qkguard.probe import haystack, tasks

CONNECTIVES = ("so", "here", "again", "go", "after", "before", "when", "we")


def lines(chain: Chain) -> list[str]:
    """The worked lines: "m = 3", "c = 3 - 1 = 2", ..."""
    return [chain._line(i, chain.values[i - 1], f" = {value}") for i, value in enumerate(chain.values)]


def plain(chain: Chain, rng: Random) -> str:
    """The demo's own style."""
    return chain.completion


def word(chain: Chain, rng: Random) -> str:
    """Every line opens with the same connective, drawn anew for every problem: text that repeats itself near by."""
    opening = rng.choice(CONNECTIVES)
    return _joined((f"{opening}, {line}" for line in lines(chain)), chain)


def tag(chain: Chain, rng: Random) -> str:
    """Every line opens with the problem's own two-word tag, of the words that needles have as keys."""
    opening = f"{rng.choice(tasks.ADJECTIVES)}-{rng.choice(tasks.NOUNS)}"
    return _joined((f"{opening}: {line}" for line in lines(chain)), chain)


def echo(chain: Chain, rng: Random) -> str:
    """Every line first restates the question's: "c = m - 1 = 3 - 1 = 2"."""
    names, worked = chain.names, lines(chain)
    restated = (f"{chain._line(i, names[i - 1])}{line[len(names[i]) :]}" for i, line in enumerate(worked[1:], 1))
    return _joined((worked[0], *restated), chain)


def _joined(parts, chain: Chain) -> str:
    return f" {'; '.join(parts)}.\nAnswer: {chain.values[-1]}"


STYLES: dict[str, Callable[[Chain, Random], str]] = {"plain": plain, "word": word, "tag": tag, "echo": echo}


def rewriting(rng: Random) -> tuple[str, str]:
    """(prompt, completion) of a task without a chain of thought: sentences whose times are to move to the other end.

    Every word of the completion is looked up in the prompt, some fifty tokens back.
    """
    given, wanted = [], []
    for _ in range(rng.randint(4, 7)):
        clause, time = haystack._clause(rng), rng.choice(haystack._TIMES)
        ways = [f"{clause} {time}.", f"{time}, {clause}."]
        rng.shuffle(ways)
        given.append(ways[0])
        wanted.append(ways[1])
    return f"Question: {' '.join(given)}\nThink:", f" {' '.join(wanted)}"


def with_slips(chain: Chain, rng: Random, right: float) -> Chain:
    """The same problem worked by someone who gets a line right with that probability, else is off by one."""
    values = [chain.values[0]]
    for sign, term in zip(chain.signs[1:], chain.terms[1:], strict=True):
        value = values[-1] + term if sign == "+" else values[-1] - term
        values.append((value + (0 if rng.random() < right else rng.choice((-1, 1)))) % 10)
    return Chain(chain.names, chain.signs, chain.terms, tuple(values))
