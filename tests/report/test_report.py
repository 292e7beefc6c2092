"""The page of a run, the sentences on it and the model card, read back from the files."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM

from qkguard import QKGuardCallback, QKGuardError
from qkguard.checkpoint.card import model_card
from qkguard.report.run import load_run
from qkguard.report.run_page import write_comparison, write_report
from qkguard.report.sentences import describe
from qkguard.training.metrics_log import MetricsLog
from tests.support import judge
from tests.support.probing import bpe_tokenizer, pretend
from tests.support.training import arguments, save_base, train

PICTURES = {"recall", "recall_grid", "drift", "drift_layers", "needle_mass"}
PROBES: dict[str, Any] = {"probe_lengths": [192, 224], "probe_depths": 2, "probe_samples": 1, "probe_tasks": ["s1"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    return save_base(folder, "llama", vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256)


def guarded(base: Path, folder: Path, guard: QKGuardCallback | None, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    return train(base, arguments(folder, **options), guard, model=model, processing_class=bpe_tokenizer())


def probing_guard(**options: Any) -> QKGuardCallback:
    return QKGuardCallback(strict=True, probe_steps=2, probe_budget=None, routing_drift_steps=1, **PROBES, **options)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, lambda number, key: number == 0 or key.depth == 0)
        guarded(base, folder, probing_guard())
    return folder / "run"


class Reader(HTMLParser):
    """Text, the targets of everything a page could load, and tags that were never closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.targets, self.open = "", [], []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [v or "" for k, v in attrs if k in ("src", "srcset", "href")]
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def test_the_page_is_whole_and_loads_nothing(run: Path) -> None:
    text = (run / "_qkguard/report.html").read_text()
    page = Reader(text)
    assert not page.open and "prefers-color-scheme:dark" in text
    assert "width=device-width" in text and "@media (max-width" in text
    assert len(page.targets) == 1 + 2 * len(PICTURES) and all(t.startswith("data:") for t in page.targets)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    rows = judge.metrics_rows(run)
    recall = [row["qkguard/niah/recall"] for row in rows if "qkguard/niah/recall" in row]
    assert f"{recall[0]:.2f}" in page.text and f"step {rows[-1]['step']}" in page.text
    assert {p.stem for p in (run / "_qkguard/figures").iterdir()} == PICTURES
    for file in (run / "_qkguard/figures").iterdir():
        image = Image.open(file)
        assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24)) > 50, "an empty picture"


def test_the_page_is_rebuilt_from_files_alone(run: Path) -> None:
    page = run / "_qkguard/report.html"
    before = page.read_text()
    page.unlink()
    assert write_report(run) == page and page.read_text() == before
    assert write_report(run / "_qkguard") == page
    with pytest.raises(QKGuardError, match=r"no _qkguard/metrics\.jsonl"):
        write_report(run.parent)
    with pytest.raises(QKGuardError, match="no such folder; give the output_dir"):
        write_report(run / "nothing")


def test_several_runs_on_one_page(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "other"
    (copied / "_qkguard").mkdir(parents=True)
    (copied / "_qkguard/metrics.jsonl").write_text((run / "_qkguard/metrics.jsonl").read_text())
    page = Reader(write_comparison([run, copied], tmp_path / "compare.html").read_text())
    assert "other" in page.text and run.name in page.text and not page.open
    with pytest.raises(QKGuardError, match="given twice"):
        write_comparison([run, run], tmp_path / "compare.html")


def test_what_was_read_is_what_was_logged(run: Path) -> None:
    found = load_run(run)
    rows = judge.metrics_rows(run)
    assert [(p.step, p.weights) for p in found.probes] == [(0, "raw"), (2, "raw"), (3, "raw"), (3, "restored")]
    for probe in found.probes:
        suffix = "" if probe.weights == "raw" else "_restored"
        row = next(r for r in rows if r["step"] == probe.step and f"qkguard/niah{suffix}/recall" in r)
        for length, share in probe.by("length").items():
            assert share.recall == pytest.approx(row[f"qkguard/niah{suffix}/single_1/{length}"]) and share.count == 2
        assert (probe.change is None) == (probe.step == 0)
    assert found.layers == ["layer_0", "layer_1"]
    assert dict(found.series("qkguard/drift/layer_1/k_rel")).keys() == {1, 2, 3}
    assert found.manifest is not None and len(found.restored_folders) == 2


def test_the_card_shows_recall_before_raw_and_restored(run: Path) -> None:
    folder = run / "checkpoint-3/qk_restored"
    card, probe = (folder / "README.md").read_text(), json.loads((folder / "qkguard.json").read_text())["probe"]
    table = [line.split("|")[1:-1] for line in card.splitlines() if line.startswith("| 192 tokens")]
    values = [
        sum(g["recall"] for g in probe[w]["groups"] if g["length"] == 192) for w in ("before", "raw", "restored")
    ]
    assert [float(cell) for cell in table[0][1:]] == [round(v, 2) for v in values]
    assert values == [1, 0.5, 0.5] and "before SFT | raw | Q/K restored (this model)" in card
    assert "Restored against raw: no difference measured (4 samples)." in card and "no needles" not in card


def test_the_card_says_where_the_probe_can_show_nothing(run: Path) -> None:
    manifest = json.loads((run / "checkpoint-3/qk_restored/qkguard.json").read_text())
    assert "Restored against raw:" in model_card(manifest)
    before = manifest["probe"]["before"]
    before["recall"] = 0.0
    text = model_card(manifest)
    assert "Before SFT the model finds no needles here (0 of 4), so this probe cannot show a loss." in text
    assert "Restored against raw:" not in text


def told(tmp_path: Path, *probes: tuple[int, str, float, tuple[float, float] | None]) -> str:
    """The sentences of a run with these probes: (step, weights, recall, interval of the change)."""
    rows = []
    for step, weights, recall, interval in probes:
        suffix = "" if weights == "raw" else "_restored"
        cells = [{"task": "s1", "length": 512, "depth": 0.5, "recall": recall, "count": 50}]
        row = {"step": step, f"qkguard/niah{suffix}/recall": recall, f"qkguard/niah{suffix}/answer_logprob": -1.0}
        row[f"niah{suffix}_grid"] = cells
        if interval:
            change = {"value": sum(interval) / 2, "low": interval[0], "high": interval[1]}
            row[f"niah{suffix}_change"] = change
        rows.append(json.dumps(row))
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    return " ".join(describe(load_run(tmp_path)))


def test_sentences_say_what_was_measured(tmp_path: Path) -> None:
    lost = ((0, "raw", 0.9, None), (5, "raw", 0.7, (-0.3, -0.1)), (9, "raw", 0.4, (-0.6, -0.4)))
    text = told(tmp_path, *lost, (9, "restored", 0.8, (0.3, 0.5)))
    assert "fell by 50.0 points (95% 40.0 to 60.0)" in text
    assert "first seen more than 10 points below at step 5" in text
    assert "40.0 points above the raw weights" in text and "the restored model is recommended" in text
    text = told(tmp_path, *lost, (9, "restored", 0.42, (-0.05, 0.09)))
    assert "no difference beyond noise" in text and "what was restored is not what recall was lost through" in text
    assert "Use the raw model" in text
    text = told(tmp_path, *lost, (9, "restored", 0.2, (-0.3, -0.1)))
    assert "20.0 points below the raw weights" in text and "raw model is recommended" in text
    text = told(tmp_path, (0, "raw", 0.5, None), (9, "raw", 0.7, (0.1, 0.3)))
    assert "rose by 20.0 points" in text and "restored" not in text
    text = told(tmp_path, (0, "raw", 0.5, None), (9, "raw", 0.48, (-0.1, 0.06)), (9, "restored", 0.5, (-0.02, 0.06)))
    assert "no change beyond noise" in text and "no loss to repair" in text
    same = ((0, "raw", 0.5, None), (9, "raw", 0.5, (-0.05, 0.05)), (9, "restored", 0.5, (-0.05, 0.05)))
    text = told(tmp_path, *same)
    assert text.count("no difference measured (50 samples)") == 2 and "0.0 points" not in text and "-0.0" not in text
    text = told(tmp_path, (0, "raw", 0.0, None))
    assert text == ("Before training the model finds no needles here (0 of 50), so this probe cannot show a loss.")
    text = told(tmp_path, (0, "raw", 0.02, None), *((9, w, 0.0, (-0.08, 0.04)) for w in ("raw", "restored")))
    assert "finds only 1 of 50 needles here" in text and "cannot show a loss" in text
    assert "no loss to repair" not in text and "se the raw model" not in text
    text = told(tmp_path, (9, "raw", 0.0, None), (9, "restored", 0.0, (-0.05, 0.05)))
    assert "the raw model finds no needles here" in text and "Use the raw model" not in text
    assert "no probe from before training" in told(tmp_path, (9, "raw", 0.4, None))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "qkguard/drift/q_rel": 0.25}))
    text = " ".join(describe(load_run(tmp_path)))
    assert "was not probed" in text and "queries by 0.25" in text


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from qkguard import cli

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["qkguard", "report", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    code, out, _ = call(run)
    assert code == 0 and "Recall was" in out and out.rstrip().endswith("report.html")
    code, out, _ = call(run, "--json")
    assert code == 0 and json.loads(out)["runs"][str(run)]
    code, _, err = call(tmp_path)
    assert code == 2 and len(err.splitlines()) == 1 and "output_dir of a guarded run" in err
    assert call(run, "--out", "x.html")[0] == 2


def test_a_line_cut_short_is_left_out_and_stops_nothing(run: Path, tmp_path: Path, caplog: Any) -> None:
    """By a crash or a full disk: neither the page nor a resumed run breaks, and later rows stay whole."""
    folder = tmp_path / "_qkguard"
    folder.mkdir()
    whole = (run / "_qkguard/metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*whole[:3], whole[3][:20]]))
    assert len(load_run(tmp_path).rows) == 3
    tracking = MetricsLog(folder, [], tmp_path)
    (folder / "metrics.jsonl").write_text("\n".join([*whole[:3], whole[3][:20]]))
    tracking.log({"qkguard/a": 1.0}, 9)
    assert [row["step"] for row in load_run(tmp_path).rows] == [*(json.loads(w)["step"] for w in whole[:3]), 9]
    MetricsLog(folder, [], tmp_path, resumed_at=100)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


def test_restored_adapters_are_found(run: Path, tmp_path: Path) -> None:
    """A level deeper than restored models, in manifests without layers."""
    (tmp_path / "_qkguard").mkdir()
    (tmp_path / "_qkguard/metrics.jsonl").write_text(json.dumps({"step": 1, "qkguard/drift/q_rel": 0.5}))
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}/qk_restored/default"
        folder.mkdir(parents=True)
        manifest = {"format": 1, "kind": "adapter", "method": {"name": "restore"}, "warnings": []}
        (folder / "qkguard.json").write_text(json.dumps(manifest))
    found = load_run(tmp_path)
    assert [path.parent.parent.name for path in found.restored_folders] == ["checkpoint-9", "checkpoint-10"]
    text = write_report(tmp_path).read_text()
    assert "an adapter that leaves queries and keys to the base" in text and "2 restored folders, the last one" in text
    (folder / "qkguard.json").write_text("{")
    with pytest.raises(QKGuardError, match="not a readable manifest"):
        load_run(tmp_path)
