# ruff: noqa: SIM905 - word lists read better as text than as Python lists
"""The words of the probe: needle keys, and generated prose for haystacks that nobody supplied.

Everything is drawn from short built-in lists through a `random.Random` the caller owns, so a probe needs no download
and never touches the global random state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

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

# The grammar of the generated prose. A closed vocabulary of some 160 words: a tokenizer trained on a small model's
# own data can hold all of it. No digit, and none of "special", "magic", "number", occurs.
_QUALITIES = "old young tall quiet busy tired kind small".split()
_PEOPLE = (
    "farmer teacher baker sailor doctor painter miller writer traveler neighbor child merchant student singer".split()
)
_ACTS = {
    "walked": "to",
    "returned": "to",
    "hurried": "to",
    "stayed": "near",
    "waited": "near",
    "worked": "near",
    "slept": "near",
    "rested": "by",
}
_PLACES = "market river station church field mill road village hill house library lake shop school square wall".split()
_HANDLINGS = "carried found painted repaired sold bought forgot kept lost moved".split()
_THINGS = "book letter boat chair cart coat door lamp table stone map bread clock box plate rope".split()
_LOOKS = "heavy white dark warm broken empty narrow bright clean wooden".split()
_TIMES = (
    "in the morning",
    "before noon",
    "after the rain",
    "late in the evening",
    "on most days",
    "when the wind rose",
    "at the end of the week",
    "for many years",
    "during the winter",
    "long ago",
)
_THOUGHTS = "said believed knew hoped wrote remembered".split()
_WEATHER = (
    "the snow was deep",
    "the light was fading",
    "the bells were ringing",
    "the streets were empty",
    "the harvest was good",
    "the night was cold",
)
_LINKS = "because while although and but so".split()


def key(rng: Random) -> str:
    """A needle key in RULER's form, e.g. "silent-harbor"."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def prose(rng: Random) -> Iterator[str]:
    """Endless plain English sentences, about ten words each, ending in full stops."""
    while True:
        yield _sentence(rng)


def vocabulary() -> list[str]:
    """Every word that `key` and `prose` can produce, lower case, sorted."""
    lists: list[str] = [*ADJECTIVES, *NOUNS, *_QUALITIES, *_PEOPLE, *_PLACES, *_HANDLINGS, *_THINGS, *_LOOKS]
    lists += [*_ACTS, *_ACTS.values(), *_THOUGHTS, *_LINKS, *_TIMES, *_WEATHER, "the that and"]
    return sorted(set(re.findall(r"[a-z]+", " ".join(lists))))


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
        act = rng.choice(list(_ACTS))
        return f"{_someone(rng)} {act} {_ACTS[act]} the {rng.choice(_PLACES)}"
    return f"{_someone(rng)} {rng.choice(_HANDLINGS)} the {rng.choice(_LOOKS)} {rng.choice(_THINGS)}"


def _someone(rng: Random) -> str:
    person = rng.choice(_PEOPLE)
    return f"the {rng.choice(_QUALITIES)} {person}" if rng.random() < 0.4 else f"the {person}"
