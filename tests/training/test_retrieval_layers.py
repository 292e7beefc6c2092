"""`layers="retrieval"` in a training: what is chosen, what is written, and what is said where nothing can be."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qkguard
from qkguard import QKGuardCallback, QKGuardConfig, QKGuardError, restore_checkpoint, verify
from qkguard.report.run import load_run
from qkguard.report.sentences import describe
from qkguard.sft.keys import guard_settings
from tests.support import judge
from tests.support.oracle import load_folder
from tests.support.probing import all_right, bpe_tokenizer, no_floor, with_retrieval_head
from tests.support.training import arguments, save_base, train

LAYER, HEAD = 2, 1
PROBES: dict[str, Any] = {
    "probe_lengths": [192],
    "probe_depths": 2,
    "probe_samples": 4,
    "probe_tasks": ["s1"],
    "probe_budget": None,
    "probe_steps": 100,
    "strict": True,
}
Said = Callable[[], list[str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers; one head of layer 2 looks at digits, which only the needle and its answer have."""
    folder = save_base(
        tmp_path_factory.mktemp("base") / "llama", "llama", vocab_size=1024, max_position_embeddings=256
    )
    digits = bpe_tokenizer().convert_tokens_to_ids(list("0123456789"))
    with_retrieval_head(AutoModelForCausalLM.from_pretrained(folder), digits, LAYER, HEAD).save_pretrained(folder)
    return folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    caplog.set_level(logging.INFO, logger="qkguard")
    return lambda: [r.getMessage() for r in caplog.records if 'layers="retrieval"' in r.getMessage()]


def guarded(base: Path, folder: Path, resume: bool = False, steps: int = 2, **options: Any) -> Path:
    """A training with layers="retrieval"; the run's folder."""
    extra = {name: options.pop(name) for name in ("peft_config",) if name in options}
    guard = QKGuardCallback(layers="retrieval", **PROBES | options)
    args = arguments(folder, max_steps=steps, save_steps=2)
    train(base, args, guard, resume=resume, processing_class=bpe_tokenizer(), **extra)
    return folder / "run"


def restored_layers(base: Path, raw: Path, restored: Path) -> set[int]:
    """The layers whose queries and keys are the base's; all other bits must be raw's."""
    before, tuned, found = (load_folder(folder) for folder in (base, raw, restored))
    layers: dict[int, list[bool]] = {}
    for name, tensor in found.items():
        is_tuned, is_base = torch.equal(tensor, tuned[name]), torch.equal(tensor, before[name])
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            assert is_tuned != is_base, f"{name} has moved in training, and is either as before or as after"
            layers.setdefault(int(name.split(".")[2]), []).append(is_base)
        else:
            assert is_tuned and not is_base, name
    assert all(len(set(both)) == 1 and len(both) == 2 for both in layers.values())
    return {layer for layer, both in layers.items() if both[0]}


@pytest.mark.pictures
def test_only_the_layer_with_the_head_is_restored_and_the_reference_keeps_all(base, tmp_path, monkeypatch, said):
    all_right(monkeypatch)
    run = guarded(base, tmp_path, steps=3)
    for raw, restored in (
        (run / "checkpoint-2", run / "checkpoint-2/qk_restored"),
        (run / "_qkguard/final/raw", run / "_qkguard/final/qk_restored"),
    ):
        assert restored_layers(base, raw, restored) == {LAYER}
        manifest = json.loads((restored / "qkguard.json").read_text())
        assert manifest["method"]["layers"] == [LAYER] and [found["layer"] for found in manifest["layers"]] == [LAYER]
        chosen = manifest["retrieval"]
        assert chosen["layers"] == [LAYER] and chosen["threshold"] == 0.1 and chosen["samples"] == 8
        scores = {found["layer"]: found for found in chosen["scores"]}
        assert sorted(scores) == [0, 1, 2, 3] and scores[LAYER]["head"] == HEAD and scores[LAYER]["score"] > 0.5
        assert list(scores[LAYER]["passing"]) == [str(HEAD)]
        assert not any(scores[layer]["passing"] for layer in (0, 1, 3))
        assert chosen["words"] in (restored / "README.md").read_text() and chosen["words"] not in manifest["warnings"]
        assert verify(restored, full=True)["raw"] == "unchanged"
    assert len(load_file(run / "_qkguard/reference.safetensors")) == 8, "queries and keys of all four layers"
    assert any("qkguard/drift/layer_0/q_rel" in row for row in judge.metrics_rows(run)), "drift of all"
    assert said() == [chosen["words"]] and "stands for layer 2 of the 4 guarded ones" in chosen["words"]

    found = load_run(run)
    assert chosen["words"] in describe(found)
    page = (run / "_qkguard/report.html").read_text()
    assert chosen["words"].replace('"', "&#34;") in page and "Where the answer looks, layer by layer" in page
    assert (run / "_qkguard/figures/retrieval.png").is_file()
    (before, after) = (found.probe_of(which) for which in ("before", "restored"))
    assert before is not None and after is not None
    cells = [f"{probe.attention[0]['distance'][LAYER]:,.0f}" for probe in (before, after)]
    assert f"<td>{cells[0]} / " in page and f" / {cells[1]}</td>" in page


def test_the_live_swap_is_of_that_layer_alone_and_takes_its_strengths(base, tmp_path, monkeypatch):
    all_right(monkeypatch)
    strengths = {LAYER: 0.5, 3: 0.25}
    guard = QKGuardCallback(layers="retrieval", method="interpolate", per_layer=strengths, **PROBES)
    trainer = train(base, arguments(tmp_path, max_steps=2, save_steps=2), guard, processing_class=bpe_tokenizer())
    assert guard.session is not None and dict(guard.session.weights.usual.options)["per_layer"] == {LAYER: 0.5}
    tuned = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    written = load_folder(tmp_path / "run/checkpoint-2/qk_restored")
    with guard.session.weights.swap():
        inside = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    moved = {name for name in tuned if not torch.equal(inside[name], tuned[name])}
    assert moved == {f"model.layers.{LAYER}.self_attn.{part}_proj.weight" for part in "qk"}
    assert all(torch.equal(inside[name], written[name]) for name in moved)
    assert all(torch.equal(p, tuned[name]) for name, p in trainer.model.named_parameters())
    with qkguard.restored(trainer.model, guard.session.reference):
        inside = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, tuned[name])}
    assert inside == moved


def test_a_resumed_run_reads_its_choice_back_and_without_the_file_says_so(base, tmp_path, monkeypatch, said):
    all_right(monkeypatch)
    guarded(base, tmp_path)
    words, file = said()[0], tmp_path / "run/_qkguard/retrieval.json"
    # Scores of the weights as they are now must not count: there are none of another layer in the file
    choice = json.loads(file.read_text())
    file.write_text(json.dumps(choice | {"layers": [1, LAYER]}))
    run = guarded(base, tmp_path, resume=True, steps=4)
    assert restored_layers(base, run / "checkpoint-4", run / "checkpoint-4/qk_restored") == {1, LAYER}
    assert said()[1] != words and "layers 1-2" in said()[1]

    file.unlink()
    run = guarded(base, tmp_path, resume=True, steps=6)
    assert restored_layers(base, run / "checkpoint-6", run / "checkpoint-6/qk_restored") == {0, 1, 2, 3}
    assert said()[2].endswith("because the run folder has no retrieval.json from before training.")
    manifest = json.loads((run / "checkpoint-6/qk_restored/qkguard.json").read_text())
    assert manifest["warnings"] == [said()[2]] and manifest["retrieval"]["layers"] is None


@pytest.mark.parametrize(
    ("prepare", "options", "why"),
    [
        (all_right, {"probe_steps": 0}, "recall is not probed before training"),
        (None, {}, "before training the model finds no needles here (0 of 8), so this probe cannot show a loss"),
        (no_floor, {}, "only 0 samples were answered rightly before SFT, and scores take 8"),
    ],
    ids=["no probes", "floor", "none right"],
)
def test_where_none_can_be_chosen_all_are_restored_and_that_is_said(
    base, tmp_path, monkeypatch, said, prepare, options, why
):
    if prepare is not None:
        prepare(monkeypatch)
    run = guarded(base, tmp_path, **options)
    assert said() == [f'layers="retrieval": all layers are restored, because {why}.']
    assert restored_layers(base, run / "checkpoint-2", run / "checkpoint-2/qk_restored") == {0, 1, 2, 3}
    manifest = json.loads((run / "checkpoint-2/qk_restored/qkguard.json").read_text())
    assert said()[0] in manifest["warnings"] and manifest["method"]["layers"] is None
    assert said()[0] in describe(load_run(run))


def test_adapters_lose_the_chosen_layer_alone_or_where_they_are_not_on_it_all(base, tmp_path, monkeypatch, said):
    all_right(monkeypatch)
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    run = guarded(base, tmp_path / "all", peft_config=lora)
    folder = run / "checkpoint-2/qk_restored/default"
    manifest = json.loads((folder / "qkguard.json").read_text())
    assert sorted(manifest["removed"]) == [f"model.layers.{LAYER}.self_attn.{part}_proj" for part in "kq"]
    assert manifest["method"]["layers"] == [LAYER] == manifest["retrieval"]["layers"]
    assert manifest["retrieval"]["words"] in (folder / "README.md").read_text()
    assert verify(folder)["raw"] == "unchanged" and "stands for layer 2 of" in said()[0]

    elsewhere = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], layers_to_transform=[0, 3], task_type="CAUSAL_LM")
    guarded(base, tmp_path / "elsewhere", peft_config=elsewhere, restore_on="never", final_export=False)
    assert "because no adapter is on the queries and keys of layers 2, which hold retrieval heads." in said()[1]


def test_restore_takes_the_choice_of_the_run_around_a_checkpoint(base, tmp_path, monkeypatch):
    all_right(monkeypatch)
    run = guarded(base, tmp_path)
    raw, out = run / "checkpoint-2", tmp_path / "out"
    manifest = restore_checkpoint(base, raw, out, layers="retrieval")
    assert restored_layers(base, raw, out) == {LAYER} and manifest["retrieval"]["layers"] == [LAYER]
    assert manifest["method"]["layers"] == [LAYER] and verify(out)["raw"] == "unchanged"
    (run / "_qkguard/retrieval.json").unlink()
    with pytest.raises(QKGuardError, match='layers="retrieval" needs a measurement of the model before SFT'):
        restore_checkpoint(base, raw, tmp_path / "other", layers="retrieval")
    assert not (tmp_path / "other").exists()


def test_a_fresh_training_does_not_leave_the_choice_of_an_earlier_one(base, tmp_path, monkeypatch):
    all_right(monkeypatch)
    run = guarded(base, tmp_path)
    args = arguments(tmp_path, max_steps=1, save_strategy="no")
    train(base, args, QKGuardCallback(**PROBES | {"probe_steps": 0}), processing_class=bpe_tokenizer())
    assert not (run / "_qkguard/retrieval.json").exists() and (run / "_qkguard/superseded/retrieval.json").is_file()
    assert load_run(run).retrieval is None


def test_settings() -> None:
    config = QKGuardConfig(layers="retrieval")
    assert config.wants_retrieval_layers and config.rows.layers is None and config.to_json()["layers"] == "retrieval"
    assert not QKGuardConfig(layers=[3]).wants_retrieval_layers
    with pytest.raises(QKGuardError, match=r'layers=.*expected a list of whole numbers >= 0 or "retrieval", or None'):
        QKGuardConfig(layers="all")
    typed, _ = guard_settings({}, ["--qkguard.layers", "retrieval"], None)
    assert typed.layers == "retrieval"
    assert guard_settings({"layers": "retrieval"}, [], Path("recipe.yaml"))[0].layers == "retrieval"
    assert guard_settings({}, ["--qkguard.layers", "3"], None)[0].layers == [3]
