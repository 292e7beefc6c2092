"""The verdict when training ends: measured in the live model, told everywhere, written by `method="auto"`."""

from __future__ import annotations

import html
import json
import logging
import random
import re
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkguard import QKGuardCallback, QKGuardConfig, QKGuardError, sweep, verify
from qkguard.choice.candidates import final_candidates, method_candidate
from qkguard.demo import MODEL
from qkguard.demo.arithmetic import problems
from qkguard.training import final_verdict
from qkguard.training.final_verdict import FinalVerdict
from qkguard.training.trackers import Tracker
from tests.support import judge
from tests.support.models import tiny_model
from tests.support.probing import bpe_tokenizer
from tests.support.training import arguments, train

PROBES: dict[str, Any] = {"probe_lengths": [128], "probe_samples": 2, "probe_tasks": ["s2"], "probe_budget": None}
SAME: dict[str, Any] = {"lengths": (128,), "depths": 5, "samples": 2, "tasks": ("single_2",), "device": "cpu"}


def chains(seed: int, count: int) -> Dataset:
    rows = islice(problems(seed=seed), count)
    return Dataset.from_list([{"prompt": row.prompt, "completion": row.completion} for row in rows])


def only_queries_and_keys() -> Any:
    """The demo's model with nothing trained but the softmax layers' queries and keys: restoring gives the base."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, experts_implementation="eager")
    for name, param in model.named_parameters():
        softmax = name.startswith(("model.layers.2.self_attn", "model.layers.5.self_attn"))
        param.requires_grad_(softmax and name.endswith(("q_proj.weight", "k_proj.weight")))
    return model


def tune(
    folder: Path, guard: Any, *, evaluates: bool = True, model: Any = None, peft: Any = None, **options: Any
) -> Any:
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.1, "save_strategy": "no", "max_length": 256}
    settings |= {"eval_strategy": "steps", "eval_steps": 2} if evaluates else {}
    args = arguments(folder, **settings | options)
    return train(
        MODEL,
        args,
        guard,
        model=model if model is not None else only_queries_and_keys(),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        train_dataset=chains(7, 12),
        eval_dataset=chains(8, 10) if evaluates else None,
        peft_config=peft,
    )


def verdict_row(folder: Path) -> dict[str, Any]:
    (row,) = [row for row in judge.metrics_rows(folder / "run") if "verdict" in row]
    return row


class Recording(Tracker):
    """A tracker that keeps what it is sent."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def scalars(self, metrics: Any, step: int) -> None:
        self.kept |= metrics

    def summary(self, values: Any) -> None:
        self.kept |= values


def heard(monkeypatch: Any, caplog: Any) -> Recording:
    tracker = Recording()
    monkeypatch.setattr("qkguard.training.metrics_log.open_trackers", lambda *args: [tracker])
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    caplog.set_level(logging.INFO, logger="qkguard")
    return tracker


def test_the_loss_is_read_on_no_more_tokens_than_the_probe(tmp_path: Path) -> None:
    """The verdict of a short run, whose probes are small, does not take longer than they do."""
    guard = QKGuardCallback(strict=True, **PROBES | {"probe_depths": 2, "probe_samples": 1})
    tune(tmp_path, guard)
    assert len(guard.session.recall_monitor.prober.sample_keys) == 2
    assert verdict_row(tmp_path)["verdict"]["data"] == "8 rows of the evaluation set"  # of 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3_next"])
def test_a_short_run_spends_at_most_a_third_of_its_time_in_probes(
    tmp_path: Path, monkeypatch: Any, caplog: Any, kind: str
) -> None:
    """24 steps with the default settings, of a model that finds no needles and is probed all the same."""
    heard(monkeypatch, caplog)
    monkeypatch.setattr("qkguard.training.recall_monitor.RecallMonitor.at_floor", False)
    text = "the quick brown fox thinks step by step and answers forty two. " * 12
    rows = Dataset.from_list([{"prompt": f"Question {i}?", "completion": text} for i in range(200)])
    guard, began = QKGuardCallback(strict=True), time.perf_counter()
    train(
        tmp_path,
        arguments(tmp_path, max_steps=24, per_device_train_batch_size=8, save_strategy="no", max_length=1024),
        guard,
        model=tiny_model(kind, vocab_size=1024, max_position_embeddings=4096),
        processing_class=bpe_tokenizer(),
        train_dataset=rows,
    )
    whole = time.perf_counter() - began
    probes = re.search(r"Recall probes took ([\d.]+) s", caplog.text)
    assert probes and verdict_row(tmp_path)["verdict"]["recommended"] == "raw"
    assert float(probes[1]) + guard.session.verdict.seconds < whole / 3


def test_a_restore_wins_and_everything_says_so(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    tracker = heard(monkeypatch, caplog)
    prose = tmp_path / "prose.txt"
    prose.write_text("The cat sat on the mat. The dog went for a walk. Rain fell on the hills all night. " * 9)
    guard = QKGuardCallback(strict=True, method="auto", haystack=prose, **PROBES)
    trainer = tune(tmp_path, guard)
    run = tmp_path / "run/_qkguard"
    final, live = run / "final", {name: p.detach() for name, p in trainer.model.named_parameters()}
    saved = AutoModelForCausalLM.from_pretrained(final / "raw").state_dict()
    assert all(torch.equal(p, saved[name]) for name, p in live.items()), "the weights are not as they were"

    found = verdict_row(tmp_path)["verdict"]
    assert found["recommended"] == "restore" and found["folder"] == "qk_restored"
    assert (final / "RECOMMENDED").read_text() == "qk_restored\n"
    assert found["data"] == "10 rows of the evaluation set"
    assert any("beyond that nothing is known" in sentence for sentence in found["words"])
    assert found["words"][-2:] == ["Recommended: restore.", "It is in final/qk_restored."]
    manifest = json.loads((final / "qk_restored/qkguard.json").read_text())
    assert manifest["verdict"]["words"] == found["words"] and manifest["verdict"]["rule"] == found["rule"]
    card, page = (file.read_text() for file in (final / "qk_restored/README.md", run / "report.html"))
    for sentence in (*found["words"], found["rule"]):
        assert sentence in card and sentence in caplog.text and sentence in html.unescape(page)
    assert tracker.kept["verdict"] == " ".join(found["words"])
    assert tracker.kept["recommended"] == "restore" and tracker.kept["rule"] == found["rule"]
    assert tracker.kept["qkguard_verdict/restore/recall"] == 1.0
    assert tracker.kept["restore/recall_low"] == pytest.approx(0.722, abs=1e-3)
    assert re.search(r"it takes (\d+ to \d+ s|less than a second), .* verdict=False", caplog.text), (
        "the cost was stated before"
    )

    offline = sweep(
        MODEL,
        final / "raw",
        methods="restore,qk-pro:ridge=10,interpolate:alpha=0.5",
        haystack=str(prose),
        dtype="float32",
        **SAME,
    )
    assert offline.recommended.name == found["recommended"]
    points = {point["name"]: point for point in found["points"]}
    live_points = {p.name: p for p in guard.session.verdict.points}
    for point in offline.points:
        assert live_points[point.name].probe.settings["digest"] == point.probe.settings["digest"]
        assert live_points[point.name].probe.correct == point.probe.correct, point.name
        if point.name != "base":
            assert points[point.name]["task"]["loss"] == pytest.approx(point.task.loss, abs=1e-4)
    losses = [points[name]["task"]["loss"] for name in points if name != "base"]
    assert len(losses) == 4 and min(b - a for a, b in zip(sorted(losses), sorted(losses)[1:], strict=False)) > 1e-3


def test_training_is_bit_identical_with_a_verdict(tmp_path: Path) -> None:
    outcomes = []
    for guard in (None, QKGuardCallback(strict=True, **PROBES)):
        folder = tmp_path / str(bool(guard))
        trainer = tune(folder, guard, save_strategy="steps", save_steps=2)
        weights = judge.weights_in_bits(folder / "run/checkpoint-2")
        evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        streams = (torch.get_rng_state().tolist(), random.getstate())
        outcomes.append((trainer.recorder.rows, evaluated, weights, streams, trainer.model.training))
    assert outcomes[0] == outcomes[1] and all(outcomes[0][:3])
    assert verdict_row(tmp_path / "True")["verdict"]["recommended"] == "restore"


def test_raw_wins_and_auto_links_it(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    heard(monkeypatch, caplog)
    guard = QKGuardCallback(strict=True, method="auto", **PROBES)
    trainer = tune(tmp_path, guard, evaluates=False, learning_rate=1e-9)
    final = tmp_path / "run/_qkguard/final"
    found = verdict_row(tmp_path)["verdict"]
    assert found["recommended"] == "raw" and (final / "RECOMMENDED").read_text() == "raw\n"
    assert found["data"] == "12 rows seen in training" and found["metric"] == "loss"
    assert len((tmp_path / "run/_qkguard/seen.jsonl").read_text().splitlines()) == 12
    raw, linked = (final / name / "model.safetensors" for name in ("raw", "qk_restored"))
    assert raw.stat().st_ino == linked.stat().st_ino
    report = verify(final / "qk_restored", full=True)
    assert report["method"] == "raw" and report["tensors"] == 0 and report["raw"] == "unchanged"
    assert 'final/qk_restored is final/raw under another name (method="auto").' in caplog.text
    card = (final / "qk_restored/README.md").read_text()
    assert "# Fine-tuned model, unchanged" in card and "Recommended: raw." in card and "Q/K restored" not in card
    assert "the raw model under another name" in (tmp_path / "run/_qkguard/report.html").read_text()
    guard.save(trainer, tmp_path / "by-hand")
    assert verify(tmp_path / "by-hand/qk_restored")["method"] == "raw"


def test_as_asked_where_another_restore_is_better(tmp_path: Path) -> None:
    """Interpolation at 0.9 as asked brings recall back too, but the verdict finds a better one and names it."""
    guard = QKGuardCallback(strict=True, method="interpolate", alpha=0.01, **PROBES)
    tune(tmp_path, guard)
    found = verdict_row(tmp_path)["verdict"]
    names = [point["name"] for point in found["points"]]
    assert names == ["base", "raw", "restore", "qk-pro ridge 10", "interpolate alpha 0.5", "interpolate alpha 0.01"]
    final = tmp_path / "run/_qkguard/final"
    assert json.loads((final / "qk_restored/qkguard.json").read_text())["method"]["alpha"] == 0.01
    assert found["recommended"] == "restore" and found["folder"] == "raw"
    assert (final / "RECOMMENDED").read_text() == "raw\n"
    assert "holds interpolate alpha 0.01, as asked" in found["words"][-1] and 'method="auto"' in found["words"][-1]


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_measured_whole_and_half(tmp_path: Path, dora: bool) -> None:
    targets = [f"layers.{n}.self_attn.{p}_proj" for n in (2, 5) for p in "qkvo"]
    adapters = LoraConfig(r=8, target_modules=targets, use_dora=dora, lora_alpha=64, task_type="CAUSAL_LM")
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, experts_implementation="eager")
    guard = QKGuardCallback(strict=True, method="auto", **PROBES)
    tune(tmp_path, guard, model=model, peft=adapters, learning_rate=0.03)
    found = verdict_row(tmp_path)["verdict"]
    names = [point["name"] for point in found["points"]]
    assert names == ["base", "raw", "restore", *([] if dora else ["interpolate alpha 0.5"])]
    losses = [point["task"]["loss"] for point in found["points"][1:]]
    assert len(set(losses)) == len(losses)
    final = tmp_path / "run/_qkguard/final"
    written = json.loads((final / "qk_restored/default/qkguard.json").read_text())
    expected = {"restore": "restore", "raw": "raw", "interpolate alpha 0.5": "interpolate"}[found["recommended"]]
    assert written["method"]["name"] == expected and verify(final / "qk_restored/default")["raw"] == "unchanged"
    assert found["words"][-2] in (final / "qk_restored/default/README.md").read_text()


def test_at_floor_there_is_no_verdict_and_a_plain_restore(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    heard(monkeypatch, caplog)
    model = only_queries_and_keys()
    torch.nn.init.zeros_(model.model.layers[2].self_attn.q_proj.weight)
    torch.nn.init.zeros_(model.model.layers[5].self_attn.q_proj.weight)
    model.config._name_or_path = ""
    tune(tmp_path, QKGuardCallback(strict=True, method="auto", **PROBES), model=model)
    assert "No verdict on which model to ship: before training the model finds no needles" in caplog.text
    assert 'method="auto" writes a plain restore.' in caplog.text
    final = tmp_path / "run/_qkguard/final"
    assert not (final / "RECOMMENDED").exists()
    assert json.loads((final / "qk_restored/qkguard.json").read_text())["method"]["name"] == "restore"


def test_a_verdict_that_fails_is_told_and_the_run_ends_as_always(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    heard(monkeypatch, caplog)

    def broken(*args: Any) -> Any:
        raise OSError("no luck")

    monkeypatch.setattr(FinalVerdict, "_measured", broken)
    tune(tmp_path, QKGuardCallback(**PROBES), evaluates=False)
    assert "The verdict failed: OSError: no luck. Training continues." in caplog.text
    assert (tmp_path / "run/_qkguard/final/qk_restored/qkguard.json").exists()
    assert not (tmp_path / "run/_qkguard/final/RECOMMENDED").exists()
    assert "verdict" not in json.dumps(judge.metrics_rows(tmp_path / "run"))


# -- pure parts ----------------------------------------------------------------------------------------------------


def test_the_points_of_a_run() -> None:
    def names(method: str, options: dict[str, Any], without: tuple[str, ...] = ()) -> list[str]:
        return [point.name for point in final_candidates(method_candidate(method, options), without)]

    three = ["restore", "qk-pro ridge 10", "interpolate alpha 0.5"]
    assert names("restore", {}) == names("qk-pro", {"ridge": 10}) == names("interpolate", {"alpha": 0.5}) == three
    assert names("qk-pro", {"ridge": 1}) == [*three, "qk-pro ridge 1"]
    assert names("restore", {"projections": ["k"]}) == ["restore K only", "interpolate alpha 0.5 K only"]
    assert names("restore", {}, ("qk-pro", "interpolate")) == ["restore"]
    assert names("interpolate", {"alpha": 0.5, "per_layer": {2: 1}})[-1] == "interpolate alpha 0.5 by layer"


@pytest.mark.parametrize(
    "wrong", [{"verdict": False}, {"final_export": False}, {"probe_steps": 0}, {"restore_on": "never"}]
)
def test_auto_needs_a_verdict_and_a_final_export(wrong: dict[str, Any]) -> None:
    with pytest.raises(QKGuardError, match=f'^Invalid {next(iter(wrong))}=.* with method="auto"'):
        QKGuardConfig(method="auto", **wrong)
    assert QKGuardConfig(method="auto").restore_method == "restore"
    with pytest.raises(QKGuardError, match=r"^Invalid tolerance=-1"):
        QKGuardConfig(tolerance=-1.0)


def test_without_rows_the_words_say_that_recall_decides() -> None:
    monitor: Any = SimpleNamespace(prober=object(), baseline=None, swap=object(), costs=SimpleNamespace())
    weights: Any = SimpleNamespace(candidates=lambda: [method_candidate("restore", {})])
    verdict = FinalVerdict(QKGuardConfig(), Path("."), None, weights, monitor)
    assert monitor.costs.extra_at_end == 0, "the monitor probes the one restore by itself"
    assert verdict.why_not() is None and verdict._rows(None) == ([], "")
    assert "by recall alone" in final_verdict.NO_ROWS
    weights.candidates = list
    assert "nothing can be restored" in str(verdict.why_not())
