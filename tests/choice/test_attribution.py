"""What attribution says of measurements made up for it: yes, in part, no, nothing lost, and where the task sits."""

from __future__ import annotations

from typing import Any

import pytest

from qkguard.choice.attribution import Attribution, attribute, states_to_measure
from qkguard.choice.candidates import Candidate
from qkguard.choice.groups import TITLES, WeightGroup
from qkguard.choice.task import TaskResult
from qkguard.choice.verdict import Measurement, compare
from qkguard.probe.results import ProbeResult
from qkguard.probe.samples import SampleKey
from qkguard.probe.statistics import paired_interval

KEYS = tuple(SampleKey(256, "single_2", 0.5, i) for i in range(40))
GROUPS = [WeightGroup(key, (), 0) for key in ("qk", "vo", "mlp", "norms")]


def measured(hits: int, nll: float | None = None) -> tuple[ProbeResult, TaskResult | None]:
    probe = ProbeResult(KEYS, tuple(i < hits for i in range(40)), (0.0,) * 40, {"digest": "x"})
    return probe, None if nll is None else TaskResult((nll,) * 30, (2,) * 30, None)


def attributed(
    back: dict[str, int], alone: dict[str, int], base: int = 40, raw: int = 10, losses: dict[str, float] | None = None
) -> Attribution:
    """Hits of 40 with each changed group taken back, and with all others taken back."""

    def loss(key: str) -> float | None:
        return None if losses is None else losses[key]

    every = frozenset(back)
    states: dict[frozenset[str], Any] = {frozenset({key}): measured(hits, loss(key)) for key, hits in back.items()}
    for key, hits in alone.items():
        states.setdefault(every - {key}, measured(hits, loss("base")))
    whole = [Measurement(Candidate(k, k), *measured(hits, loss(k))) for k, hits in (("raw", raw), ("base", base))]
    compare(whole, 0)
    return attribute(GROUPS, every, states, whole[1], whole[0], 0)


BACK, ALONE = {"qk": 10, "vo": 10, "mlp": 10}, {"qk": 40, "vo": 40, "mlp": 40}


@pytest.mark.parametrize(
    ("back", "alone", "cause", "answer"),
    [
        ({"qk": 38}, {"qk": 12}, ["qk"], "? Yes: taken back alone they bring back 93% of the lost recall (0.250 to "),
        ({"qk": 38}, {"qk": 40}, [], "? In part: taken back alone they bring back 93%"),
        ({"qk": 10}, {"qk": 12}, [], "? In part: SFT's, put into the base alone, lose 93% of it (1.000 to 0.3"),
        ({"mlp": 40}, {"mlp": 10}, ["mlp"], "? No: taken back alone they bring back none beyond noise"),
        ({"qk": 25, "mlp": 38}, {"qk": 25, "mlp": 12}, ["mlp", "qk"], "? In part: taken back alone they bring back 5"),
        ({"qk": 38, "mlp": 25}, {"qk": 12, "mlp": 25}, ["qk", "mlp"], "? Yes: "),
        ({}, {}, [], "? No: "),
    ],
)  # fmt: skip
def test_is_it_queries_and_keys(back: dict[str, int], alone: dict[str, int], cause: list[str], answer: str) -> None:
    found = attributed(BACK | back, ALONE | alone)
    assert found.cause == cause
    assert found.words[0].startswith("Is it queries and keys") and answer in found.words[0]
    others = [key for key in cause if key != "qk"]
    also = "also " if cause[:1] == ["qk"] else ""
    assert [text.partition(":")[0] for text in found.words[1:] if text.startswith("It is")] == [
        f"It is {also}{TITLES[key]}" for key in others
    ]
    assert any("No group alone" in text for text in found.words) is not bool(cause)


def test_effects_are_paired_differences_on_the_same_samples() -> None:
    found = attributed(BACK | {"qk": 30}, ALONE | {"qk": 15})
    qk, norms = found.of("qk"), found.of("norms")
    assert qk is not None and norms is not None and found.of("mixers") is None
    low, high = paired_interval(0, 20, 40)
    assert (qk.brings.value, qk.brings.low, qk.brings.high) == (0.5, -high, -low)
    low, high = paired_interval(25, 0, 40)
    assert (qk.costs.value, qk.costs.low, qk.costs.high) == (0.625, low, high)
    assert norms.back is None and not norms.explains and norms.brings.value == 0
    data = {group["key"]: group for group in found.to_json(0.02)["groups"]}
    assert (
        not data["norms"]["changed"] and data["norms"]["taken_back"] is None and data["qk"]["costs"]["value"] == 0.625
    )


def test_nothing_to_attribute_and_nothing_to_see() -> None:
    (kept,) = attributed(BACK, ALONE, base=40, raw=40).words
    assert kept.startswith("SFT cost no recall beyond noise (1.000 before, 1.000 after)")
    assert attributed({"qk": 38}, {"qk": 12}, base=12, raw=10).cause == []
    (floor,) = attributed(BACK, ALONE, base=0, raw=0).words
    assert "The base finds no needles here" in floor
    assert len(attributed(BACK, ALONE).words) > 1


def test_queries_and_keys_that_sft_left_alone() -> None:
    found = attributed({"mlp": 40}, {"mlp": 10})
    assert found.words[0] == "Is it queries and keys? No: SFT did not change them." and found.cause == ["mlp"]
    assert "It is MLPs" in found.words[1]


def test_where_the_task_sits() -> None:
    losses = {"raw": 1.0, "base": 4.0, "qk": 1.02, "vo": 1.2, "mlp": 2.5}
    said = attributed(BACK | {"qk": 38}, ALONE | {"qk": 12}, losses=losses).words[-1]
    assert said.startswith(
        "Of what SFT taught, taking back MLPs, experts and routers costs most, task loss +0.750 (95%"
    )
    assert "queries and keys task loss +0.010" in said
    assert "taught" not in attributed(BACK | {"qk": 38}, ALONE | {"qk": 12}).words[-1]


def test_no_state_is_measured_twice() -> None:
    assert states_to_measure(["qk"]) == [frozenset({"qk"})]
    assert states_to_measure(["a", "b"]) == [frozenset("a"), frozenset("b")]
    assert len(states_to_measure(["a", "b", "c"])) == 6 and states_to_measure([]) == []
