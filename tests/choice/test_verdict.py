"""What the words of a verdict say beside its recommendation: how far it reaches, what it costs, how sure that is."""

from __future__ import annotations

import pytest

from qkguard.choice.candidates import Candidate, method_candidates
from qkguard.choice.task import TaskResult
from qkguard.choice.verdict import Measurement, Verdict
from qkguard.probe.results import ProbeResult
from qkguard.probe.samples import SampleKey

RAW = Candidate("raw", "raw")
RESTORE, HALF = method_candidates("restore,interpolate:alpha=0.5")
KEYS = tuple(SampleKey(length, "single_2", 0.5, i) for length in (256, 4096) for i in range(20))


def measured(point: Candidate, hits: int, nll: list[float] | None = None) -> Measurement:
    probe = ProbeResult(KEYS, tuple(i < hits for i in range(40)), (0.0,) * 40, {"digest": "x"})
    return Measurement(point, probe, None if nll is None else TaskResult(tuple(nll), (2,) * len(nll), None))


def noisy(mean: float, spread: float) -> list[float]:
    return [2 * (mean + spread * (-1) ** i) for i in range(50)]


def test_the_words_name_the_longest_length_and_what_the_loss_is_of() -> None:
    points = [measured(RAW, 10, noisy(1.0, 0)), measured(RESTORE, 30, noisy(1.01, 0))]
    said = Verdict.of(points, 0.02, "50 rows of the evaluation set").words
    assert said[-1] == "Recommended: restore."
    assert said[-2] == (
        "Task loss of restore is +0.010 against raw (95% +0.010 to +0.010, 50 rows of the evaluation set)."
    )
    assert said[-3] == "Recall was measured up to 4,096 tokens; beyond that nothing is known."


def test_rows_too_few_to_judge_the_tolerance_by_say_so() -> None:
    points = [measured(RAW, 10, noisy(1.0, 0)), measured(RESTORE, 30, noisy(1.01, 0.2))]
    verdict = Verdict.of(points, 0.02, "50 rows")
    assert verdict.recommended.name == "restore"
    assert "cannot rule out that it costs more than the tolerance of 0.02" in verdict.words[-2]
    sure = [measured(RAW, 10, noisy(1.0, 0)), measured(RESTORE, 30, noisy(1.01, 0.001))]
    assert "cannot rule out" not in Verdict.of(sure, 0.02, "50 rows").words[-2]


def test_without_rows_recall_alone_decides_and_no_price_is_named() -> None:
    verdict = Verdict.of([measured(RAW, 10), measured(RESTORE, 30), measured(HALF, 25)], 0.02)
    assert verdict.recommended.name == "restore" and verdict.metric is None
    assert not any("Task" in sentence for sentence in verdict.words) and "loss" not in verdict.rule
    raw_wins = Verdict.of([measured(RAW, 30), measured(RESTORE, 30)], 0.02)
    assert raw_wins.recommended.name == "raw" and "No point has more recall" in raw_wins.words[-1]


def test_points_as_json() -> None:
    points = [measured(RAW, 10, noisy(1.0, 0)), measured(RESTORE, 30, noisy(1.5, 0))]
    verdict = Verdict.of(points, 0.02, "50 rows")
    raw, restore = (point.to_json(0.02) for point in verdict.points)
    assert restore["gain"]["value"] == pytest.approx(0.5) and restore["task"]["loss"] == pytest.approx(1.5)
    assert raw["task"]["within_tolerance"] and not restore["task"]["within_tolerance"]
    assert verdict.recommended.name == verdict.summary()["recommended"] == "raw"
    assert restore["recall_by_length"] == {"256": 1.0, "4096": 0.5}
