"""Recall probes in a training of one process: when they run, what they cost, when they warn, and what they leave."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
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
from transformers import AutoModelForCausalLM, TrainerCallback

from qkguard import QKGuardCallback, QKGuardConfig, QKGuardError, restored
from qkguard.offline.task_rows import find_rows, sampled
from qkguard.probe.prober import Prober
from qkguard.probe.results import ProbeResult
from qkguard.probe.samples import SampleKey
from qkguard.probe.settings import default_lengths, lengths_left_out
from qkguard.report.run import load_run
from qkguard.report.sentences import describe
from qkguard.training import probe_costs, recall_monitor
from qkguard.training.metrics_log import MetricsLog
from qkguard.training.probe_setup import training_prose, why_not
from qkguard.training.recall_monitor import RecallMonitor
from qkguard.training.schedules import Budget, interval
from tests.support import judge
from tests.support.models import tiny_model
from tests.support.probing import always, bpe_tokenizer, no_floor, pretend
from tests.support.training import arguments, make_trainer, save_base, train

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


@pytest.fixture
def probed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """For trainings of random weights, which find no needles."""
    no_floor(monkeypatch)


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
    assert len(simulate(Budget(0.02, first=1, reserved=1), 1, 10, 100, 1000)) == 9, "2% of 10,000 s is plenty"
    budget = Budget(0.02, first=6, reserved=6)  # 20 s in all, 8 of them for probes on the way
    done = simulate(budget, 2, 1, 50, 1000)
    assert 3 <= len(done) <= 4 and budget.spent + 12 <= 20
    gaps = [b - a for a, b in itertools.pairwise(done)]
    assert max(gaps) - min(gaps) <= 50, f"not spread evenly: {done}"
    assert simulate(Budget(0.02, first=30, reserved=6), 2, 1, 50, 1000) == [], "the baseline counts"


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


@pytest.mark.usefixtures("probed_on")
def test_probes_run_by_schedule_at_saves_and_at_both_ends(base, tmp_path):
    guard = QKGuardCallback(strict=True, probe_steps=2, **PROBES)
    probed(base, tmp_path, guard, max_steps=5, save_strategy="steps", save_steps=3)
    raw, swapped = recalls(tmp_path), recalls(tmp_path, "_restored")
    assert [step for step, _ in raw] == [0, 2, 3, 4, 5] and [step for step, _ in swapped] == [3, 5]
    assert len({value for _, value in raw}) == 5, "the weights moved, the probe did not"
    row = next(row for row in judge.metrics_rows(tmp_path / "run") if "qkguard/niah/recall" in row)
    kinds = ("needle_mass", "local_mass", "distance")
    assert {"qkguard/niah/single_1/192", *(f"qkguard/attention/{kind}" for kind in kinds)} <= set(row)
    by_length = row["niah_attention"]
    assert [found["length"] for found in by_length] == sorted({found["length"] for found in row["niah_grid"]})
    for kind in kinds:
        of_layers = [value for found in by_length for value in found[kind]]
        assert row[f"qkguard/attention/{kind}"] == pytest.approx(sum(of_layers) / len(of_layers))
        assert len(of_layers) == len(by_length) * len(by_length[0]["layers"])
    assert row["qkguard/overhead/probe_seconds"] > 0 and row["niah_grid"][0]["depth"] == 0
    for step in (3, 5):
        manifest = json.loads((tmp_path / f"run/checkpoint-{step}/qk_restored/qkguard.json").read_text())["probe"]
        assert manifest["raw"]["step"] == manifest["restored"]["step"] == step
        assert manifest["raw"]["answer_logprob"] == dict(raw)[step]
        assert manifest["restored"]["answer_logprob"] == dict(swapped)[step]
        assert manifest["before"]["answer_logprob"] == raw[0][1]


@pytest.mark.usefixtures("probed_on")
def test_a_haystack_per_length_is_read_once_in_a_training(base, tmp_path):
    guard = QKGuardCallback(strict=True, probe_steps=2, haystack_per="length", **PROBES | {"probe_depths": 4})
    probed(base, tmp_path, guard, max_steps=4)
    monitor = guard.session.recall_monitor
    assert [step for step, _ in recalls(tmp_path)] == [0, 2, 4]
    assert monitor.baseline.settings["haystack_per"] == "length" and not monitor.prober.sharing.refused


@pytest.mark.usefixtures("probed_on")
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


@pytest.mark.usefixtures("probed_on")
def test_a_budget_that_is_used_up_leaves_out_probes_and_says_so_once(base, tmp_path, caplog):
    logging.getLogger("qkguard").propagate = True
    with caplog.at_level(logging.INFO, logger="qkguard"):
        guard = QKGuardCallback(strict=True, probe_steps=1, **PROBES | {"probe_budget": 0.02})
        probed(base, tmp_path, guard, max_steps=4, save_strategy="steps", save_steps=2)
    assert [step for step, _ in recalls(tmp_path)] == [0, 4], "the first and the last always run"
    lines = [r.getMessage() for r in caplog.records if "probe_budget" in r.getMessage()]
    assert len(lines) == 3 and "leaves out the probe at step 1" in lines[1]
    assert "do not fit probe_budget=0.02" in lines[0] and "5 passes over 2 of 2 samples (192 tokens)" in lines[0]
    assert re.search(r"Recall probes took \d+\.\d s, \d+% of this training's \d+\.\d s", lines[2])


@pytest.mark.usefixtures("probed_on")
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
    guard = QKGuardCallback(strict=True, probe_restored=False, verdict=False, **PROBES)
    probed(base, tmp_path, guard, max_steps=1)
    costs, baseline = guard.session.recall_monitor.costs, guard.session.recall_monitor.baseline
    assert min(costs.budget.first, costs.seconds_of(baseline.sample_keys)) > baseline.seconds + 0.5
    assert len(forms) == 2 and all(found.keys() == {"single_1"} for found in forms)


class BoomError(Exception):
    pass


@pytest.mark.usefixtures("probed_on")
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


@pytest.mark.usefixtures("probed_on")
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


@pytest.mark.usefixtures("probed_on")
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


@pytest.mark.usefixtures("probed_on")
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
    pretend(monkeypatch, only_before)
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


def test_a_collapse_at_one_length_alerts_although_the_mean_rises(base, tmp_path, monkeypatch, caplog):
    """In log, `metrics.jsonl` and on the page; and where samples are too few, that is said before."""
    pretend(monkeypatch, lambda number, key: key.length == 224 or key.index < 2 if number == 0 else key.length == 192)
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    options = PROBES | {"probe_lengths": [192, 224], "probe_depths": 5, "probe_samples": 2, "probe_restored": False}
    options |= {"probe_tasks": ["s1", "s2"]}
    probed(base, tmp_path, QKGuardCallback(strict=True, probe_steps=1, **options), max_steps=2)
    told = [r.getMessage() for r in caplog.records if "fell" in r.getMessage()]
    assert len(told) == 1 and "Recall at 224 tokens fell from 1.00 to 0.00 by step 1" in told[0]
    rows = [row for row in judge.metrics_rows(tmp_path / "run") if "niah_falls" in row]
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["niah_falls"][0]["value"] == 224
    text = " ".join(describe(load_run(tmp_path / "run")))
    assert "Alert at step 1: recall fell beyond noise at 224 tokens from 1.00 to 0.00 (20 samples)" in text
    assert not any("No alert on recall is possible" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    ("few", "line"),
    [
        ({"probe_samples": 1}, "No alert on recall is possible: there are fewer than 8 samples."),
        (
            {"probe_samples": 4, "probe_tasks": ["s1", "mk1"], "probe_depths": 1},
            "possible in multikey_1, in single_1:",
        ),
    ],
)
def test_too_few_samples_for_an_alert_are_said_at_the_start(base, tmp_path, monkeypatch, caplog, few, line):
    pretend(monkeypatch, always)
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    probed(base, tmp_path, QKGuardCallback(strict=True, **PROBES | few), max_steps=1)
    lines = [r.getMessage() for r in caplog.records if "No alert on recall" in r.getMessage()]
    assert len(lines) == 1 and line in lines[0] and "probe_samples" in lines[0]


def only_before(number: int, key: SampleKey) -> bool:
    """A verdict for `pretend`: needles are found in the first probe alone."""
    return number == 0


def train_twice(base: Path, folder: Path, monkeypatch: Any, caplog: Any) -> tuple[Any, Any]:
    """Two trainings of one trainer, 2 and 4 steps, with a fall of recall and too small a budget in each: their states.

    The checks: both warned, both left out a probe and said so, each by its own schedule and on its own account.
    """
    pretend(monkeypatch, only_before)
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    options = PROBES | {"probe_samples": 5, "probe_restored": False, "probe_budget": 0.001}
    guard = QKGuardCallback(strict=True, probe_steps=0.5, **options)
    with caplog.at_level(logging.INFO, logger="qkguard"):
        trainer = probed(base, folder, guard, max_steps=2)
        monitor = guard.session.recall_monitor
        first, baseline = (monitor.training, monitor.costs.budget), monitor.baseline
        assert monitor.costs.max_steps == 2 and first[0].alert.told and first[0].thinned and first[1].first > 0
        caplog.clear()
        trainer.args.max_steps = 4
        trainer.train()
    assert guard.session.recall_monitor is monitor and monitor.baseline is baseline and baseline is not None
    assert monitor.costs.max_steps == 4
    return first, (monitor.training, monitor.costs.budget)


def check_fresh(first: Any, second: Any, messages: list[str]) -> None:
    """What one training did leaves no trace in the next one's schedule, budget, flags and messages."""
    assert (first[0].every, second[0].every) == (1, 2)
    assert second[1] is not first[1] and second[1].first == 0
    assert second[0].alert.told and second[0].thinned
    assert sum("Recall fell from 1.00 to 0.00 by step 4" in message for message in messages) == 1
    assert sum("leaves out the probe at step 2" in message for message in messages) == 1


def test_a_second_training_starts_with_a_fresh_schedule_budget_and_alarm(base, tmp_path, monkeypatch, caplog):
    first, second = train_twice(base, tmp_path, monkeypatch, caplog)
    check_fresh(first, second, [r.getMessage() for r in caplog.records])
    assert second[0].summary.keys() == {"raw"} and second[0].summary["raw"]["step"] == 4


@pytest.mark.parametrize("survivor", ["every", "budget", "alert", "thinned"])
def test_state_that_survives_a_training_is_found(base, tmp_path, monkeypatch, caplog, survivor):
    original = RecallMonitor.at_start

    def keeping(self: RecallMonitor, args: Any, state: Any) -> None:
        earlier, budget = getattr(self, "training", None), self.costs.budget
        original(self, args, state)
        if earlier is not None and survivor == "budget":
            self.costs.budget = budget
        elif earlier is not None:
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
    assert len(lines) == 1 and "512, 1024, 2048, 4096 do not fit the model's 256 positions (max_position" in lines[0]
    assert [r.levelno for r in caplog.records if "Recall probes are off" in r.getMessage()] == [logging.WARNING]


def test_default_lengths_that_do_not_fit_are_named():
    config = tiny_model("llama", max_position_embeddings=1024).config
    assert default_lengths(config, 900) == [512, 1024]
    assert "lengths 1800, 2048, 3600 do not fit the model's 1024 positions" in lengths_left_out(config, 900)
    config.max_position_embeddings = 4096
    assert default_lengths(config) == [512, 1024, 2048] and lengths_left_out(config) is None


@pytest.mark.parametrize("found", [False, True])
def test_a_baseline_that_finds_nothing_ends_probing_with_one_line(base, tmp_path, monkeypatch, caplog, found):
    """Also in a second training, and in one that is resumed; a model that finds needles is probed on."""
    if found:
        pretend(monkeypatch, always)
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = probed(base, tmp_path, QKGuardCallback(strict=True, probe_steps=1, **PROBES), **options)
    assert [step for step, _ in recalls(tmp_path)] == ([0, 1, 2] if found else [0])
    manifest = json.loads((tmp_path / "run/checkpoint-2/qk_restored/qkguard.json").read_text())["probe"]
    assert manifest.keys() == ({"before", "raw", "restored"} if found else {"before"})
    said = [r.getMessage() for r in caplog.records if "cannot show a loss" in r.getMessage()]
    assert len(said) == (0 if found else 1)
    if not found:
        assert said[0].startswith("Before training the model finds no needles here (0 of 2)")
        trainer.train()
        assert not recalls(tmp_path)
        guard = QKGuardCallback(strict=True, probe_steps=1, **PROBES)
        probed(base, tmp_path, guard, resume=True, **options | {"max_steps": 4})
        assert guard.session.recall_monitor.at_floor and not recalls(tmp_path)


@pytest.mark.parametrize("reloads", [False, True])
def test_the_same_weights_are_never_probed_twice(base, tmp_path, monkeypatch, reloads):
    """The best weights, put back when training ends, were probed at their save; other last weights are not."""
    passes = pretend(monkeypatch, always)
    rows = Dataset.from_list([{"input_ids": list(range(3, 15))}] * 4)
    guard = QKGuardCallback(strict=True, probe_steps=2, **PROBES)
    schedule = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the loss falls: the first is "best"
    args = arguments(tmp_path, max_steps=4, load_best_model_at_end=reloads, **schedule, **best)
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = train(base, args, guard, model=model, processing_class=bpe_tokenizer(), eval_dataset=rows)
    assert trainer.state.best_global_step == 2
    told_again = [2] if reloads else []  # the last row is that of the final weights
    assert [step for step, _ in recalls(tmp_path)] == [0, 2, 4, *told_again]
    assert len(passes) == 1 + 2 + 2 + 2, "before, at two saves raw and restored, and the verdict's two other restores"
    assert [step for step, _ in recalls(tmp_path, "_restored")] == [2, 4, *told_again]
    final = json.loads((tmp_path / "run/_qkguard/final/qk_restored/qkguard.json").read_text())["probe"]
    step = 2 if reloads else 4
    assert final["raw"]["step"] == final["restored"]["step"] == step
    assert final["raw"]["answer_logprob"] == dict(recalls(tmp_path))[step]


def test_a_tiny_training_asks_thirty_samples_and_says_so_before(tmp_path, monkeypatch, caplog):
    """With default settings; a budget that is large enough asks all."""
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    base = save_base(tmp_path / "base", "llama", vocab_size=1024, num_hidden_layers=2, max_position_embeddings=1024)
    passes = pretend(monkeypatch, always)
    with caplog.at_level(logging.INFO, logger="qkguard"):
        probed(base, tmp_path, QKGuardCallback(strict=True), max_steps=3)
    assert passes == [30] * 5 and [step for step, _ in recalls(tmp_path)] == [0, 3]
    lines = [r.getMessage() for r in caplog.records]
    plan = next(i for i, line in enumerate(lines) if "do not fit probe_budget=0.02" in line)
    assert "5 passes over 30 of 60 samples (512 tokens) take about" in lines[plan]
    assert plan < next(i for i, line in enumerate(lines) if line.startswith("Recall at step 0")), (
        "before the time goes"
    )
    passes.clear()
    guard = QKGuardCallback(strict=True, probe_budget=None, probe_restored=False, verdict=False)
    probed(base, tmp_path / "all", guard, max_steps=1)
    assert passes == [60, 60]


def test_later_probes_ask_fewer_samples_where_training_is_shorter_than_was_thought(
    base, tmp_path, monkeypatch, caplog
):
    """What is compared, and shown as the recall before, is on the samples that both probes have."""
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    monkeypatch.setattr(probe_costs, "work_of_step", enormous)
    passes = pretend(monkeypatch, lambda number, key: number == 0 and key.index < 4)
    settings = PROBES | {
        "probe_depths": 5,
        "probe_samples": 8,
        "probe_budget": 0.02,
        "probe_restored": False,
        "verdict": False,
    }
    with caplog.at_level(logging.INFO, logger="qkguard"):
        probed(base, tmp_path, QKGuardCallback(strict=True, **settings), max_steps=2)
    assert passes == [40, 30]
    assert any("Probes ask 30 of the 40 samples from step 2 on" in r.getMessage() for r in caplog.records)
    run = load_run(tmp_path / "run")
    before, raw = run.probe_of("before"), run.probe_of("raw")
    assert before.total.count == raw.total.count == raw.change["count"] == 30
    assert before.recall == raw.change["before"] == pytest.approx(20 / 30)
    manifest = json.loads((tmp_path / "run/_qkguard/final/qk_restored/qkguard.json").read_text())["probe"]
    assert manifest["before"]["recall"] == before.recall and len(manifest["raw"]["settings"]["depths"]) == 5


def enormous(args: Any, row: int, hidden: int) -> float:
    return 1e12


@pytest.mark.parametrize("drawn", [False, True])
def test_a_slow_probe_draws_a_bar_where_trainer_draws_its_own(base, tmp_path, monkeypatch, capfd, drawn):
    monkeypatch.setattr(recall_monitor, "BAR_AFTER", 0)
    pretend(monkeypatch, always)
    probed(base, tmp_path, QKGuardCallback(strict=True, **PROBES), max_steps=1, disable_tqdm=not drawn)
    assert ("the probe before the first step:" in capfd.readouterr().err) == drawn


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


def test_a_run_that_diverges_has_its_page(base, tmp_path, probed_on):
    """NaN in the queries makes attention, drift and probabilities NaN, null in metrics.jsonl; the page says so."""

    class Diverges(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                torch.nn.init.constant_(model.model.layers[1].self_attn.q_proj.weight, float("nan"))

    guard = QKGuardCallback(**PROBES, probe_steps=1, routing_drift_steps=1, verdict=False, strict=True)
    trainer = make_trainer(base, arguments(tmp_path, max_steps=3), guard, processing_class=bpe_tokenizer())
    trainer.add_callback(Diverges())
    trainer.train()
    run = load_run(tmp_path / "run")
    assert any("null" in line for line in (tmp_path / "run/_qkguard/metrics.jsonl").read_text().splitlines())
    last = run.probe_of("raw")
    assert math.isnan(last.needle_mass[0]["heads"][1][0]) and math.isnan(last.attention[0]["distance"][1])
    page = (tmp_path / "run/_qkguard/report.html").read_text()
    assert "The queries or keys hold NaN or Inf now" in page
    assert "hold NaN or Inf now" not in " ".join(describe(replace(run, rows=[r for r in run.rows if r["step"] < 3])))
