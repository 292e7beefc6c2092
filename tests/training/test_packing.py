"""Packing is allowed exactly where sequence boundaries reach every layer that mixes tokens over time."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qkguard import QKGuardCallback
from qkguard.errors import QKGuardError
from qkguard.sft.recipes import recipes_folder
from qkguard.training.packing import IGNORES, KEEPS_APART, PIP_NAMES, check_packing, packing_warnings
from tests.support.training import arguments, save_base, train
from tests.support.zoo import tiny_config

# functions of a modelling module that mix tokens, and the argument of their kernels that says where sequences begin
BOUNDARY = {
    "causal_conv1d_fn": "seq_idx",
    "mamba2_split_conv1d_scan_combined": "seq_idx",
    "mamba2_chunk_scan": "seq_idx",
    "torch_chunk_gated_delta_rule": "cu_seqlens",
    "chunk_kimi_delta_attention": "cu_seqlens",
}


def arriving(model_type: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Mixing function -> boundary arguments it got in a forward pass on two packed samples, as TRL passes them."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    own = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2} if model_type == "lfm2" else {}
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **own)).train()
    module: Any = importlib.import_module(type(model).__module__)
    seen: dict[str, set[str]] = {}

    def watched(name: str, original: Any) -> Any:
        plain = inspect.unwrap(original)

        def function(*args: Any, **kwargs: Any) -> Any:
            got = {k for k in ("seq_idx", "cu_seqlens") if kwargs.get(k) is not None}
            seen[name] = seen.get(name, got) & got
            return plain(*args, **{k: v for k, v in kwargs.items() if k not in ("seq_idx", "cu_seqlens")})

        return function

    for name in BOUNDARY:
        if hasattr(module, name):
            monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    model(
        input_ids=torch.arange(1, 9)[None],
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        max_length_q=5,
        max_length_k=5,
        seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32),
        use_cache=False,
    )
    return seen


@pytest.mark.parametrize("model_type", sorted(KEEPS_APART.keys() | IGNORES.keys()))
def test_the_table_says_what_the_models_do(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = arriving(model_type, monkeypatch)
    apart = bool(seen) and all(BOUNDARY[name] in got for name, got in seen.items())
    assert apart == (model_type in KEEPS_APART), seen


def training(**options: Any) -> Any:
    return SimpleNamespace(**{"packing": True, "padding_free": False} | options)


@pytest.mark.parametrize("model_type", ["kimi_linear", "minimax", "jamba", "recurrent_gemma"])
def test_mixing_samples_is_refused(model_type: str) -> None:
    for options in ({}, {"packing": False, "padding_free": True}):
        with pytest.raises(QKGuardError, match="set packing: false"):
            check_packing(tiny_config(model_type), training(**options))
    assert check_packing(tiny_config(model_type), training(packing=False)) == []


@pytest.mark.parametrize("model_type", ["qwen3", "smollm3", "gpt_oss"])
def test_softmax_attention_may_be_packed(model_type: str) -> None:
    assert check_packing(tiny_config(model_type), training()) == []


def test_kernels_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkguard.training import packing

    config = tiny_config("qwen3_next")
    monkeypatch.setattr(packing.importlib.util, "find_spec", lambda name: None if name == "fla" else object())
    (warning,) = check_packing(config, training())
    assert "pip install flash-linear-attention)" in warning
    monkeypatch.setattr(packing.importlib.util, "find_spec", lambda name: object())
    assert check_packing(config, training()) == []
    monkeypatch.setattr(packing.importlib.metadata, "version", lambda name: "5.22" if name == "transformers" else "9")
    with pytest.raises(QKGuardError, match=r"transformers 5\.23 or later.*found 5\.22"):
        check_packing(config, training())


@dataclass
class DataCollatorWithFlattening:
    """As transformers has it."""

    return_seq_idx: bool = False
    return_flash_attn_kwargs: bool = False


@dataclass
class RemoveColumnsCollator:
    """What Trainer wraps a collator in."""

    data_collator: Any


def test_in_the_users_own_script_it_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkguard.training import packing

    monkeypatch.setattr(packing.importlib.util, "find_spec", lambda name: object())
    minimax, qwen, llama = (tiny_config(name) for name in ("minimax", "qwen3_next", "llama"))
    plain = SimpleNamespace()  # transformers' TrainingArguments have neither setting
    for options in ({}, {"packing": False, "padding_free": True}, {"packing": False, "sample_packing": True}):
        (line,) = packing_warnings(minimax, training(**options))
        assert "Packing would mix samples in minimax" in line and "Set packing=False" in line
        assert packing_warnings(qwen, training(**options)) == [] == packing_warnings(llama, training(**options))
    assert packing_warnings(minimax, training(packing=False)) == [] == packing_warnings(minimax, plain)
    flattening = RemoveColumnsCollator(DataCollatorWithFlattening())
    assert "would mix samples" in packing_warnings(minimax, plain, flattening)[0]
    assert packing_warnings(llama, plain, flattening) == []
    (line,) = packing_warnings(qwen, plain, flattening)
    assert "return_seq_idx=True and return_flash_attn_kwargs=True" in line
    assert packing_warnings(qwen, plain, DataCollatorWithFlattening(True, True)) == []


def test_training_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    base = save_base(tmp_path / "base", "minimax")
    monkeypatch.setattr(logging.getLogger("qkguard"), "propagate", True)
    for packed in (True, False):
        caplog.clear()
        options = {"max_steps": 1, "save_strategy": "no", "padding_free": packed, "max_length": None}
        with caplog.at_level(logging.WARNING, logger="qkguard"):
            train(
                base, arguments(tmp_path / str(packed), **options), QKGuardCallback(probe_steps=0, final_export=False)
            )
        said = ["would mix samples in minimax" in record.getMessage() for record in caplog.records]
        assert sum(said) == packed


def test_the_page_lists_the_table() -> None:
    page = (recipes_folder() / "README.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    listed = {kind: line for line in rows for kind in re.findall(r"`(\w+)`", line)}
    assert set(listed) == KEEPS_APART.keys() | IGNORES.keys()
    for kind, line in listed.items():
        assert ("| yes |" in line) == (kind in KEEPS_APART)
        assert all(PIP_NAMES[name] in line for name in KEEPS_APART.get(kind, ()))
