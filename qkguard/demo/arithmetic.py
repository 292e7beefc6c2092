"""Step-by-step arithmetic as text: what the demo fine-tunes on, and the book style its model has read before.

A problem is a chain of assignments modulo 10, "m = 3; c = m - 1; k = c + 5"; solving it means writing the chain out
value by value. Like most chain-of-thought text it can be written by looking a line or two back and no farther.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase


@dataclass(frozen=True)
class Chain:
    """Variables `names[i]` with value `values[i]`; from the second on, `names[i] = names[i - 1] signs[i] terms[i]`."""

    names: tuple[str, ...]
    signs: tuple[str, ...]
    terms: tuple[int, ...]
    values: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The exam question, up to where the chain of thought begins (no trailing blank)."""
        given = "; ".join(self._line(i, self.names[i - 1]) for i in range(len(self.names)))
        return f"Question: {given}. What is {self.names[-1]}?\nThink:"

    @property
    def completion(self) -> str:
        """The chain of thought and the answer, as they follow `prompt`."""
        steps = "; ".join(self._line(i, self.values[i - 1], f" = {self.values[i]}") for i in range(len(self.names)))
        return f" {steps}.\nAnswer: {self.values[-1]}"

    @property
    def book(self) -> tuple[str, str]:
        """The same chain as a worked example in running text: what is given, and how it is worked out."""
        given = ", ".join(f"let {self._line(i, self.names[i - 1], '', 'be')}" for i in range(len(self.names)))
        steps = ", ".join(
            f"so {self._line(i, self.values[i - 1], f' is {self.values[i]}', link='is')}"
            for i in range(len(self.names))
        )
        return f"Given, {given}, what is {self.names[-1]},", f" {steps}, so the number is {self.values[-1]}."

    def _line(self, i: int, previous: str | int, result: str = "", link: str = "=") -> str:
        if i == 0:
            return f"{self.names[0]} {link} {self.values[0]}"
        return f"{self.names[i]} {link} {previous} {self.signs[i]} {self.terms[i]}{result}"


def draw_chain(rng: Random, length: int) -> Chain:
    """A chain of `length` distinct one-letter variables (2 to 26)."""
    names = rng.sample(ascii_lowercase, length)
    signs = rng.choices("+-", k=length)
    terms = [rng.randrange(10) for _ in names]
    values = [terms[0]]
    for sign, term in zip(signs[1:], terms[1:], strict=True):
        values.append((values[-1] + term if sign == "+" else values[-1] - term) % 10)
    return Chain(tuple(names), tuple(signs), tuple(terms), tuple(values))


def problems(seed: int, lengths: tuple[int, int] = (4, 7)) -> Iterator[Chain]:
    """Endless chains with a uniform number of variables from `lengths[0]` to `lengths[1]`."""
    rng = Random(seed)
    while True:
        yield draw_chain(rng, rng.randint(*lengths))


def answer_of(text: str) -> int | None:
    """The digit after "Answer:" in a written chain of thought, None where there is none."""
    found = re.search(r"answer:\s*(\d)\b", text.lower())
    return int(found[1]) if found else None
