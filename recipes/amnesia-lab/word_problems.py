"""Arithmetic word problems in plain English, each with the chain of thought that solves it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

NAMES = ("Maya", "Tom", "Aisha", "Leo", "Nina", "Omar", "Julia", "Sam", "Priya", "Ben", "Clara", "Hugo")
THINGS = ("apples", "marbles", "stickers", "books", "coins", "pencils", "shells", "cookies", "stamps", "flowers")
OPENINGS = (
    "{who} has {n} {things}.",
    "{who} starts the day with {n} {things}.",
    "There are {n} {things} in the box of {who}.",
)
LINKS = ("Then", "Later", "After that,", "The next day,")
EVENTS = {  # what happens, and how the work refers to it
    "+": (
        ("{who} buys {n} more {things}", "buying {n}"),
        ("{friend} gives {who} {n} {things}", "getting {n} from {friend}"),
        ("{who} finds {n} {things} under the bed", "finding {n}"),
    ),
    "-": (
        ("{who} gives {n} {things} to {friend}", "giving {n} to {friend}"),
        ("{who} loses {n} {things} on the way home", "losing {n}"),
        ("{who} sells {n} {things} at the school fair", "selling {n}"),
    ),
    "*": (
        ("{who} trades with {friend} and ends up with {n} times as many {things}", "trading for {n} times as many"),
    ),
    "/": (("{who} splits all {things} into {n} equal piles and keeps one pile", "keeping one of {n} piles"),),
}
QUESTIONS = ("How many {things} does {who} have in the end?", "How many {things} are left for {who}?")
REQUEST = 'Work it out step by step, then write "Answer:" and the number.'
LARGEST = 200


@dataclass(frozen=True)
class WordProblem:
    question: str
    work: str
    answer: int

    @property
    def prompt(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{self.question} {REQUEST}"}]

    @property
    def completion(self) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": f"{self.work}\nAnswer: {self.answer}"}]


def word_problems(seed: int, steps: tuple[int, int] = (2, 4)) -> Iterator[WordProblem]:
    """Endless problems with a uniform number of steps from `steps[0]` to `steps[1]`."""
    rng = Random(seed)
    while True:
        yield draw_problem(rng, rng.randint(*steps))


def draw_problem(rng: Random, steps: int) -> WordProblem:
    who, friend = rng.sample(NAMES, 2)
    words = {"who": who, "friend": friend, "things": rng.choice(THINGS)}
    now = rng.randint(5, 60)
    told = [rng.choice(OPENINGS).format(n=now, **words)]
    work = ["{who} starts with {n} {things}.".format(n=now, **words)]
    for _ in range(steps):
        sign, n, result = _draw_step(rng, now)
        event, doing = rng.choice(EVENTS[sign])
        told.append(f"{rng.choice(LINKS)} {event.format(n=n, **words)}.")
        work.append(f"After {doing.format(n=n, **words)}, that makes {now} {sign} {n} = {result}.")
        now = result
    told.append(rng.choice(QUESTIONS).format(**words))
    return WordProblem(" ".join(told), " ".join(work), now)


def answer_of(text: str) -> int | None:
    """The number after the last "Answer:"; without one the last number, so that a model which has never seen this
    form is judged by its sums. None where there is no number.
    """
    _, _, end = text.rpartition("Answer:")
    number = re.search(r"\d+", end) if "Answer:" in text else None
    numbers = [number[0]] if number else re.findall(r"\d+", text)
    return int(numbers[-1]) if numbers else None


def _draw_step(rng: Random, now: int) -> tuple[str, int, int]:
    """(sign, number, result); results are whole and from 1 to LARGEST."""
    while True:
        sign = rng.choice("++--*/")  # mostly sums: products soon leave the range
        n = rng.randint(2, 4) if sign in "*/" else rng.randint(2, 30)
        if sign == "/" and now % n:
            continue
        result = {"+": now + n, "-": now - n, "*": now * n, "/": now // n}[sign]
        if 1 <= result <= LARGEST:
            return sign, n, result
