"""Recall probes in a training of one process: when they run, what they cost, when they warn, and what they leave."""

from __future__ import annotations

import itertools
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM

from qkguard import QKGuardCallback, QKGuardConfig, QKGuardError, restored
from qkguard.offline.task_rows import find_rows, sampled
from qkguard.probe.prober import Prober
from qkguard.probe.results import ProbeResult, alarm
from qkguard.probe.samples import plan
from qkguard.probe.settings import default_lengths, lengths_left_out
from qkguard.training.metrics_log import MetricsLog
from qkguard.training.probe_setup import training_prose, why_not
from qkguard.training.recall_monitor import RecallMonitor
from qkguard.training.schedules import Budget, interval
from tests.support import judge
from tests.support.models import tiny_model
from tests.support.probing import bpe_tokenizer
from tests.support.training import arguments, save_base, train

PROBES: dict[str, Any] = {
    "probe_lengths": [192],
    "probe_depths": 2,
    "probe_samples": 1,
    "probe_tasks": ["s1"],
    "probe_budget": None,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    return save_base(folder, "llama", vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256)


def probed(base: Path, folder: Path, guard: QKGuardCallback | None, resume: bool = False, **options: Any) -> Any:
    settings = {"save_strategy": "no", **options}
    model = AutoModelForCausalLM.from_pretrained(base, attention_dropout=0.2)
    args = arguments(folder, **settings)
    return train(base, args, guard, model=model, processing_class=bpe_tokenizer(), resume=resume)


def recalls(folder: Path, suffix: str = "") -> list[tuple[int, float]]:
    key = f"qkguard/niah{suffix}/answer_logprob"
    return [(row["step"], row[key]) for row in judge.metrics_rows(folder / "run") if key in row]


# -- pure parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "evaluates", "expected"),
    [("eval", True, None), ("eval", False, 100), (0.25, True, 250), (7, True, 7), (0.0001, False, 1)],
)
def test_interval(steps, evaluates, expected):
    assert interval(steps, evaluates, 1000) == expected


def simulate(budget: Budget, cost: float, step_seconds: float, every: int, steps: int) -> list[int]:
    done = []
    for step in range(every, steps, every):
        if budget.allows(cost, step * step_seconds, step / steps):
            budget.spent += cost
            done.append(step)
    return done


def test_budget_thins_evenly_and_is_kept():
    assert len(simulate(Budget(0.02, first=1, last=1), 1, 10, 100, 1000)) == 9, "2% of 10,000 s is plenty"
    budget = Budget(0.02, first=6, last=6)  # 20 s in all, 8 of them for probes on the way
    done = simulate(budget, 2, 1, 50, 1000)
    assert 3 <= len(done) <= 4 and budget.spent + 12 <= 20
    gaps = [b - a for a, b in itertools.pairwise(done)]
    assert max(gaps) - min(gaps) <= 50, f"not spread evenly: {done}"
    assert simulate(Budget(0.02, first=30, last=6), 2, 1, 50, 1000) == [], "the baseline counts"


def result(correct: list[bool], lengths: tuple[int, ...] = (512,)) -> ProbeResult:
    cells = plan(["s1"], lengths, 5, len(correct) // (5 * len(lengths)))
    assert len(cells) == len(correct)
    return ProbeResult(cells, tuple(correct), (-1.0,) * len(cells), {"digest": "same"})


def test_alarm_needs_a_fall_beyond_the_threshold_and_beyond_noise():
    before = result([True] * 30)
    assert alarm(result([False] * 12 + [True] * 18), before, 0.1)
    assert alarm(result([False] * 4 + [True] * 26), before, 0.1) is None, "4 of 30 may be noise"
    assert alarm(result([False] * 12 + [True] * 18), before, 0.5) is None, "below the threshold"
    assert alarm(before, result([False] * 12 + [True] * 18), 0.1) is None, "a rise"
    noisy = [i % 3 > 0 for i in range(60)]
    flipped = [not v if i % 4 == 0 else v for i, v in enumerate(noisy)]
    assert alarm(result(flipped), result(noisy), 0.1) is None, "as many gained as lost"


def test_alarm_sees_a_collapse_at_the_longest_length_that_the_mean_hides():
    before = result([False] * 20 + [True] * 80 + [True] * 20, (512, 1024, 2048, 4096))
    now = result([True] * 20 + [True] * 70 + [False] * 30, (512, 1024, 2048, 4096))
    assert now.recall > before.recall - 0.1
    found = alarm(now, before, 0.1)
    assert found and "4096" in found[0] and found[1].now == 0
    assert alarm(before, before, 0.1) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"probe_steps": "often"},
        {"probe_steps": "1.5"},
        {"probe_steps": -1},
        {"probe_lengths": []},
        {"probe_depths": 0},
        {"probe_budget": 0},
        {"recall_alert": 2},
        {"on_alert": "shout"},
        {"probe_tasks": ["s9"]},
        {"probe_tasks": []},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(QKGuardError, match=next(iter(wrong)).removesuffix("s").replace("probe_task", "task")):
        QKGuardConfig(**wrong)


def test_haystack_is_the_training_text_decoded():
    tokenizer = bpe_tokenizer()
    texts = [f"Row number {i} speaks of a river." for i in range(50)]
    rows = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
    prose = training_prose(rows, tokenizer)
    assert prose.origin == "training text" and set(prose.sentences) <= set(texts) and len(prose.sentences) > 20
    assert training_prose(iter(texts), tokenizer).origin == "generated", "a stream is not used up"
    assert [row["input_ids"] for row in sampled(rows, 40)] == rows[::2]["input_ids"], (
        "at most so many, from everywhere"
    )


# -- trainings -----------------------------------------------------------------------------------------------------


def test_probes_run_by_schedule_at_saves_and_at_both_ends(base, tmp_path):
    guard = QKGuardCallback(strict=True, probe_steps=2, **PROBES)
    probed(base, tmp_path, guard, max_steps=5, save_strategy="steps", save_steps=3)
    raw, swapped = recalls(tmp_path), recalls(tmp_path, "_restored")
    assert [step for step, _ in raw] == [0, 2, 3, 4, 5] and [step for step, _ in swapped] == [3, 5]
    assert len({value for _, value in raw}) == 5, "the weights moved, the probe did not"
    row = next(row for row in judge.metrics_rows(tmp_path / "run") if "qkguard/niah/recall" in row)
    assert {"qkguard/niah/single_1/192", "qkguard/attention/needle_mass", "qkguard/attention/local_mass"} <= set(row)
    assert row["qkguard/overhead/probe_seconds"] > 0 and row["niah_grid"][0]["depth"] == 0
    for step in (3, 5):
        manifest = json.loads((tmp_path / f"run/checkpoint-{step}/qk_restored/qkguard.json").read_text())["probe"]
        assert manifest["raw"]["step"] == manifest["restored"]["step"] == step
        assert manifest["raw"]["answer_logprob"] == dict(raw)[step]
        assert manifest["restored"]["answer_logprob"] == dict(swapped)[step]
        assert manifest["before"]["answer_logprob"] == raw[0][1]


def test_probes_follow_evaluations(base, tmp_path):
    rows = Dataset.from_list([{"input_ids": list(range(3, 15))}] * 4)
    guard = QKGuardCallback(strict=True, probe_restored=False, **PROBES)
    model = AutoModelForCausalLM.from_pretrained(base)
    args = arguments(tmp_path, max_steps=5, eval_strategy="steps", eval_steps=2, save_strategy="no")
    train(base, args, guard, model=model, processing_class=bpe_tokenizer(), eval_dataset=rows)
    assert [step for step, _ in recalls(tmp_path)] == [0, 2, 4, 5] and not recalls(tmp_path, "_restored")
    kept = [json.loads(line) for line in (tmp_path / "run/_qkguard/heldout.jsonl").read_text().splitlines()]
    assert kept == [{"input_ids": list(range(3, 15)), "labels": list(range(3, 15))}] * 4
    assert find_rows(tmp_path / "run/_qkguard/final/raw") == find_rows(tmp_path / "run") is not None
    assert find_rows(tmp_path) is None


def test_a_budget_that_is_used_up_leaves_out_probes_and_says_so_once(base, tmp_path, caplog):
    logging.getLogger("qkguard").propagate = True
    with caplog.at_level(logging.INFO, logger="qkguard"):
        guard = QKGuardCallback(strict=True, probe_steps=1, **PROBES | {"probe_budget": 0.02})
        probed(base, tmp_path, guard, max_steps=4, save_strategy="steps", save_steps=2)
    assert [step for step, _ in recalls(tmp_path)] == [0, 4], "the first and the last always run"
    assert len([r for r in caplog.records if "probe_budget" in r.getMessage()]) == 1


def test_the_first_probe_costs_its_pictures_too_and_makes_its_samples_in_the_form_found(base, tmp_path, monkeypatch):
    log, prepare, forms = MetricsLog.log, Prober.prepare, []

    def slow(self: MetricsLog, metrics: Any, step: int, details: Any = None) -> None:
        time.sleep(0.5 if details and "niah_grid" in details else 0)
        log(self, metrics, step, details)

    def watched(self: Prober, *args: Any) -> None:
        forms.append(dict(self.maker.formats))
        prepare(self, *args)

    monkeypatch.setattr(MetricsLog, "log", slow)
    monkeypatch.setattr(Prober, "prepare", watched)
    probed(base, tmp_path, guard := QKGuardCallback(strict=True, probe_restored=False, **PROBES), max_steps=1)
    probing = guard.session.recall_monitor
    budget = probing.training.budget
    assert min(budget.first, budget.last) > probing.baseline.seconds + 0.5
    assert forms[0] == {} and len(forms) == 3 and all(found.keys() == {"single_1"} for found in forms[1:])


class BoomError(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_training_is_bit_identical_with_probes_and_with_probes_that_raise(base, tmp_path, monkeypatch, caplog, fails):
    outcomes = []
    calls = []
    for guarded in (False, True):
        guard = QKGuardCallback(strict=not fails, probe_steps=1, **PROBES) if guarded else None
        if guarded and fails:
            monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", failing(calls))
        options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
        trainer = probed(base, tmp_path / str(guarded), guard, **options)
        weights = judge.weights_in_bits(tmp_path / str(guarded) / "run/checkpoint-3")
        outcomes.append((trainer.recorder.rows, weights, torch.get_rng_state().tolist()))
    assert len(outcomes[0][0]) == 3 and outcomes[0] == outcomes[1]
    assert len(calls) >= 3 if fails else [s for s, _ in recalls(tmp_path / "True")] == [0, 1, 2, 3]


def failing(calls: list[int]) -> Any:
    """A forward of llama's MLP that raises in the middle of every second probe's pass."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    original, seen = LlamaMLP.forward, []

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            seen.append(1)
            if len(seen) % 4 == 0:
                calls.append(1)
                raise BoomError("in the middle")
        return original(self, x)

    return forward


def test_a_failing_probe_is_told_and_strict_stops(base, tmp_path, monkeypatch, caplog):
    def broken(*args: Any, **options: Any) -> Any:
        raise BoomError("no luck")

    monkeypatch.setattr(Prober, "run", broken)
    logging.getLogger("qkguard").propagate = True
    trainer = probed(base, tmp_path / "on", QKGuardCallback(probe_steps=1, **PROBES), max_steps=2)
    assert trainer.state.global_step == 2
    told = [r.getMessage() for r in caplog.records if "BoomError: no luck" in r.getMessage()]
    assert told and all("probe_steps=0" in line for line in told)
    with pytest.raises(BoomError):
        probed(base, tmp_path / "strict", QKGuardCallback(probe_steps=1, strict=True, **PROBES), max_steps=2)


def test_a_resumed_run_takes_its_baseline_from_the_file(base, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    probed(base, tmp_path, QKGuardCallback(strict=True, probe_steps=2, **PROBES), **options)
    first = (tmp_path / "run/_qkguard/probe.json").read_text()
    for step in (4,):
        (tmp_path / f"run/checkpoint-{step}").rename(tmp_path / "aside")
    guard = QKGuardCallback(strict=True, probe_steps=2, **PROBES)
    probed(base, tmp_path, guard, resume=True, **options)
    probing = guard.session.recall_monitor
    assert probing.baseline == ProbeResult.from_json(json.loads(first)["baseline"])
    assert (tmp_path / "run/_qkguard/probe.json").read_text() == first
    assert [step for step, _ in recalls(tmp_path)] == [0, 2, 4]
    assert probing.baseline.answer_logprob != recalls(tmp_path)[-1][1]


def test_a_resumed_run_without_its_file_has_no_baseline_and_says_so(base, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2}
    probed(base, tmp_path, QKGuardCallback(strict=True, probe_steps=2, **PROBES), max_steps=2, **options)
    (tmp_path / "run/_qkguard/probe.json").unlink()
    logging.getLogger("qkguard").propagate = True
    guard = QKGuardCallback(strict=True, probe_steps=2, **PROBES)
    probed(base, tmp_path, guard, resume=True, max_steps=4, **options)
    assert guard.session.recall_monitor.baseline is None and recalls(tmp_path)[-1][0] == 4
    assert any("nothing to compare it with" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("on_alert", ["warn", "save", "stop"])
def test_a_fall_of_recall_warns_once_and_acts(base, tmp_path, monkeypatch, caplog, on_alert):
    original, runs = Prober.run, []

    def pretending(self: Prober, model: Any, **options: Any) -> ProbeResult:
        runs.append(1)
        found = original(self, model, **options)
        return replace(found, correct=(len(runs) == 1,) * len(found.sample_keys))

    monkeypatch.setattr(Prober, "run", pretending)
    logging.getLogger("qkguard").propagate = True
    alerts: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "run", SimpleNamespace(url=None, alert=lambda **options: alerts.append(options)))
    options = PROBES | {"probe_samples": 5, "probe_restored": False}
    guard = QKGuardCallback(strict=True, probe_steps=1, on_alert=on_alert, **options)
    trainer = probed(base, tmp_path, guard, max_steps=3)
    told = [r for r in caplog.records if "Recall fell from 1.00 to 0.00" in r.getMessage()]
    assert len(told) == 1 and told[0].levelno == logging.WARNING
    assert [(a["level"], a["text"] == told[0].getMessage()) for a in alerts] == [("WARN", True)]
    assert trainer.state.global_step == (1 if on_alert == "stop" else 3)
    if on_alert == "save":
        assert (tmp_path / "run/checkpoint-1/qk_restored/qkguard.json").exists()
    assert (tmp_path / "run/checkpoint-1").exists() == (on_alert == "save")


def train_twice(base: Path, folder: Path, monkeypatch: Any, caplog: Any) -> tuple[Any, Any]:
    """Two trainings of one trainer, 2 and 4 steps, with a fall of recall and too small a budget in each: their states.

    The checks: both warned, both left out a probe and said so, each by its own schedule and on its own account.
    """
    original, runs = Prober.run, []

    def pretending(self: Prober, model: Any, **options: Any) -> ProbeResult:
        runs.append(1)
        found = original(self, model, **options)
        return replace(found, correct=(len(runs) == 1,) * len(found.sample_keys))

    monkeypatch.setattr(Prober, "run", pretending)
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    options = PROBES | {"probe_samples": 5, "probe_restored": False, "probe_budget": 0.001}
    guard = QKGuardCallback(strict=True, probe_steps=0.5, **options)
    with caplog.at_level(logging.INFO, logger="qkguard"):
        trainer = probed(base, folder, guard, max_steps=2)
        monitor = guard.session.recall_monitor
        first, baseline = monitor.training, monitor.baseline
        caplog.clear()
        trainer.args.max_steps = 4
        trainer.train()
    assert guard.session.recall_monitor is monitor and monitor.baseline is baseline and baseline is not None
    assert first.alarmed and first.thinned and first.budget.first > 0
    return first, monitor.training


def check_fresh(first: Any, second: Any, messages: list[str]) -> None:
    """What one training did leaves no trace in the next one's schedule, budget, flags and messages."""
    assert (first.every, second.every) == (1, 2) and second.max_steps == 4
    assert second.budget.first == 0 and 0 < second.budget.spent < first.budget.first + first.budget.spent
    assert second.alarmed and second.thinned
    assert sum("Recall fell from 1.00 to 0.00 by step 4" in message for message in messages) == 1
    assert sum("leaves out the probe at step 2" in message for message in messages) == 1


def test_a_second_training_starts_with_a_fresh_schedule_budget_and_alarm(base, tmp_path, monkeypatch, caplog):
    first, second = train_twice(base, tmp_path, monkeypatch, caplog)
    check_fresh(first, second, [r.getMessage() for r in caplog.records])
    assert second.summary.keys() == {"raw"} and second.summary["raw"]["step"] == 4


@pytest.mark.parametrize("survivor", ["every", "budget", "alarmed", "thinned"])
def test_state_that_survives_a_training_is_found(base, tmp_path, monkeypatch, caplog, survivor):
    original = RecallMonitor.at_start

    def keeping(self: RecallMonitor, args: Any, state: Any) -> None:
        earlier = getattr(self, "training", None)
        original(self, args, state)
        if earlier is not None:
            setattr(self.training, survivor, getattr(earlier, survivor))

    monkeypatch.setattr(RecallMonitor, "at_start", keeping)
    first, second = train_twice(base, tmp_path, monkeypatch, caplog)
    with pytest.raises(AssertionError):
        check_fresh(first, second, [r.getMessage() for r in caplog.records])


def test_a_baseline_that_failed_is_not_made_up_for_from_weights_that_have_moved(base, tmp_path, monkeypatch, caplog):
    original, runs = Prober.run, []

    def failing_once(self: Prober, model: Any, **options: Any) -> ProbeResult:
        runs.append(1)
        if len(runs) == 1:
            raise BoomError("no luck")
        return original(self, model, **options)

    monkeypatch.setattr(Prober, "run", failing_once)
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    trainer = probed(base, tmp_path, guard := QKGuardCallback(probe_steps=1, **PROBES), max_steps=1)
    trainer.train()
    assert guard.session.recall_monitor.baseline is None and len(runs) > 2
    assert any("nothing to compare it with" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("case", ["no tokenizer", "no length", "sequence parallel", "context parallel"])
def test_probes_are_off_with_one_line(case, base):
    model: Any = tiny_model("llama")
    args: Any = type("Args", (), {"parallelism_config": None, "hf_deepspeed_config": None})()
    tokenizer, lengths = bpe_tokenizer(), [512]
    assert why_not(QKGuardConfig(), args, model, tokenizer, lengths) is None
    if case == "no tokenizer":
        tokenizer = None
    elif case == "no length":
        lengths = []
    else:
        sizes = {"cp_size": 1, "sp_size": 1} | {f"{case[0]}p_size": 2}
        args.parallelism_config = type("Parallel", (), sizes)()
    why = why_not(QKGuardConfig(), args, model, tokenizer, lengths)
    assert why and case.split()[-1].rstrip("s") in why and "\n" not in why


def test_training_without_room_for_any_length_has_no_probes(base, tmp_path, caplog):
    logging.getLogger("qkguard").propagate = True
    with caplog.at_level(logging.INFO, logger="qkguard"):
        probed(base, tmp_path, QKGuardCallback(strict=True), max_steps=1)
    assert not recalls(tmp_path)
    lines = [r.getMessage() for r in caplog.records if "Recall probes are off" in r.getMessage()]
    assert len(lines) == 1 and "512, 1024, 2048 do not fit the model's 256 positions (max_position" in lines[0]
    assert [r.levelno for r in caplog.records if "Recall probes are off" in r.getMessage()] == [logging.WARNING]


def test_default_lengths_that_do_not_fit_are_named():
    config = tiny_model("llama", max_position_embeddings=1024).config
    assert default_lengths(config, 900) == [512, 1024]
    assert "lengths 1800, 2048, 3600 do not fit the model's 1024 positions" in lengths_left_out(config, 900)
    config.max_position_embeddings = 4096
    assert default_lengths(config) == [512, 1024, 2048] and lengths_left_out(config) is None


# -- the live swap -------------------------------------------------------------------------------------------------


def test_swapped_logits_are_those_of_the_restored_folder_and_the_weights_come_back(base, tmp_path):
    guard = QKGuardCallback(strict=True, probe_steps=0)
    trainer = probed(base, tmp_path, guard, save_strategy="steps", save_steps=3)
    model, ids = trainer.model.eval(), torch.arange(5, 69)[None]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = {k: v for s in trainer.optimizer.state.values() for k, v in s.items() if isinstance(v, Tensor)}
    kept = {k: v.clone() for k, v in optimizer.items()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-3/qk_restored").eval()
    with torch.no_grad():
        raw = model(ids).logits
        with pytest.raises(BoomError), restored(model, guard.session.reference):
            assert torch.equal(model(ids).logits, loaded(ids).logits)
            raise BoomError
        assert torch.equal(model(ids).logits, raw) and not torch.equal(raw, loaded(ids).logits)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(v, kept[k]) for k, v in optimizer.items())
