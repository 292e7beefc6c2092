"""How many samples a training affords: which ones, by what estimate, and in what words."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from qkguard.probe.samples import plan
from qkguard.probe.thinning import Size, size_of, thin
from qkguard.training.probe_plan import make_plan, row_length, work, work_of, work_of_step
from qkguard.training.schedules import saves_between
from tests.support.training import token_rows

KEYS = plan(["single_2", "multikey_1", "multikey_2"], [512, 1024, 2048, 8192, 16384], 5, 2)


def test_fewer_samples_are_spread_over_tasks_depths_and_lengths() -> None:
    assert size_of(KEYS) == Size(5, 10) and thin(KEYS, Size(5, 10)) == KEYS
    for rounds in range(1, 10):
        kept = thin(KEYS, Size(4, rounds))
        assert len(kept) == 4 * 3 * rounds and set(kept) <= set(thin(KEYS, Size(4, rounds + 1)))
        assert set(Counter((key.length, key.task) for key in kept).values()) == {rounds}
        depths = Counter(key.depth for key in kept)
        assert len(depths) == 5 and max(depths.values()) <= 2 * min(depths.values()), "depths are left out"
    assert {key.length for key in thin(KEYS, Size(2, 3))} == {512, 1024}


def planned(allowed: float, keys: Any = KEYS, passes: int = 4) -> Any:
    """A plan where a token takes a second and `allowed` seconds may be spent."""
    return make_plan(
        keys,
        lambda keys: float(sum(key.length for key in keys)),
        passes=passes,
        at_least=3,
        training=allowed * 50,
        share=0.02,
        spent=0.0,
    )


def test_samples_go_first_then_lengths_and_thirty_stay() -> None:
    whole = 4 * sum(key.length for key in KEYS)
    sizes = [planned(whole * share).size for share in (1, 0.6, 0.31, 0.29, 0.1, 0.05)]
    assert sizes[0] == Size(5, 10) and sizes[1] == Size(5, 6) and sizes[2] == Size(5, 3)
    assert sizes[3] == Size(4, 6), "without the longest there is room for more samples again"
    assert sizes[4:] == [Size(3, 7), Size(2, 9)]
    assert all(planned(whole * share).fits for share in (1, 0.6, 0.31, 0.29, 0.1, 0.05))
    nothing = planned(1)
    assert not nothing.fits and nothing.size == Size(1, 10) and len(thin(KEYS, nothing.size)) == 30
    few = planned(1, plan(["s1"], [512, 1024], 2, 2))
    assert not few.fits and few.size == Size(2, 4), "what has fewer than thirty samples is not cut"


def test_every_task_and_length_keeps_eight_samples() -> None:
    keys = plan(["s1", "mk1"], [256, 512, 1024, 2048], 4, 8)
    for seconds in (8e5, 4e5, 2e5, 1e5, 5e4):
        kept = thin(keys, planned(seconds, keys).size)
        for name in ("task", "length"):
            assert min(Counter(getattr(key, name) for key in kept).values()) >= 8
        assert len(kept) >= 30


def test_what_is_cut_and_what_it_costs_is_said() -> None:
    assert planned(1e9).tell(KEYS) is None
    cut = planned(1e6).tell(KEYS)
    assert cut and "cut to 84 of 150 samples (512 to 8,192 tokens)" in cut
    assert "probe_budget=0.02 of a training of about 50000000 s: 4 passes" in cut
    none = planned(1).tell(KEYS)
    assert none and "3 passes over 30 of 150 samples (512 tokens)" in none and "46080.0 s in all" in none
    assert "probe_steps=0" in none and "probe_budget=None all" in none


def test_ranks_share_the_work_and_attention_grows_with_the_square() -> None:
    keys = plan(["s1"], [512], 5, 1)
    assert work_of(keys, 64, 2) == 3 * work(512, 64), "5 samples on 2 ranks"
    assert work_of(keys, 64, 1) == 5 * work(512, 64) and work_of(keys, 64, 100) == work(512, 64)
    assert work(8192, 4096) < 2.2 * work(4096, 4096) and work(8192, 64) > 3.5 * work(4096, 64)


def test_a_step_is_three_forward_passes_over_the_rows_that_there_are() -> None:
    args: Any = SimpleNamespace(gradient_checkpointing=False, max_length=16)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = 2, 3
    rows = token_rows(48)
    lengths = [min(16, len(row["input_ids"])) for row in rows]
    assert row_length(rows, args) == round(sum(lengths) / len(lengths)) < 16
    assert row_length(iter(rows), args) == 16, "a stream is not used up"
    assert work_of_step(args, 100, 64) == pytest.approx(3 * 6 * work(100, 64))
    args.gradient_checkpointing = True
    assert work_of_step(args, 100, 64) == pytest.approx(4 * 6 * work(100, 64))


@pytest.mark.parametrize(
    ("strategy", "first", "expected"),
    [("no", 0, 0), ("steps", 0, 9), ("steps", 45, 5), ("epoch", 0, 3), ("best", 0, 4)],
)
def test_the_saves_to_come(strategy: str, first: int, expected: int) -> None:
    args = SimpleNamespace(save_strategy=strategy)
    state = SimpleNamespace(save_steps=10, eval_steps=20, max_steps=100, num_train_epochs=4)
    assert saves_between(args, state, first, 100) == expected
