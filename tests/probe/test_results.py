"""Groups, intervals, drops and the JSON form, against scipy and by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from random import Random

import pytest
from scipy.stats import binomtest

from qkguard.errors import QKGuardError
from qkguard.probe.results import AttentionMass, ProbeResult
from qkguard.probe.retrieval import RetrievalScores
from qkguard.probe.samples import plan

CELLS = plan(["s1", "s2"], [256, 512], 5, 4)


def result(correct: list[bool], **options: object) -> ProbeResult:
    logprob = tuple(-0.1 if c else -2.0 for c in correct)
    return ProbeResult(CELLS, tuple(correct), logprob, {"digest": "x", "forms": {}}, **options)  # type: ignore[arg-type]


def test_groups() -> None:
    found = result([c.length == 256 or (c.task == "single_1" and c.depth < 0.5) for c in CELLS])
    groups = found.by("task", "length")
    assert {k: g.recall for k, g in groups.items()} == {
        ("single_1", 256): 1.0,
        ("single_1", 512): 0.4,
        ("single_2", 256): 1.0,
        ("single_2", 512): 0.0,
    }
    assert groups["single_1", 512].answer_logprob == pytest.approx(0.4 * -0.1 + 0.6 * -2)
    assert found.by("length", "depth")[512, 0.25].recall == 0.5
    assert found.recall == 48 / 80 and found.total.count == 80


def test_json_and_back() -> None:
    distance = {256: [[10.0, 20.0], [30.0, 100.0]]}
    mass = AttentionMass(8, (1, 3), {256: [[0.1, 0.2], [0.3, 0.4]]}, {256: [[0.5, 0.6], [0.7, 0.8]]}, distance)
    scores = RetrievalScores(("layers.1.attn", "layers.3.attn"), [[0.1, 0.2], [0.3, 0.4]], [], 27)
    found = result(
        [i % 3 == 0 for i in range(80)],
        attention=mass,
        seconds=1.5,
        other_formats=2,
        generated={"recall": 0.5},
        retrieval=scores,
    )
    text = json.dumps(found.to_json(), allow_nan=False)
    assert ProbeResult.from_json(json.loads(text)) == found
    assert mass.mean("needle") == pytest.approx(0.25) and mass.strongest() == 0.4
    assert mass.mean("distance") == 40 and mass.by_layer("distance", 256) == [15, 65]
    older = json.loads(text)
    del older["retrieval"], older["attention"]["distance"]
    read = ProbeResult.from_json(older)
    assert read.retrieval is None and read.attention == replace(mass, distance={})
    broken = replace(found, logprob=(math.nan, *found.logprob[1:]))
    again = ProbeResult.from_json(json.loads(json.dumps(broken.to_json(), allow_nan=False)))
    assert math.isnan(again.logprob[0]) and again.logprob[1:] == found.logprob[1:] and again.not_finite == 1
    with pytest.raises(QKGuardError, match="version 99"):
        ProbeResult.from_json({**found.to_json(), "version": 99})


def test_a_drop_is_paired_and_tested() -> None:
    rng = Random(0)
    before = [rng.random() < 0.9 for _ in CELLS]
    now = [b and i % 4 != 0 for i, b in enumerate(before)]
    drop = result(now).drop_since(result(before))
    lost = sum(b and not n for b, n in zip(before, now, strict=True))
    assert drop.drop == pytest.approx(lost / 80) and 0 < drop.low < drop.drop < drop.high
    assert drop.p_value == pytest.approx(binomtest(lost, lost, alternative="greater").pvalue)
    assert drop.is_alarming(0.1) and not drop.is_alarming(0.5)


def test_noise_does_not_alarm() -> None:
    rng = Random(1)
    truth = [rng.random() < 0.7 for _ in CELLS]
    swapped = [not t if i in (3, 8, 20, 33, 40, 41) else t for i, t in enumerate(truth)]
    drop = result(swapped).drop_since(result(truth))
    lost = sum(b and not n for b, n in zip(truth, swapped, strict=True))
    assert drop.p_value == pytest.approx(binomtest(lost, 6, alternative="greater").pvalue)
    assert not drop.is_alarming(0.0)
    same = result(truth).drop_since(result(truth))
    assert (same.drop, same.p_value, same.count) == (0, 1, 80)
    assert same.low == pytest.approx(-0.0338, abs=1e-4) and same.high == -same.low, "80 samples are no certainty"


def test_a_drop_at_one_length_is_seen_there() -> None:
    before = [True] * 80
    now = [c.length == 256 or c.index > 0 for c in CELLS]
    drop = result(now).drop_since(result(before), length=512)
    assert drop.drop == pytest.approx(0.25) and drop.is_alarming(0.2)
    assert not result(now).drop_since(result(before), length=256).is_alarming(0.0)
    with pytest.raises(QKGuardError, match="probe has no samples"):
        result(now).drop_since(result(before), length=7)


def test_different_samples_are_not_compared() -> None:
    other = replace(result([True] * 80), settings={"digest": "y"})
    with pytest.raises(QKGuardError, match="different samples"):
        other.drop_since(result([True] * 80))


def test_probes_of_some_of_the_samples_are_compared_on_those_that_both_have() -> None:
    before = replace(result([True] * 80), settings={"digest": "x", "origin": "o"})
    now = replace(result([c.length == 256 for c in CELLS]), settings={"digest": "y", "origin": "o"})
    fewer = now.only([c for c in CELLS if c.index < 2 and c.length == 512] + [CELLS[0]])
    assert len(fewer.sample_keys) == 21 and fewer.recall == pytest.approx(1 / 21)
    drop = fewer.drop_since(before)
    assert (drop.count, drop.lost, drop.gained, drop.before) == (21, 20, 0, 1.0)
    assert fewer.change_since(before)["count"] == 21 and fewer.change_since(before)["value"] == pytest.approx(-20 / 21)
    for other in ({"digest": "x", "origin": "p"}, {"digest": "x"}):
        with pytest.raises(QKGuardError, match="different samples"):
            fewer.drop_since(replace(before, settings=other))
    with pytest.raises(QKGuardError, match="different samples"):
        now.only(CELLS[:1]).drop_since(before.only(CELLS[1:]))
    assert now.only(CELLS) is now
