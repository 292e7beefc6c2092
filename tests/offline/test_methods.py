"""The methods beyond copying where they are used: checkpoints on disk, the callback, the live swap, adapters."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import qkguard
from qkguard import QKGuardCallback, QKGuardConfig, QKGuardError
from qkguard.checkpoint.restored import plan_restored
from qkguard.checkpoint.weights import BaseFolder, open_weights
from qkguard.checkpoint.write import write_folder
from qkguard.layout import ParamMap
from qkguard.offline.pair import find_pair, open_folders
from qkguard.offline.restore import restore_checkpoint
from qkguard.offline.verify import verify
from tests.support import oracle, zoo
from tests.support.models import noised, save_pair
from tests.support.training import arguments, save_base, train

HEADS, HEAD = 4, 16


def rel(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def untouched_but_queries_and_keys(name: str, base: Path, tuned: Path, out: Path) -> None:
    """Everything outside the rows of the hand-written table has the tuned bits; inside, something changed."""
    found, raw = oracle.load_folder(out), oracle.load_folder(tuned)
    assert (out / "qkguard.json").is_file() and verify(out, full=True)["raw"] == "unchanged"
    expected = oracle.expected(name, oracle.load_folder(base), raw)
    changed = {key for key in raw if not oracle.same_bits(expected[key], raw[key])}
    assert {key for key in raw if not oracle.same_bits(found[key], raw[key])} == changed
    for pattern, (dim, ranges) in oracle.ROWS[name].items():
        for key in (key for key in raw if re.search(pattern, key)):
            rest = torch.ones(raw[key].shape[dim], dtype=torch.bool)
            for lo, hi in ranges or [(0, raw[key].shape[dim])]:
                rest[lo:hi] = False
            kept = rest.nonzero()[:, 0]
            assert oracle.same_bits(found[key].index_select(dim, kept), raw[key].index_select(dim, kept)), key


@pytest.mark.parametrize("name", ["qwen2", "qwen3_next", "phi3", "gpt_neox", "gpt2"])
def test_interpolation_on_disk(name: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, name, dtype=torch.bfloat16, shard="60KB")
    manifest = restore_checkpoint(base, tuned, tmp_path / "out", method="interpolate", alpha=0.3)
    pre, post, found = (oracle.load_folder(folder) for folder in (base, tuned, tmp_path / "out"))
    wanted = oracle.expected(
        name, {key: (0.7 * post[key].double() + 0.3 * pre[key].double()).to(post[key].dtype) for key in pre}, post
    )
    assert oracle.differences(found, wanted) == []
    untouched_but_queries_and_keys(name, base, tuned, tmp_path / "out")
    assert manifest["method"]["alpha"] == 0.3 and manifest["method"]["name"] == "interpolate"
    for layer in manifest["layers"]:
        assert layer["alpha"] == 0.3 and layer["distance"]["q_from_tuned"] > 0
    whole = restore_checkpoint(base, tuned, tmp_path / "whole", method="interpolate")
    assert oracle.differences(oracle.load_folder(tmp_path / "whole"), oracle.expected(name, pre, post)) == []
    assert whole["layers"][0]["distance"]["k_from_before"] == 0.0


def test_qk_pro_on_disk_with_its_manifest(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", shard="60KB")
    options: dict[str, Any] = {"method": "qk-pro", "ridge": 2.0, "layers": [1, 3], "per_layer": {3: 0.25}}
    manifest = restore_checkpoint(base, tuned, tmp_path / "out", **options)
    pre, post, found = (oracle.load_folder(folder) for folder in (base, tuned, tmp_path / "out"))
    assert [layer["layer"] for layer in manifest["layers"]] == [1, 3] and manifest["warnings"] == []
    for layer, ridge in zip(manifest["layers"], (2.0, 0.25), strict=True):
        where = f"model.layers.{layer['layer']}.self_attn"
        q0, q1, q = (folder[f"{where}.q_proj.weight"].double().view(4, 16, 64) for folder in (pre, post, found))
        k0, k = (folder[f"{where}.k_proj.weight"].double().view(2, 16, 64) for folder in (pre, found))
        assert torch.equal(k, k0) and layer["ridge"] == ridge
        errors = []
        for h in range(HEADS):
            gram = (k0[h // 2] @ k0[h // 2].T).numpy()
            absolute = ridge * np.trace(gram) / HEAD
            assert layer["ridge_absolute"][h // 2] == pytest.approx(absolute, rel=1e-9)
            factor = torch.from_numpy(gram @ np.linalg.inv(gram + absolute * np.eye(HEAD)))
            assert rel(q[h], q1[h] + factor @ (q0[h] - q1[h])) < 1e-7, "rounded once, to float32"
            before, now = q0[h].T @ k0[h // 2], q[h].T @ k[h // 2]
            errors.append(float((now - before).norm() / before.norm()))
        assert layer["routing_error"] == {
            "mean": pytest.approx(np.mean(errors), rel=1e-6),
            "max": pytest.approx(max(errors), rel=1e-6),
        }
        distance = layer["distance"]
        assert distance["q_from_before"] == pytest.approx(rel(q, q0), rel=1e-6)
        assert distance["q_from_tuned"] == pytest.approx(rel(q, q1), rel=1e-6)
        assert distance["k_from_before"] == 0.0 < distance["q_from_before"]
    for layer in (0, 2):
        for part in "qk":
            key = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            assert oracle.same_bits(found[key], post[key])
    with pytest.raises(QKGuardError, match=r"per_layer names layers \[0\], which are not restored.*1, 3"):
        restore_checkpoint(base, tuned, tmp_path / "bad", **options | {"per_layer": {0: 1.0}})
    with pytest.raises(QKGuardError, match="queries and keys together"):
        restore_checkpoint(base, tuned, tmp_path / "bad", method="qk-pro", projections=["k"])
    with pytest.raises(QKGuardError, match="does no float64 arithmetic here"):
        restore_checkpoint(base, tuned, tmp_path / "bad", method="qk-pro", device="nowhere")
    assert not (tmp_path / "bad").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with method `qk-pro`" in card and "ridge=2.0" in card and "bit for bit" in card


def test_fallbacks_are_in_the_manifest(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path / "norms", "qwen3")
    turned = restore_checkpoint(base, tuned, tmp_path / "turned", method="procrustes")
    copied = restore_checkpoint(base, tuned, tmp_path / "copied")
    assert all("differ between channels" in layer["fallback"] for layer in turned["layers"])
    assert all(layer["group"] == "identity" for layer in turned["layers"])
    assert "procrustes fell back in layer(s) 0" in turned["warnings"][0] and copied["warnings"] == []
    found = oracle.load_folder(tmp_path / "turned")
    assert oracle.differences(found, oracle.load_folder(tmp_path / "copied")) == []

    model = zoo.tiny_model("deepseek_v3")  # MLA: queries and keys in two steps, one of them shared with the values
    model.save_pretrained(tmp_path / "mla" / "base")  # type: ignore[operator]
    noised(model, 7).save_pretrained(tmp_path / "mla" / "tuned")  # type: ignore[operator]
    pair = tmp_path / "mla" / "base", tmp_path / "mla" / "tuned"
    for method, kind in (("qk-pro", "restore"), ("interpolate", "unaligned")):
        options = {"alpha": 0.5, "align": True} if method == "interpolate" else {}
        mla = restore_checkpoint(*pair, tmp_path / method, method=method, **options)
        assert all(layer["fallback"].startswith(f"{kind}: ") for layer in mla["layers"])
        assert any("fell back" in text for text in mla["warnings"]) and mla["partial"]
    copied = restore_checkpoint(*pair, tmp_path / "mla-copied")
    found = oracle.load_folder(tmp_path / "qk-pro")
    assert oracle.differences(found, oracle.load_folder(tmp_path / "mla-copied")) == []
    assert oracle.differences(found, oracle.load_folder(pair[1])) != []


def test_nan_is_not_mixed_in(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, tuned = save_pair(tmp_path, "llama")
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    for method in ("qk-pro", "procrustes", "interpolate"):
        with pytest.raises(QKGuardError, match="NaN or Inf after SFT"):
            restore_checkpoint(base, tuned, tmp_path / "out", method=method)
        assert not (tmp_path / "out").exists()
    restore_checkpoint(base, tuned, tmp_path / "out")


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qk-pro": ("minimax", {"method": "qk-pro", "ridge": 0.5, "per_layer": {3: 2.0}}),
    "aligned": ("minimax", {"method": "interpolate", "alpha": 0.5, "align": True}),
    "norms": ("qwen3", {"method": "procrustes"}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_callback_and_the_live_swap_use_the_same_functions(case: str, tmp_path: Path) -> None:
    name, options = SETTINGS[case]
    base = save_base(tmp_path / "base", name)
    guard = QKGuardCallback(**options, strict=True, probe_steps=0)
    trainer = train(base, arguments(tmp_path), guard)
    checkpoint = tmp_path / "run/checkpoint-3"
    offline = restore_checkpoint(base, checkpoint, tmp_path / "offline", **options)
    assert (
        oracle.differences(oracle.load_folder(checkpoint / "qk_restored"), oracle.load_folder(tmp_path / "offline"))
        == []
    )
    assert oracle.differences(oracle.load_folder(checkpoint / "qk_restored"), oracle.load_folder(checkpoint)) != []
    manifest = json.loads((checkpoint / "qk_restored/qkguard.json").read_text())
    assert manifest["method"]["name"] == options["method"]
    assert [layer | {"drift": 0} for layer in manifest["layers"]] == [
        layer | {"drift": 0} for layer in offline["layers"]
    ]
    if case == "norms":
        assert all("differ between" in layer["fallback"] for layer in manifest["layers"]), "the gains were not read"

    model = trainer.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with qkguard.restored(model, guard.session.reference, **options):
        inside = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert all(oracle.same_bits(p.detach(), before[n]) for n, p in model.named_parameters())
    written = type(model).from_pretrained(tmp_path / "run/_qkguard/final/qk_restored", dtype=torch.float32)
    live = dict(written.named_parameters())
    assert all(oracle.same_bits(inside[n], live[n].detach()) for n in inside)
    assert any(not oracle.same_bits(inside[n], before[n]) for n in inside)
    with pytest.raises(QKGuardError, match="no effect"), qkguard.restored(model, guard.session.reference, alpha=0.5):
        pass


def test_settings_of_the_callback() -> None:
    config = QKGuardConfig(method="interpolate", alpha=1, per_layer={"3": "0.5"})
    assert config.method_options == {"alpha": 1.0, "align": False, "per_layer": {3: 0.5}}
    assert QKGuardConfig().method_options == {}
    for wrong, message in (
        ({"method": "interpolate", "alpha": 2}, "alpha=2"),
        ({"method": "qk-pro", "ridge": -1}, "ridge=-1"),
        ({"method": "qk-pro", "projections": ["q"]}, "queries and keys together"),
        ({"alpha": 0.5}, "no effect with method 'restore'"),
    ):
        with pytest.raises(QKGuardError, match=message):
            QKGuardConfig(**wrong)


def test_layers_that_are_not_there_stop_the_run(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    guard = QKGuardCallback(method="interpolate", per_layer={0: 0.5}, probe_steps=0)
    with pytest.raises(QKGuardError, match=r"per_layer names layers \[0\]"):
        train(base, arguments(tmp_path), guard)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qk-pro"}, "works on full weights, not on adapters"),
        ({"method": "interpolate", "align": True}, "align and per_layer work on full weights"),
        ({"method": "interpolate", "per_layer": {3: 0.5}}, "align and per_layer work on full weights"),
    ],
)
def test_adapters_refuse_what_needs_full_weights(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    base = save_base(tmp_path / "base")
    guard = QKGuardCallback(**options, strict=True, probe_steps=0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    with pytest.raises(QKGuardError, match=message):
        train(base, arguments(tmp_path), guard, peft_config=lora)


@pytest.mark.parametrize("method", ["restore", "qk-pro", "procrustes", "interpolate"])
def test_one_layer_is_in_memory_at_a_time(method: str, tmp_path: Path) -> None:
    class Watched(BaseFolder):
        """Counts how many of the rows that it has handed out are still held by somebody."""

        alive: ClassVar[list[Any]] = []
        most = given = 0

        def get(self, param: ParamMap, /) -> Tensor:
            rows = super().get(param)
            self.alive[:] = [*(ref for ref in self.alive if ref() is not None), weakref.ref(rows)]
            self.given, self.most = self.given + 1, max(self.most, len(self.alive))
            return rows

    base, tuned = save_pair(tmp_path, "llama", num_hidden_layers=8)
    pair = find_pair(open_folders(base, tuned))
    source = Watched(open_weights(base), pair.names)
    out = tmp_path / "out"
    write_folder(plan_restored(pair.weights, out, pair.selection, pair.names, source, method=method))
    assert source.given == 16 and source.most <= 4, "queries and keys of a layer, and of the one before at most"
