"""The callback in one process: what it writes, when it refuses, and that it leaves training alone."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from qkguard import QKGuardCallback, QKGuardConfig, QKGuardError
from qkguard.checkpoint.manifest import reference_of
from tests.support import judge, oracle
from tests.support.models import noised
from tests.support.training import arguments, make_trainer, save_base, train

FP32 = torch.float32


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "minimax")


def check_pair(base: Path, raw: Path, restored: Path, name: str = "minimax") -> None:
    judge.judge_restored(name, base, raw, restored, FP32)
    _, info = AutoModelForCausalLM.from_pretrained(restored, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_sft_run_writes_reference_metrics_and_both_checkpoints(base, tmp_path):
    train(base, arguments(tmp_path, save_steps=2), QKGuardCallback(routing_drift_steps=2, strict=True))
    run = tmp_path / "run"
    for step in (2, 3):
        check_pair(base, run / f"checkpoint-{step}", run / f"checkpoint-{step}/qk_restored")
    check_pair(base, run / "_qkguard/final/raw", run / "_qkguard/final/qk_restored")
    for folder in (run / "checkpoint-3/qk_restored", run / "_qkguard/final/qk_restored"):
        judge.no_private_paths(folder)
        assert reference_of(folder) == run / "_qkguard/reference.safetensors"
    assert (run / "_qkguard/final/raw/tokenizer.json").is_file()
    rows = judge.metrics_rows(run)
    drift = [r for r in rows if "qkguard/drift/q_rel" in r]
    assert [r["step"] for r in drift] == [1, 2, 3, 3], "every logging step, and once at the end"
    assert drift[0]["qkguard/drift/q_rel"] < drift[2]["qkguard/drift/q_rel"]
    for part in "qk":
        wanted = judge.drift_by_layer("minimax", part, base, run / "checkpoint-3", FP32)
        assert sorted(wanted) == [1, 3]
        for layer, value in wanted.items():
            assert drift[-1][f"qkguard/drift/layer_{layer}/{part}_rel"] == pytest.approx(value, rel=1e-6)
    routing = [r for r in rows if "qkguard/drift/routing_rel" in r]
    assert [r["step"] for r in routing] == [2, 3]
    heads = routing[-1]["routing_rel_per_head"]["layer_3"]
    q, k = (oracle.load_folder(run / "checkpoint-3")[f"model.layers.3.self_attn.{p}_proj.weight"] for p in "qk")
    q0, k0 = (oracle.load_folder(base)[f"model.layers.3.self_attn.{p}_proj.weight"] for p in "qk")
    for h, got in enumerate(heads):
        now, before = (a.double()[16 * h : 16 * h + 16].T @ b.double()[16 * (h // 2) : 16 * (h // 2) + 16]
                       for a, b in ((q, k), (q0, k0)))  # fmt: skip
        assert got == pytest.approx(float((now - before).norm() / before.norm()), rel=1e-6)
    kinds = [f"qkguard/overhead/{kind}_seconds" for kind in ("save", "save_background", "drift")]
    assert all(sum(kind in row for kind in kinds) == 1 for row in rows)
    assert [[row["step"] for row in rows if kind in row] for kind in kinds[:2]] == [[2, 3, 3], [3, 3]]
    manifest = json.loads((run / "checkpoint-3/qk_restored/qkguard.json").read_text())
    assert manifest["step"] == 3 and manifest["drift"]["qkguard/drift/q_rel"] == drift[2]["qkguard/drift/q_rel"]
    assert not [p for p in (run / "_qkguard").iterdir() if p.name.startswith("_")]


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_bit_identical_with_and_without_the_guard(tmp_path, name):
    base = save_base(tmp_path / "base", name)
    outcomes = []
    for guard in (None, QKGuardCallback(routing_drift_steps=1, strict=True)):
        model = AutoModelForCausalLM.from_pretrained(base, attention_dropout=0.2)
        folder = tmp_path / str(bool(guard))
        options = {"gradient_checkpointing": True, "model": model} if name == "llama" else {"model": model}
        args = arguments(folder, gradient_checkpointing=options.pop("gradient_checkpointing", False))
        trainer = train(base, args, guard, **options)
        state = judge.weights_in_bits(folder / "run/checkpoint-3")
        outcomes.append((trainer.recorder.rows, state, torch.get_rng_state().tolist()))
    assert len(outcomes[0][0]) == 3 and outcomes[0] == outcomes[1]
    assert outcomes[0][1] != judge.weights_in_bits(base)


def test_trainer_add_callback_and_model_built_before_the_arguments(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = make_trainer(base, arguments(tmp_path, TrainingArguments), model=model)
    trainer.add_callback(QKGuardCallback(strict=True))
    trainer.train()
    check_pair(base, tmp_path / "run/checkpoint-3", tmp_path / "run/checkpoint-3/qk_restored")


def test_drift_follows_epochs_where_logging_does(base, tmp_path):
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, logging_strategy="epoch", save_strategy="no")
    trainer = train(base, args, QKGuardCallback(strict=True))
    per_epoch = trainer.state.max_steps // 2
    steps = [r["step"] for r in judge.metrics_rows(tmp_path / "run") if "qkguard/drift/q_rel" in r]
    assert steps == [per_epoch, 2 * per_epoch, 2 * per_epoch]


def test_every_node_writes_its_own_files(base, tmp_path):
    train(base, arguments(tmp_path, save_on_each_node=True), guard := QKGuardCallback(strict=True))
    assert guard.session.writers.each_node
    check_pair(base, tmp_path / "run/checkpoint-3", tmp_path / "run/checkpoint-3/qk_restored")


@pytest.mark.parametrize(
    ("options", "saves", "said"),
    [
        ({"restore_on": "end"}, [], "restored models (restore) at the end."),
        ({"restore_on": "never"}, [], "restored models (restore) never."),
        ({"restore_on": "save", "final_export": False}, [1, 2, 3], "restored models (restore) at every save."),
    ],
)
def test_when_restored_folders_are_written(base, tmp_path, options, saves, said, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    caplog.set_level(logging.INFO, logger="qkguard")
    train(base, arguments(tmp_path, save_steps=1), QKGuardCallback(strict=True, **options))
    assert said in caplog.text
    run = tmp_path / "run"
    assert sorted(int(p.parent.name[11:]) for p in run.glob("checkpoint-*/qk_restored")) == saves
    exported = options.get("final_export", True) and options["restore_on"] != "never"
    assert (run / "_qkguard/final/qk_restored/qkguard.json").exists() == exported


def test_no_saves_at_all_still_exports(base, tmp_path):
    train(base, arguments(tmp_path, save_strategy="no"), QKGuardCallback(strict=True))
    final = tmp_path / "run/_qkguard/final"
    check_pair(base, final / "raw", final / "qk_restored")


def test_best_and_load_best_model_at_end(base, tmp_path):
    from tests.support.training import token_rows

    args = arguments(
        tmp_path,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_total_limit=1,
        save_only_model=True,
        learning_rate=0.3,
    )
    guard = QKGuardCallback(restore_on="best", strict=True)
    trainer = train(base, args, guard, eval_dataset=token_rows(8))
    best = Path(trainer.state.best_model_checkpoint)
    check_pair(base, best, best / "qk_restored")
    final = tmp_path / "run/_qkguard/final"
    assert judge.weights_in_bits(final / "raw") == judge.weights_in_bits(best)
    check_pair(base, final / "raw", final / "qk_restored")
    assert list((tmp_path / "run").glob("checkpoint-*/qk_restored")) == [best / "qk_restored"]


def test_rotation_counts_only_raw_checkpoints(base, tmp_path):
    train(base, arguments(tmp_path, save_steps=1, max_steps=4, save_total_limit=2), QKGuardCallback(strict=True))
    left = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert left == ["checkpoint-3", "checkpoint-4"]
    for name in left:
        check_pair(base, tmp_path / "run" / name, tmp_path / "run" / name / "qk_restored")


def test_resume_keeps_the_first_reference_and_sets_a_left_branch_aside(base, tmp_path):
    args = {"save_steps": 1, "max_steps": 3}
    train(base, arguments(tmp_path, **args), QKGuardCallback(strict=True))
    run = tmp_path / "run"
    before = (run / "checkpoint-3").stat().st_mtime_ns
    trainer = make_trainer(base, arguments(tmp_path, **args), guard := QKGuardCallback(strict=True))
    seen = {}
    guard_begin = guard.on_train_begin

    def begin(*a, **k):
        guard_begin(*a, **k)
        seen["aside"] = sorted(p.name for p in (run / "_qkguard/superseded").iterdir())
        seen["mtime"] = (run / "checkpoint-3").stat().st_mtime_ns

    guard.on_train_begin = begin
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert seen["aside"] == ["checkpoint-2", "checkpoint-3", "final"] and seen["mtime"] == before
    assert "resumed" in guard.session.weights.origin
    check_pair(base, run / "checkpoint-3", run / "checkpoint-3/qk_restored")
    steps = [r["step"] for r in judge.metrics_rows(run) if "qkguard/drift/q_rel" in r]
    assert steps == [1, 2, 3, 3], "rows of the branch that was left are gone"


def test_resume_without_or_with_a_changed_reference_stops(base, tmp_path):
    train(base, arguments(tmp_path, save_steps=2), QKGuardCallback(strict=True))
    file = tmp_path / "run/_qkguard/reference.safetensors"
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[-1] ^= 1
    for data, message in ((changed, "has changed since"), (whole[:-8], "cannot be read"), (None, "is missing")):
        file.unlink() if data is None else file.write_bytes(bytes(data))
        with pytest.raises(QKGuardError, match=message) as error:
            train(base, arguments(tmp_path, max_steps=5), QKGuardCallback(), resume=True)
        assert "base_model=" in str(error.value)
    train(base, arguments(tmp_path, max_steps=5), QKGuardCallback(base_model=str(base), strict=True), resume=True)
    check_pair(base, tmp_path / "run/checkpoint-5", tmp_path / "run/checkpoint-5/qk_restored")


def test_second_train_call_keeps_the_first_reference(base, tmp_path):
    trainer = make_trainer(base, arguments(tmp_path), guard := QKGuardCallback(strict=True))
    trainer.train()
    first = guard.session
    trainer.train()
    assert guard.session is first
    assert (tmp_path / "run/_qkguard/metrics-1.jsonl").exists(), "the first training's metrics are kept"
    check_pair(base, tmp_path / "run/checkpoint-3", tmp_path / "run/checkpoint-3/qk_restored")


def test_two_trainings_in_one_process_with_one_callback(base, tmp_path):
    guard = QKGuardCallback(strict=True)
    for part, name in (("a", "minimax"), ("b", "llama")):
        start = base if name == "minimax" else save_base(tmp_path / "llama", "llama")
        train(start, arguments(tmp_path / part), guard)
        run = tmp_path / part / "run"
        check_pair(start, run / "checkpoint-3", run / "checkpoint-3/qk_restored", name)


def test_a_restart_reuses_an_equal_reference_and_refuses_another(base, tmp_path):
    train(base, arguments(tmp_path), QKGuardCallback(strict=True))
    train(base, arguments(tmp_path), again := QKGuardCallback(strict=True))
    assert "bit-equal" in again.session.weights.origin
    other = noised(AutoModelForCausalLM.from_pretrained(base), seed=5)
    other.config._name_or_path = ""
    with pytest.raises(QKGuardError, match="reference of another run"):
        train(base, arguments(tmp_path), QKGuardCallback(), model=other)


def test_weights_that_are_not_their_checkpoints_stop_the_run(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():  # what a loader that skips a tensor leaves behind
        model.model.layers[3].self_attn.k_proj.weight[5, 7] += 1e-3
    with pytest.raises(QKGuardError, match=r"1 of 4 query/key parameters .*layers\.3\.self_attn\.k_proj"):
        train(base, arguments(tmp_path), QKGuardCallback(), model=model)
    train(base, arguments(tmp_path / "live"), QKGuardCallback(base_model="live", strict=True), model=model)


@pytest.mark.parametrize("inside", ["checkpoint-3", "checkpoint-3/qk_restored", "_qkguard/final/raw"])
def test_a_guarded_checkpoint_is_not_taken_for_pre_sft(base, tmp_path, inside):
    train(base, arguments(tmp_path), QKGuardCallback(strict=True))
    start = tmp_path / "run" / inside
    with pytest.raises(QKGuardError, match="not the model before SFT"):
        train(start, arguments(tmp_path / "next"), QKGuardCallback())
    guard = QKGuardCallback(base_model=str(base), strict=True)
    train(start, arguments(tmp_path / "named"), guard)
    run = tmp_path / "named/run"
    check_pair(base, run / "checkpoint-3", run / "checkpoint-3/qk_restored")


def test_save_by_hand(base, tmp_path):
    guard = QKGuardCallback(strict=True)
    with pytest.raises(QKGuardError, match="when train"):
        guard.save(None, tmp_path / "x")
    trainer = train(base, arguments(tmp_path, save_strategy="no"), guard)
    guard.save(trainer, tmp_path / "mine")
    check_pair(base, tmp_path / "mine", tmp_path / "mine/qk_restored")


def test_nan_weights_are_reported(base, tmp_path, caplog):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.model.layers[3].self_attn.k_proj.weight.data[0, 0] = float("nan")

    trainer = make_trainer(base, arguments(tmp_path), QKGuardCallback(strict=True))
    trainer.add_callback(Poison())
    logging.getLogger("qkguard").propagate = True
    with caplog.at_level(logging.WARNING, logger="qkguard"):
        trainer.train()
    assert "not a number" in caplog.text
    text = (tmp_path / "run/_qkguard/metrics.jsonl").read_text()
    assert "null" in text and "NaN" not in text and "Infinity" not in text, "strict JSON"
    assert (tmp_path / "run/_qkguard/report.html").is_file()
    manifest = json.loads((tmp_path / "run/checkpoint-3/qk_restored/qkguard.json").read_text())
    assert "NaN" in json.dumps(manifest["warnings"])


def test_a_failed_write_lets_training_go_on_unless_strict(base, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qkguard.checkpoint.shares.write_files", full)
    logging.getLogger("qkguard").propagate = True
    with caplog.at_level(logging.ERROR, logger="qkguard"):
        trainer = train(base, arguments(tmp_path), QKGuardCallback())
    assert trainer.state.global_step == 3 and "No space left" in caplog.text and "qkguard restore" in caplog.text
    assert not list((tmp_path / "run").glob("**/qk_restored"))
    with pytest.raises(OSError, match="No space left"):
        train(base, arguments(tmp_path / "strict"), QKGuardCallback(strict=True))


def test_a_guard_that_measures_nothing_has_nothing_to_report(base, tmp_path, caplog):
    nothing = {"drift_steps": 0, "routing_drift_steps": 0, "probe_steps": 0, "restore_on": "never"}
    logging.getLogger("qkguard").propagate = True
    with caplog.at_level(logging.INFO, logger="qkguard"):
        train(base, arguments(tmp_path), QKGuardCallback(strict=True, **nothing))
    assert not (tmp_path / "run/_qkguard/report.html").exists() and "page" not in caplog.text
    train(base, arguments(tmp_path / "drift"), QKGuardCallback(strict=True, **nothing | {"drift_steps": 1}))
    assert (tmp_path / "drift/run/_qkguard/report.html").exists()


def test_drift_that_cannot_be_measured_does_not_end_training_unless_strict(base, tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr("qkguard.training.drift_monitor.difference_sums", broken)
    logging.getLogger("qkguard").propagate = True
    with caplog.at_level(logging.ERROR, logger="qkguard"):
        trainer = train(base, arguments(tmp_path), QKGuardCallback())
    assert trainer.state.global_step == 3 and "Measuring drift at step 3 failed: RuntimeError: boom" in caplog.text
    assert (tmp_path / "run/_qkguard/final/qk_restored/qkguard.json").is_file(), (
        "the last step's failure costs nothing"
    )
    with pytest.raises(RuntimeError, match="boom"):
        train(base, arguments(tmp_path / "strict"), QKGuardCallback(strict=True))


def test_hub_uploads_see_nothing_of_ours(base, tmp_path, monkeypatch):
    """With every hub strategy the upload of a checkpoint starts before ours is there, and lists nothing half-made."""
    from transformers import Trainer

    seen = []

    def upload(self, folder):
        output = Path(self.args.output_dir)
        visible = [
            p for p in output.rglob("*") if not any(part.startswith("_") for part in p.relative_to(output).parts)
        ]
        seen.append([str(p.relative_to(output)) for p in visible if "qk" in p.name.lower()])

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", upload)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *a, **k: None)
    args = arguments(tmp_path, TrainingArguments, save_steps=3, push_to_hub=True, hub_strategy="all_checkpoints")
    monkeypatch.setattr(Trainer, "push_to_hub", lambda *a, **k: None)
    train(base, args, QKGuardCallback(strict=True))
    assert seen and not any(seen), seen


def test_tied_embeddings_and_bfloat16_files(tmp_path):
    base = save_base(tmp_path / "base", "llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    train(base, arguments(tmp_path, model_init_kwargs={"dtype": "float32"}), QKGuardCallback(strict=True))
    run = tmp_path / "run"
    check_pair(base, run / "checkpoint-3", run / "checkpoint-3/qk_restored", "llama")
    assert "lm_head.weight" not in oracle.load_folder(run / "checkpoint-3/qk_restored")


def test_a_compiled_model_is_restored_under_names_that_load(base, tmp_path):
    """Its raw checkpoint has `_orig_mod.` names, which from_pretrained fills at random."""
    model = torch.compile(AutoModelForCausalLM.from_pretrained(base), backend="eager")
    args = arguments(tmp_path, TrainingArguments, remove_unused_columns=False)
    train(base, args, QKGuardCallback(strict=True, probe_steps=0), model=model)
    run = tmp_path / "run"
    raw = oracle.load_folder(run / "checkpoint-3")
    assert all(name.startswith("_orig_mod.") for name in raw)
    restored = oracle.load_folder(run / "checkpoint-3/qk_restored")
    tuned = {name.removeprefix("_orig_mod."): tensor for name, tensor in raw.items()}
    assert not oracle.differences(restored, oracle.expected("minimax", oracle.load_folder(base), tuned, FP32))
    _, info = AutoModelForCausalLM.from_pretrained(run / "checkpoint-3/qk_restored", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_settings_are_checked_at_once():
    for bad, message in (
        ({"restore_on": "often"}, "restore_on='often'.*save.*best"),
        ({"drift_steps": "sometimes"}, "drift_steps"),
        ({"projections": ["v"]}, "projections"),
        ({"layers": []}, "layers"),
        ({"method": "magic"}, "method"),
        ({"drift_step": 3}, "drift_step"),
    ):
        with pytest.raises(QKGuardError, match=message):
            QKGuardCallback(**bad)
    assert QKGuardCallback(QKGuardConfig(drift_steps="5"), restore_on="end").config.drift_steps == 5


def test_models_without_the_asked_layers_are_refused(base, tmp_path):
    with pytest.raises(QKGuardError, match=r"Layers \[0\] have no softmax attention; those that have it: "):
        train(base, arguments(tmp_path), QKGuardCallback(layers=[0, 3]))


def test_temporary_names_never_survive(base, tmp_path):
    """Nothing the guard leaves in output_dir but `_qkguard`, and nothing beginning with `_` inside checkpoints."""
    train(base, arguments(tmp_path), QKGuardCallback(strict=True))
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir() if "qkguard" in p.name} == {"_qkguard"}
    assert not list((run / "checkpoint-3").rglob("_*"))


def test_the_start_is_told_in_four_short_lines(base, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="qkguard")
    train(base, arguments(tmp_path, save_steps=1), QKGuardCallback(strict=True, probe_steps=0, final_export=False))
    lines = [record.getMessage() for record in caplog.records][:4]
    assert [line.split(":")[0] for line in lines] == ["Layers", "Reference", "Schedule", "Files"]
    assert lines[0].startswith("Layers: the queries and keys of 2 softmax-attention layers (1, 3) of 4; ")
    assert re.search(r"[\d,]+ elements, [\d.]+ KB in CPU memory\.$", lines[0])
    assert re.fullmatch(
        r"Reference: taken from the live weights; in run/_qkguard/reference.safetensors \(set up in [\d.]+ s\)\.",
        lines[1],
    )
    assert lines[2] == (
        "Schedule: drift every logging step, routing drift every 100 steps, recall never, restored models (restore) "
        "at every save."
    )
    assert lines[3] == "Files: checkpoint-N/qk_restored; metrics in run/_qkguard/metrics.jsonl."
