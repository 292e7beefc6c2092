"""Drift that is worked out beside the next step: the same numbers, of the same steps, before anything reads them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import optimizer
from transformers import TrainerCallback

from qkguard import QKGuardCallback, restored
from qkguard.distributed import ranks
from qkguard.distributed.reference import Reference
from qkguard.layout import find_attention, select
from qkguard.training.drift_monitor import DriftMonitor
from qkguard.training.side_stream import SideStream
from tests.support.judge import metrics_rows
from tests.support.models import noised, tiny_model
from tests.support.training import arguments, make_trainer, save_base, token_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "llama", "llama")


def guard(**options) -> QKGuardCallback:
    return QKGuardCallback(**{"strict": True, "probe_steps": 0, "routing_drift_steps": 0} | options)


@pytest.fixture
def beside(monkeypatch) -> None:
    """As on an accelerator, but the work is done when it is begun."""
    monkeypatch.setattr(SideStream, "goes_beside", property(lambda side: side._steps_seen))


def drift_rows(run: Path) -> list[dict]:
    there = (run / "_qkguard/metrics.jsonl").exists()
    rows = [row for row in metrics_rows(run) if "qkguard/drift/q_rel" in row] if there else []
    return [{key: value for key, value in row.items() if "overhead" not in key} for row in rows]


class Look(TrainerCallback):
    """Of which steps there is drift in the file when a step has ended; stands behind the guard."""

    def __init__(self, run: Path, save_after: int | None = None) -> None:
        self.run, self.save_after, self.seen = run, save_after, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append([row["step"] for row in drift_rows(self.run)])
        if state.global_step == self.save_after:
            control.should_save = True


def trained(base: Path, folder: Path, own: QKGuardCallback | None = None, after: int | None = None, **options) -> Look:
    look = Look(folder / "run", after)
    args = arguments(folder, **{"max_steps": 5, "save_steps": 3} | options)
    trainer = make_trainer(base, args, own or guard())
    trainer.add_callback(look)
    trainer.train()
    return look


def test_rows_are_those_of_measuring_at_once(base, tmp_path, monkeypatch):
    at_once = trained(base, tmp_path / "at once")
    monkeypatch.setattr(SideStream, "goes_beside", property(lambda side: side._steps_seen))
    later = trained(base, tmp_path / "beside")
    assert at_once.seen == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert later.seen == [[], [1], [1, 2, 3], [1, 2, 3], [1, 2, 3, 4, 5]]  # a save follows 3, and nothing follows 5
    assert drift_rows(tmp_path / "beside/run") == drift_rows(tmp_path / "at once/run")
    trained(base, tmp_path / "other", learning_rate=1e-3)
    assert drift_rows(tmp_path / "other/run") != drift_rows(tmp_path / "at once/run")


def test_a_save_that_nobody_announced_has_the_drift_of_its_step(base, tmp_path, beside):
    """Another callback asks for it when the measurement is already under way."""
    trained(base, tmp_path, after=4, save_steps=100)
    manifest = json.loads((tmp_path / "run/checkpoint-4/qk_restored/qkguard.json").read_text())
    assert manifest["drift"]["step"] == 4
    (row,) = [row for row in drift_rows(tmp_path / "run") if row["step"] == 4]
    assert manifest["drift"]["qkguard/drift/q_rel"] == row["qkguard/drift/q_rel"] > 0


class Later:
    """Work that is done as late as a stream may do it: when somebody waits for it, or reads what it found."""

    def __init__(self, work) -> None:
        self.work, self.found = work, None

    @torch.no_grad()
    def result(self):
        self.found = self.work() if self.found is None else self.found
        return self.found


@pytest.fixture
def late(beside, monkeypatch) -> None:
    """As on an accelerator that has no time for the guard until it must."""
    sums = DriftMonitor._sums

    def run(side, work):
        side._done = Later(work)
        return side._done

    def wait(side):
        if side._done is not None:
            side._done.result()
            side._done = None

    monkeypatch.setattr(SideStream, "run", run)
    monkeypatch.setattr(SideStream, "wait", wait)
    monkeypatch.setattr(DriftMonitor, "_sums", lambda monitor, started: sums(monitor, started.result()))


class Doubles(TrainerCallback):
    """Doubles all weights while an epoch ends, as an optimizer without a schedule does for an evaluation."""

    def on_epoch_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(2.0)


class Swaps(TrainerCallback):
    """Has restored weights in the model for a while at the end of every step; stands behind the guard."""

    def __init__(self, own: QKGuardCallback) -> None:
        self.guard = own

    def on_step_end(self, args, state, control, model, **kwargs):
        session = self.guard.session
        with restored(model, session.reference):
            session.drift.monitor.side.wait()


@pytest.mark.parametrize("behind", ["doubles", "swaps"])
def test_what_changes_weights_behind_the_guard_finds_nothing_under_way(base, tmp_path, request, behind):
    def rows(name: str) -> list[dict]:
        own = guard()
        args = arguments(tmp_path / name, max_steps=6, save_steps=100)
        trainer = make_trainer(base, args, own, train_dataset=token_rows(6))  # three steps an epoch
        trainer.add_callback(Doubles() if behind == "doubles" else Swaps(own))
        trainer.train()
        return drift_rows(tmp_path / name / "run")

    at_once = rows("at once")
    request.getfixturevalue("late")
    later = rows("late")
    assert [row["step"] for row in at_once] == [1, 2, 3, 4, 5, 6, 6], "every step, and the end"
    assert later == at_once
    assert all(row["qkguard/drift/q_rel"] > 0 for row in later)


def test_what_fails_is_told_for_its_step_and_training_goes_on(base, tmp_path, beside, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("boom")

    monkeypatch.setattr("qkguard.training.drift_monitor.difference_sums", broken)
    logging.getLogger("qkguard").propagate = True
    with caplog.at_level(logging.ERROR, logger="qkguard"):
        trained(base, tmp_path, guard(strict=False))
    told = [record.getMessage() for record in caplog.records]
    assert [f"Measuring drift at step {n} failed: RuntimeError: boom" in line for n, line in enumerate(told, 1)][:5]
    assert len(told) == 6, "every step, and the end"
    with pytest.raises(RuntimeError, match="boom"):
        trained(base, tmp_path / "strict")


def test_nothing_goes_beside_where_the_optimizer_does_not_announce_its_steps(base, tmp_path, beside, monkeypatch):
    monkeypatch.setattr(SideStream, "_before_step", lambda *_: None)
    assert trained(base, tmp_path).seen == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]]


def test_no_hook_is_left_on_optimizers(base, tmp_path):
    before, seen = dict(optimizer._global_optimizer_pre_hooks), []

    class During(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(len(optimizer._global_optimizer_pre_hooks) - len(before))

    trainer = make_trainer(base, arguments(tmp_path), guard())
    trainer.add_callback(During())
    trainer.train()
    assert optimizer._global_optimizer_pre_hooks == before and set(seen) == {1}


def test_joined_weights_give_the_numbers_of_each(monkeypatch):
    """The way of accelerators, run on the CPU: rows of several weights, added up for the right ones."""
    model = tiny_model("qwen3_next")
    monitor = DriftMonitor(Reference.take(model, select(find_attention(model), QKGuardCallback().config.rows)))
    noised(model, seed=3, scale=1e-3)
    want = monitor.measure(model, ranks.Deferred("measuring drift"))[0]
    monkeypatch.setattr("qkguard.training.drift_monitor._on_accelerator", lambda pieces: True)
    assert monitor.measure(model, ranks.Deferred("measuring drift"))[0] == pytest.approx(want, rel=1e-5)
    noised(model, seed=4, scale=1e-4)
    assert monitor.measure(model, ranks.Deferred("measuring drift"))[0] != pytest.approx(want, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("listens", [True, False])
def test_weights_wait_for_what_reads_them(listens):
    """A slow reader beside a step; without the wait it would see the weights of the next one."""
    weight = nn.Parameter(torch.zeros(1 << 20, device="cuda"))
    sgd = torch.optim.SGD([weight], lr=1.0)
    side = SideStream()
    if listens:
        side.listen()

    def slow() -> torch.Tensor:
        torch.cuda._sleep(500_000_000)  # a quarter of a second of cycles
        return weight.detach().clone()

    seen = side.run(slow)
    weight.grad = torch.ones_like(weight)
    sgd.step()
    torch.cuda.synchronize()
    side.close()
    assert float(seen.abs().max()) == (0.0 if listens else 1.0) and float(weight.detach().max()) == -1.0


@pytest.mark.gpu
def test_numbers_on_a_gpu_are_of_the_weights_before_the_next_step():
    """bfloat16 weights of several chunks; the twin begins after the step."""
    model = tiny_model("llama", hidden_size=4096, num_attention_heads=32, head_dim=128).bfloat16().cuda()
    reference = Reference.take(model, select(find_attention(model), QKGuardCallback().config.rows))
    monitor, sgd = DriftMonitor(reference), torch.optim.SGD(model.parameters(), lr=1e-2)
    monitor.side.listen()

    def step() -> None:
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        sgd.step()

    step()
    at_once = monitor.measure(model, ranks.Deferred("measuring drift"))[0]
    started = monitor.start(model)
    step()
    assert monitor.finish(started, ranks.Deferred("measuring drift")) == at_once
    assert monitor.finish(monitor.start(model), ranks.Deferred("measuring drift")) != at_once
    monitor.side.close()

    kept = {name: whole.cuda().double() for name, whole in reference.slices.items()}
    for name, value in monitor.measure(model, ranks.Deferred("measuring drift"))[0].items():
        if name.endswith("layer_1/q_rel"):
            w0 = kept["model.layers.1.self_attn.q_proj.weight"]
            w = model.model.layers[1].self_attn.q_proj.weight.detach().reshape(-1).double()
            assert abs(value / float((w - w0).norm() / w0.norm()) - 1) < 1e-6
            break
    else:
        raise AssertionError("no drift of layer 1")
