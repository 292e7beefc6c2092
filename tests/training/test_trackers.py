"""What a run's trackers show beside Trainer's own rows, read back from their files."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from google.protobuf.message import DecodeError  # comes with W&B

from qkguard import QKGuardCallback
from qkguard.training.charts import tracker_name
from qkguard.training.trackers import MLflow, Trackio
from tests.report.test_report import PICTURES, guarded, probing_guard
from tests.report.test_report import base as probed_base  # noqa: F401  the fixture
from tests.support import judge
from tests.support.probing import no_floor
from tests.support.training import arguments, save_base, train

HEADLINES = {
    *(f"drift/{name}{which}" for name in ("q_rel", "k_rel", "routing_rel") for which in ("", "/max")),
    "niah/answer_logprob",
    "recall",
    "attention",
    "verdict",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "minimax")


def test_tensorboard_shares_trainers_folder(base: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(base, arguments(tmp_path, report_to=["tensorboard"]), QKGuardCallback(strict=True))
    folders = list((tmp_path / "run/runs").iterdir())
    assert len(folders) == 1
    events = EventAccumulator(str(folders[0])).Reload()
    tags = events.Tags()["scalars"]
    assert "train/loss" in tags and "qkguard/drift/q_rel" in tags
    logged = {e.step: e.value for e in events.Scalars("qkguard/drift/q_rel")}
    rows = {
        r["step"]: r["qkguard/drift/q_rel"] for r in judge.metrics_rows(tmp_path / "run") if "qkguard/drift/q_rel" in r
    }
    assert logged == pytest.approx(rows, rel=1e-6) and len(logged) == 3


def test_wandb_rows_beside_trainers_own(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"report_to": ["wandb"], "run_name": "r"}
    with wandb_run(tmp_path / "with", monkeypatch) as file:
        train(base, arguments(tmp_path / "with", **options), QKGuardCallback(strict=True))
    rows = [row for kind, row in records(file()) if kind == "history"]
    with wandb_run(tmp_path / "without", monkeypatch) as file:
        train(base, arguments(tmp_path / "without", **options), None)
    plain = [row for kind, row in records(file()) if kind == "history"]

    def trainers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        skip = ("_", "train/train_", "qkguard", "train/total_flos")
        kept = [{k: v for k, v in r.items() if not k.startswith(skip)} for r in rows]
        return [r for r in kept if set(r) - {"train/global_step"}]

    assert trainers(rows) == trainers(plain) and len([r for r in rows if "train/loss" in r]) == 3
    drift = {int(r["train/global_step"]): r["qkguard/drift/q_rel"] for r in rows if "qkguard/drift/q_rel" in r}
    assert sorted(drift) == [1, 2, 3] and drift[1] < drift[3]


@contextmanager
def wandb_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Path]]:
    """W&B offline; the function gives the finished run's file."""
    import wandb

    folder.mkdir()
    for key, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(key, value)
    found: list[Path] = []
    yield lambda: found[0]
    found.append(Path(wandb.run.settings.sync_file))
    wandb.finish()
    for _ in range(300):  # W&B's service may still be writing when finish() returns
        with suppress(DecodeError):
            if "exit" in [kind for kind, _ in records(found[0])]:
                break
        time.sleep(0.1)


def messages(file: Path) -> Iterator[Any]:
    """The protobufs of an offline run file: LevelDB log framing (7-byte header, 32 KiB blocks) around them."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, row of a history, summary or config record) of an offline run file."""
    for record in messages(file):
        items = [*record.history.item, *record.summary.update, *record.config.update]
        row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
        yield record.WhichOneof("record_type"), row


def panels(file: Path) -> dict[str, set[str]]:
    """Section -> the charts that W&B's page makes of a run by itself: of numbers that are not hidden, and Vega's.

    The part before the first slash names the section (W&B's documentation, "How can I organize my logged charts").
    """
    hidden: set[str] = set()
    found: set[str] = set()
    for record in messages(file):
        if record.WhichOneof("record_type") == "metric" and record.metric.options.hidden:
            hidden.add(record.metric.name)
        for item in record.history.item:
            if isinstance(json.loads(item.value_json), int | float):
                found.add(item.key or "/".join(item.nested_key))
        for item in record.config.update:
            name = item.key or "/".join(item.nested_key)
            found |= {name.removeprefix("_wandb/visualize/")} if name.startswith("_wandb/visualize/") else set()
    sections: dict[str, set[str]] = {}
    for name in sorted(found - hidden):
        section, slash, chart = name.partition("/")
        if slash:
            sections.setdefault(section, set()).add(chart)
    return sections


@pytest.mark.pictures
def test_wandb_pictures_table_summary_and_config(
    probed_base: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_floor(monkeypatch)
    with wandb_run(tmp_path / "run", monkeypatch) as file:
        guarded(probed_base, tmp_path / "run", probing_guard(), report_to=["wandb"], run_name="r")
    rows = list(records(file()))
    history = [row for kind, row in rows if kind == "history"]
    shown = [row for row in history if "qkguard_pictures/probes/path" in row]
    steps = [int(row["train/global_step"]) for row in shown]
    assert steps == [0, 2, 3, 3, 3], "pictures and table come with every probe and the verdict, at its step"
    media = file().parent / "files"
    for row in shown:
        paths = {key.split("/")[1]: key for key in row if re.fullmatch("qkguard_pictures/(?!probes).*/path", key)}
        assert set(paths) == (PICTURES if row["train/global_step"] else {"recall", "recall_grid", "needle_mass"})
        for key in paths.values():
            assert (media / row[key]).stat().st_size == row[key.replace("/path", "/size")] > 1000
    sections = panels(file())
    assert sections["qkguard"] == HEADLINES and len(HEADLINES) <= 10
    assert {"niah/single_1/192", "niah_restored/single_1/224"} <= sections["qkguard_tasks"]
    assert {"drift/layer_0/q_rel", "drift/layer_1/routing_rel"} <= sections["qkguard_layers"]
    assert {"probe_seconds", "save_seconds"} <= sections["qkguard_overhead"]
    lines = json.loads((media / shown[-1]["Custom Chart Tables/qkguard/recall_table/path"]).read_text())
    assert {row[1] for row in lines["data"]} == {"before training", "raw", "restored"}
    table = json.loads((media / shown[-1]["qkguard_pictures/probes/path"]).read_text())
    assert table["columns"][:3] == ["step", "weights", "task"] and len(table["data"]) == 4 * 2 * 2
    assert {row[1] for row in table["data"]} == {"raw", "restored"}
    summary: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for kind, row in rows:
        (summary if kind == "summary" else settings if kind == "config" else {}).update(row)
    probes = {r["step"]: r for r in judge.metrics_rows(tmp_path / "run/run") if "qkguard/niah/recall" in r}
    assert summary["qkguard/final/recall_before"] == probes[0]["qkguard/niah/recall"]
    assert summary["qkguard/final/recall_raw"] == probes[3]["qkguard/niah/recall"]
    assert "qkguard/final/recall_restored" in summary and "qkguard/final/q_rel" in summary
    assert settings["qkguard"]["probe_tasks"] == ["single_1"]


@pytest.mark.pictures
def test_tensorboard_pictures(probed_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    no_floor(monkeypatch)
    guarded(probed_base, tmp_path, probing_guard(), report_to=["tensorboard"])
    events = EventAccumulator(str(next((tmp_path / "run/runs").iterdir())), size_guidance={"images": 0}).Reload()
    assert {f"qkguard_pictures/{name}" for name in PICTURES} == set(events.Tags()["images"])
    assert [e.step for e in events.Images("qkguard_pictures/recall")] == [0, 2, 3, 3, 3]


def test_a_deep_model_has_no_more_headlines() -> None:
    layers = [f"qkguard/drift/layer_{n}/{name}" for n in range(36) for name in ("q_rel", "k_rel", "routing_rel")]
    assert {tracker_name(key).partition("/")[0] for key in layers} == {"qkguard_layers"}
    assert tracker_name("qkguard/drift/q_rel/max") == "qkguard/drift/q_rel/max"
    assert tracker_name("qkguard/niah/recall") == "qkguard/niah/recall", "sweeps and alerts of users go by it"


def test_trackio_and_mlflow_get_scalars_in_the_open_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their calls, as in the versions of November 2026; neither library is installed with the tests."""
    calls: list[Any] = []
    trackio, variables = ModuleType("trackio"), ModuleType("trackio.context_vars")
    current = SimpleNamespace(get=lambda: None)
    variables.current_run = current  # type: ignore[attr-defined]
    trackio.context_vars, trackio.log = variables, calls.append  # type: ignore[attr-defined]
    mlflow = ModuleType("mlflow")
    mlflow.active_run = lambda: None  # type: ignore[attr-defined]
    client = SimpleNamespace(log_metric=lambda run, key, value, step: calls.append((run, key, value, step)))
    mlflow.MlflowClient = lambda: client  # type: ignore[attr-defined]
    for module in (trackio, variables, mlflow):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    trackers = (Trackio(), MLflow())
    for tracker in trackers:
        tracker.scalars({"qkguard/a": 1.0}, 3)
    assert calls == []
    current.get = lambda: object()
    mlflow.active_run = lambda: SimpleNamespace(info=SimpleNamespace(run_id="r"))  # type: ignore[attr-defined]
    for tracker in trackers:
        tracker.scalars({"qkguard/a": 1.0}, 3)
    assert calls == [{"qkguard/a": 1.0, "train/global_step": 3}, ("r", "qkguard/a", 1.0, 3)]
    current.get = lambda: None
    mlflow.active_run = lambda: None  # type: ignore[attr-defined]  # ended by Trainer's callback, before ours
    for tracker in trackers:
        tracker.scalars({"qkguard/a": 2.0}, 4)
    assert calls[2:] == [("r", "qkguard/a", 2.0, 4)]
