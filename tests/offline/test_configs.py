"""Configs side by side: every key that may matter is named in a line of its own, harmless ones are not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qkguard.errors import QKGuardError
from qkguard.offline.configs import compare_configs, read_config
from qkguard.offline.drift_report import drift_report
from qkguard.offline.pair import open_folders, pair_warnings
from qkguard.offline.restore import restore_checkpoint
from tests.support.models import save_pair, tiny_config


def config(name: str, **changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(tiny_config(name, **changes).to_dict()))


MATTERS: dict[str, tuple[str, Any, Any]] = {
    "attention_multiplier": ("granitemoehybrid", 1.0, 0.5),
    "query_pre_attn_scalar": ("gemma2", 256, 144),
    "attn_logit_softcapping": ("gemma2", 50.0, None),
    "final_logit_softcapping": ("gemma2", 30.0, 20.0),
    "max_position_embeddings": ("llama", 128, 4096),
    "sliding_window": ("gemma2", 4096, 512),
    "residual_multiplier": ("granitemoehybrid", 1.0, 0.22),
    "logits_scaling": ("granitemoehybrid", 1.0, 8.0),
    "attention_bias": ("llama", False, True),
    "rms_norm_eps": ("llama", 1e-6, 1e-5),
}


@pytest.mark.parametrize("key", MATTERS)
def test_a_key_that_matters_is_one_line(key: str) -> None:
    name, before, after = MATTERS[key]
    if name == "gemma2":
        from transformers import Gemma2Config

        plain = json.loads(json.dumps(Gemma2Config().to_dict()))
    else:
        plain = config(name)
    (line,) = compare_configs(plain | {key: before}, plain | {key: after})
    assert line.startswith(f"{key} is {before} in the base but {after} in the tuned model")
    assert compare_configs(plain | {key: after}, plain | {key: after}) == []


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("attn_logits_scaling", "hype", "hype 500"),
        ("attn_logits_scaling", None, "hype 500"),
        ("attention_chunk_size", 8192, 4096),
        ("no_rope_layers", [1, 1, 1, 0], [1, 1, 1, 1]),
    ],
)
def test_keys_of_models_that_are_not_part_of_transformers(key: str, before: Any, after: Any) -> None:
    plain = {"model_type": "hypenet", "hidden_size": 64}
    (line,) = compare_configs(plain | ({key: before} if before else {}), plain | {key: after})
    assert line.startswith(f"{key} is {before or 'not set'} in the base but {after} in the tuned")
    assert ("other positions" in line) == (key != "attn_logits_scaling")


def test_nested_configs_are_compared_key_by_key() -> None:
    plain = config("llama")
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
    lines = compare_configs(plain, plain | {"rope_parameters": scaled})
    assert sorted(line.split(" is ")[0] for line in lines) == [
        "rope_parameters.factor",
        "rope_parameters.rope_theta",
        "rope_parameters.rope_type",
    ]
    assert all("trained for other positions" in line for line in lines)


def test_a_config_of_the_attention_itself_is_compared() -> None:
    from transformers import MptConfig

    def mpt(**attention: Any) -> dict[str, Any]:
        return json.loads(json.dumps(MptConfig(attn_config=attention).to_dict()))

    (line,) = compare_configs(mpt(), mpt(clip_qkv=4.0))
    assert line.startswith("attn_config.clip_qkv is None in the base but 4.0 in the tuned model")
    (line,) = compare_configs(mpt(), {"no_bias": False} | mpt(softmax_scale=0.5))
    assert line.startswith("attn_config.softmax_scale is None in the base but 0.5")
    older = {key: value for key, value in mpt(softmax_scale=0.5).items() if key != "no_bias"}
    (line,) = compare_configs(mpt(), older)
    assert line.startswith("attn_config.softmax_scale")
    plain = config("llama")
    assert compare_configs(plain | {"vision_config": {"depth": 1}}, plain | {"vision_config": {"depth": 2}}) == []


def test_text_configs_are_compared(tmp_path: Path) -> None:
    text = config("qwen3_5_text")
    for name, changes in (("a", {}), ("b", {"rms_norm_eps": 1e-3})):
        (tmp_path / name).mkdir()
        nested = {"model_type": "qwen3_5", "text_config": text | changes, "vision_config": {"depth": len(name) + 1}}
        (tmp_path / name / "config.json").write_text(json.dumps(nested))
    (line,) = compare_configs(read_config(tmp_path / "a"), read_config(tmp_path / "b"))
    assert line.startswith("rms_norm_eps is 1e-06 in the base but 0.001")
    assert compare_configs(read_config(tmp_path / "a"), text) == [], "a text model tuned from it"


def test_older_spellings_and_defaults_left_out_are_no_differences() -> None:
    today = config("llama", rope_theta=20000.0)
    older = {k: v for k, v in today.items() if k not in ("rope_parameters", "head_dim", "attention_bias", "mlp_bias")}
    older |= {"rope_theta": today["rope_parameters"]["rope_theta"], "rope_scaling": None}
    assert today["rope_parameters"]["rope_theta"] == 20000.0
    assert compare_configs(older, today) == []
    (line,) = compare_configs(older | {"rope_theta": 10000.0}, today)
    assert "rope_theta is 10000.0 in the base but 20000.0" in line


def test_harmless_keys_are_silent_and_other_architectures_refused() -> None:
    plain = config("llama")
    changes = {"use_cache": False, "dtype": "bfloat16", "transformers_version": "4.0", "pad_token_id": 7}
    changes |= {"attention_dropout": 0.1, "vocab_size": 300, "tie_word_embeddings": True, "architectures": ["X"]}
    assert compare_configs(plain, plain | changes) == []
    with pytest.raises(QKGuardError, match="hidden_size is 64 in the base and 32"):
        compare_configs(plain, plain | {"hidden_size": 32})
    with pytest.raises(QKGuardError, match="The base is a llama model, the tuned one qwen3"):
        compare_configs(plain, plain | {"model_type": "qwen3"})


def test_restore_and_training_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    from transformers import AutoModelForCausalLM

    from tests.training.test_loader_check import start

    base, tuned = save_pair(tmp_path, "granitemoehybrid")
    changed = json.loads((base / "config.json").read_text()) | {"attention_multiplier": 0.25}
    (base / "config.json").write_text(json.dumps(changed))
    manifest = restore_checkpoint(base, tuned, tmp_path / "out")
    assert "attention_multiplier is 0.25 in the base but 1.0" in manifest["warnings"][0]
    assert drift_report(base, tuned, routing=False)["warnings"] == manifest["warnings"]
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="qkguard"):
        start(AutoModelForCausalLM.from_pretrained(tuned), tmp_path / "run", base_model=str(base))
    assert ["attention_multiplier is 0.25" in record.getMessage() for record in caplog.records] == [True]


def test_tied_embeddings_stored_twice_and_apart_are_mentioned(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", tie_word_embeddings=True)
    assert pair_warnings(open_folders(base, tuned)) == []
    tensors = load_file(tuned / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    assert pair_warnings(open_folders(base, tuned)) == [], "the same bytes twice, as DeepSpeed's ZeRO-2 writes them"
    tensors["lm_head.weight"][200, 3] += 1
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    (line,) = pair_warnings(open_folders(base, tuned))
    assert "tuned stores tied embeddings twice" in line and "lm_head.weight" in line and "they differ" in line
    config = json.loads((tuned / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tuned / "config.json").write_text(json.dumps(config))
    assert pair_warnings(open_folders(base, tuned)) == []
