"""The callback on adapters, in one process: what it writes, that PEFT loads it, and that it leaves training alone."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from qkguard import QKGuardCallback, QKGuardError, verify
from qkguard.adapters.restored import write_restored_adapter
from qkguard.layout import find_attention, select
from qkguard.offline.merge import merge_adapter
from tests.support import judge, oracle
from tests.support.lora import LINEAR, expected_merge, peft_merge, save_adapter
from tests.support.probing import bpe_tokenizer, no_floor
from tests.support.training import arguments, make_trainer, save_base, train

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("minimax", {"target_modules": LINEAR}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "o_proj"]}),
    "gated": ("qwen3_next", {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}
TOKENS = torch.arange(3, 23)[None]
# older ones misplace or refuse some adapters, whoever wrote them: seen in 5.0, 5.2 and 5.6
LOADS_ADAPTERS = Version(version("transformers")) >= Version("5.17")


def lora(**config: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | config)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def stock_loads(base: Path, adapter: Path, folder: Path) -> list[torch.Tensor]:
    """Logits of an adapter through PeftModel, through transformers' load_adapter and through PEFT's merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing adapter keys
        warnings.filterwarnings("ignore", message="(?!.*missing adapter keys)")
        first = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        out = [logits(first)]
        if LOADS_ADAPTERS:
            second = AutoModelForCausalLM.from_pretrained(base)
            second.load_adapter(str(adapter))
            out.append(logits(second))
        first.merge_and_unload(safe_merge=True).save_pretrained(folder)
    return [*out, logits(AutoModelForCausalLM.from_pretrained(folder))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_writes_adapters_and_merges_that_stock_peft_loads(tmp_path, kind):
    name, config = KINDS[kind]
    base = save_base(tmp_path / "base", name)
    guard = QKGuardCallback(strict=True, merge_at_end=True, routing_drift_steps=2)
    trainer = train(base, arguments(tmp_path, save_steps=2), guard, peft_config=lora(**config))
    run, final = tmp_path / "run", tmp_path / "run/_qkguard/final"
    peft = peft_merge(base, run / "checkpoint-3", tmp_path / "peft")
    wanted = expected_merge(name, base, peft)
    assert not oracle.differences(oracle.load_folder(final / "merged_raw"), peft)
    assert not oracle.differences(oracle.load_folder(final / "merged_qk_restored"), wanted)
    whole, merged = (
        logits(AutoModelForCausalLM.from_pretrained(final / m)) for m in ("merged_raw", "merged_qk_restored")
    )
    assert not torch.allclose(merged, whole, atol=1e-4), (
        "queries and keys made no difference: the check could not fail"
    )
    live, swap = guard.session.model, guard.session.weights.swap
    raw_logits = logits(live)
    with swap():
        assert torch.allclose(logits(live), merged, atol=2e-5), "what probes call restored is what was written"
    assert torch.equal(logits(live), raw_logits) and torch.allclose(raw_logits, whole, atol=2e-5)
    assert torch.equal(raw_logits, logits(trainer.model))
    for adapter in (run / "checkpoint-3/qk_restored/default", final / "qk_restored/default"):
        for i, got in enumerate(stock_loads(base, adapter, tmp_path / f"again-{adapter.parent.parent.name}")):
            assert torch.allclose(got, merged, atol=2e-5), i
        again = oracle.load_folder(tmp_path / f"again-{adapter.parent.parent.name}")
        assert not oracle.differences(again, wanted), "its merge is bit for bit ours"
        assert verify(adapter)["raw"] == "unchanged"
    for folder in ("merged_raw", "merged_qk_restored"):
        verify(final / folder, full=True)
        judge.no_private_paths(final / folder)
    judge.no_private_paths(final / "qk_restored/default")
    raw, kept = (load_file(p / "adapter_model.safetensors") for p in (run / "checkpoint-3", final / "raw/default"))
    assert not oracle.differences(raw, kept)
    rows = [r for r in judge.metrics_rows(run) if "qkguard/drift/q_rel" in r]
    assert [r["step"] for r in rows] == [1, 2, 3, 3] and rows[0]["qkguard/drift/q_rel"] < rows[2][
        "qkguard/drift/q_rel"
    ]
    assert rows[-1]["qkguard/drift/routing_rel"] > 0
    manifest = json.loads((final / "merged_raw/qkguard.json").read_text())
    for layer in manifest["layers"]:
        got = rows[-1][f"qkguard/drift/layer_{layer['layer']}/q_rel"]
        assert got == pytest.approx(layer["drift"]["q_rel"], rel=1e-4), "the files agree with what training logged"
    assert not [p.name for p in (run / "_qkguard").iterdir() if p.name.startswith("_")]
    assert not list(run.rglob("reference*")), "there is no reference to keep"


@pytest.mark.parametrize("dora", [False, True])
def test_bit_identical_with_and_without_the_guard(tmp_path, dora, monkeypatch):
    no_floor(monkeypatch)
    base = save_base(tmp_path / "base", "qwen3_next", vocab_size=1024, max_position_embeddings=256)
    probes = {"probe_steps": 1, "probe_lengths": [192], "probe_depths": 2, "probe_samples": 1, "probe_tasks": ["s1"]}
    outcomes = []
    for guard in (
        None,
        QKGuardCallback(routing_drift_steps=1, strict=True, merge_at_end=True, probe_budget=None, **probes),
    ):
        folder = tmp_path / str(bool(guard))
        settings = lora(target_modules=LINEAR, use_dora=dora, lora_dropout=0.2)
        model = AutoModelForCausalLM.from_pretrained(base)
        options = {"model": model, "processing_class": bpe_tokenizer(), "peft_config": settings}
        trainer = train(base, arguments(folder), guard, **options)
        tensors = load_file(folder / "run/checkpoint-3/adapter_model.safetensors")
        bits = {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}
        outcomes.append((trainer.recorder.rows, bits, torch.get_rng_state().tolist()))
    assert len(outcomes[0][0]) == 3 and outcomes[0] == outcomes[1]
    rows = judge.metrics_rows(folder / "run")
    assert [r["step"] for r in rows if "qkguard/niah/recall" in r] == [0, 1, 2, 3]
    assert [r["step"] for r in rows if "qkguard/niah_restored/recall" in r] == [3]
    # DoRA on gated queries has no restored adapter, the merge says the same
    written = "run/_qkguard/final/merged_qk_restored" if dora else "run/checkpoint-3/qk_restored/default"
    manifest = json.loads((folder / written / "qkguard.json").read_text())
    assert manifest["probe"]["raw"]["answer_logprob"] != manifest["probe"]["restored"]["answer_logprob"]


@pytest.mark.skipif(Version(version("peft")) < Version("0.20"), reason="this PEFT leaves fused experts out")
def test_adapters_on_fused_experts_are_restored_but_not_merged(tmp_path):
    base = save_base(tmp_path / "base", "qwen3_next")
    config = lora(target_modules="all-linear")
    train(base, arguments(tmp_path), QKGuardCallback(strict=True), peft_config=config)
    raw, restored = tmp_path / "run/checkpoint-3", tmp_path / "run/checkpoint-3/qk_restored/default"
    assert json.loads((raw / "adapter_config.json").read_text())["target_parameters"], "PEFT targets experts so"
    peft = peft_merge(base, raw, tmp_path / "peft")
    assert not oracle.differences(
        peft_merge(base, restored, tmp_path / "ours"), expected_merge("qwen3_next", base, peft)
    )
    with pytest.raises(QKGuardError, match="target_parameters"):
        merge_adapter(base, raw, tmp_path / "merged")
    with pytest.raises(QKGuardError, match="target_parameters"):
        train(base, arguments(tmp_path / "merging"), QKGuardCallback(merge_at_end=True), peft_config=config)


class Adapters(TrainerCallback):
    """The adapters that the model has when training starts."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.names = list(model.peft_config)


def test_resume_finds_only_the_original_adapters_and_the_same_losses(tmp_path):
    base = save_base(tmp_path / "base", "minimax")
    losses, names = [], []
    for guard in (None, QKGuardCallback(strict=True)):
        folder, seen = tmp_path / str(bool(guard)), Adapters()
        settings = lora(target_modules=LINEAR)
        train(base, arguments(folder, max_steps=2, save_steps=2), guard, peft_config=settings)
        if guard:
            assert (folder / "run/checkpoint-2/qk_restored/default/adapter_model.safetensors").is_file()
        trainer = make_trainer(base, arguments(folder, max_steps=4, save_steps=4), guard, peft_config=settings)
        trainer.add_callback(seen)
        trainer.train(resume_from_checkpoint=True)
        losses.append(trainer.recorder.rows)
        names.append(seen.names)
    assert names == [["default"], ["default"]]
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_several_adapters_each_get_their_restored_one(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    from peft import get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(target_modules=LINEAR))
    model.add_adapter("second", lora(target_modules=["v_proj", "q_proj"], r=2))
    train(base, arguments(tmp_path), QKGuardCallback(strict=True), model=model)
    restored = tmp_path / "run/checkpoint-3/qk_restored"
    assert sorted(p.name for p in restored.iterdir()) == ["default", "second"]
    for name, raw in (("default", tmp_path / "run/checkpoint-3"), ("second", tmp_path / "run/checkpoint-3/second")):
        kept = load_file(restored / name / "adapter_model.safetensors")
        before = load_file(raw / "adapter_model.safetensors")
        assert {k for k in before if "q_proj" not in k and "k_proj" not in k} == set(kept)
        assert all(oracle.same_bits(kept[k], before[k]) for k in kept)
        assert any(
            "q_proj" in m for m in json.loads((restored / name / "adapter_config.json").read_text())["exclude_modules"]
        )


def test_adapters_beside_queries_and_keys_cannot_drift(tmp_path, caplog, monkeypatch):
    base = save_base(tmp_path / "base", "minimax")
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    caplog.set_level(logging.INFO, logger="qkguard")
    guard = QKGuardCallback(strict=True, merge_at_end=True)
    train(base, arguments(tmp_path), guard, peft_config=lora(target_modules=["v_proj"]))
    assert "cannot drift" in caplog.text
    assert not (tmp_path / "run/checkpoint-3/qk_restored").exists()
    final = tmp_path / "run/_qkguard/final"
    assert sorted(p.name for p in final.iterdir()) == ["merged_raw", "raw"]


def test_fused_dora_has_no_restored_adapter_but_a_merge(tmp_path, caplog, monkeypatch):
    base = save_base(tmp_path / "base", "phi3")
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    guard = QKGuardCallback(merge_at_end=True)
    caplog.set_level(logging.INFO, logger="qkguard")
    config = lora(target_modules=["qkv_proj"], use_dora=True)
    train(base, arguments(tmp_path), guard, peft_config=config)
    assert "Restored adapters: none" in caplog.text
    assert caplog.text.count("has no restored form") == 1 and "qkv_proj" in caplog.text
    with pytest.raises(QKGuardError, match="set merge_at_end=True"):
        train(base, arguments(tmp_path / "strict"), QKGuardCallback(strict=True), peft_config=config)
    run, final = tmp_path / "run", tmp_path / "run/_qkguard/final"
    assert not (run / "checkpoint-3/qk_restored").exists() and not (final / "qk_restored").exists()
    peft = peft_merge(base, run / "checkpoint-3", tmp_path / "peft")
    assert not oracle.differences(oracle.load_folder(final / "merged_raw"), peft)
    wanted = expected_merge("phi3", base, peft)
    assert not oracle.differences(oracle.load_folder(final / "merged_qk_restored"), wanted)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]}, "trained whole"),
        ({"target_modules": LINEAR, "bias": "all"}, "bias='all'"),
        ({"target_modules": LINEAR, "init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_what_is_not_guarded_is_refused_before_the_first_step(tmp_path, config, message):
    base = save_base(tmp_path / "base", "llama")
    with pytest.raises(QKGuardError, match=message):
        train(base, arguments(tmp_path), QKGuardCallback(), peft_config=lora(**config))
    assert not (tmp_path / "run/checkpoint-3").exists()


def test_an_empty_tensor_stops_the_write(tmp_path, monkeypatch):
    from qkguard.training import adapter_weights

    base = save_base(tmp_path / "base", "llama")
    original = adapter_weights.assemble_restored_adapter

    def after_a_broken_save(raw: Path, *args: Any, **kwargs: Any) -> Any:
        tensors = load_file(raw / "adapter_model.safetensors")
        tensors[next(k for k in tensors if "v_proj.lora_B" in k)] = torch.empty(0)
        save_file(tensors, raw / "adapter_model.safetensors")
        return original(raw, *args, **kwargs)

    monkeypatch.setattr(adapter_weights, "assemble_restored_adapter", after_a_broken_save)
    with pytest.raises(QKGuardError, match=r"empty or were cut into pieces, first .*v_proj\.lora_B"):
        train(base, arguments(tmp_path), QKGuardCallback(strict=True), peft_config=lora(target_modules=LINEAR))
    assert not (tmp_path / "run/checkpoint-3/qk_restored/default").exists()
    assert not [p for p in (tmp_path / "run/_qkguard").iterdir() if p.name.startswith("_")]


@pytest.mark.parametrize("kind", ["lora", "fused"])
def test_alpha_scales_the_adapter_as_the_merge_does(tmp_path, kind):
    name, config = KINDS[kind]
    base = save_base(tmp_path / "base", name)
    adapter = save_adapter(base, tmp_path / "adapter", **config | {"alpha_pattern": {"v_proj": 3}})
    write_restored_adapter(adapter, tmp_path / "scaled", select(find_attention(base)), share=0.5)
    merge_adapter(base, adapter, tmp_path / "merged", alpha=0.5)
    peft = peft_merge(base, tmp_path / "scaled", tmp_path / "peft")
    assert not oracle.differences(oracle.load_folder(tmp_path / "merged"), peft)
    verify(tmp_path / "scaled")
    whole = peft_merge(base, adapter, tmp_path / "whole")
    assert oracle.differences(peft, whole), "alpha changed nothing"


def test_verify_finds_a_changed_adapter_and_a_changed_raw(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    selection = select(find_attention(base))
    write_restored_adapter(adapter, tmp_path / "out", selection)
    verify(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    tensors = load_file(tmp_path / "copy/adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, tmp_path / "copy/adapter_model.safetensors")
    with pytest.raises(QKGuardError, match="differs from what its manifest records"):
        verify(tmp_path / "copy")
    save_adapter(base, adapter, seed=9, target_modules=LINEAR)
    with pytest.raises(QKGuardError, match="raw adapter has changed"):
        verify(tmp_path / "out")
    assert verify(tmp_path / "out", raw=False)["raw"] == "not checked"
    with pytest.raises(QKGuardError, match="queries and keys alone"):
        alone = save_adapter(base, tmp_path / "alone", target_modules=["q_proj"])
        write_restored_adapter(alone, tmp_path / "nothing", selection)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_a_quantised_base_are_merged_onto_the_unquantised_one(tmp_path, bits, caplog, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from peft import get_peft_model
    from peft.utils.integrations import dequantize_module_weight
    from transformers import BitsAndBytesConfig

    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    caplog.set_level(logging.INFO, logger="qkguard")
    base = save_base(tmp_path / "base", "llama")
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["lm_head"])
    losses = []
    for guard in (None, QKGuardCallback(strict=True, merge_at_end=True, routing_drift_steps=1)):
        quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
        torch.manual_seed(0)
        model = get_peft_model(quantised, lora(target_modules=["q_proj", "v_proj"]))
        trainer = train(base, arguments(tmp_path if guard else tmp_path / "plain"), guard, model=model)
        losses.append(trainer.recorder.rows)
    assert losses[0] == losses[1]
    assert f"onto {base}" in caplog.text and "dequantised" in caplog.text
    run, final = tmp_path / "run", tmp_path / "run/_qkguard/final"
    peft = peft_merge(base, run / "checkpoint-3", tmp_path / "peft")
    assert not oracle.differences(oracle.load_folder(final / "merged_raw"), peft)
    wanted = expected_merge("llama", base, peft)
    assert not oracle.differences(oracle.load_folder(final / "merged_qk_restored"), wanted)
    manifest = json.loads((final / "merged_qk_restored/qkguard.json").read_text())
    assert any("trained on a quantised base" in w for w in manifest["warnings"])
    last = [r for r in judge.metrics_rows(run) if "qkguard/drift/routing_rel" in r][-1]
    layer = model.base_model.model.model.layers[2].self_attn.q_proj
    delta = (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * layer.scaling["default"]
    )
    want = float(delta.detach().norm() / dequantize_module_weight(layer.base_layer).double().norm())
    assert last["qkguard/drift/layer_2/q_rel"] == pytest.approx(want, rel=1e-7)
    assert last["qkguard/drift/layer_2/k_rel"] == 0.0
    quantised.save_pretrained(tmp_path / "four")
    with pytest.raises(QKGuardError, match="unquantised checkpoint"):
        merge_adapter(tmp_path / "four", run / "checkpoint-3", tmp_path / "merged")
