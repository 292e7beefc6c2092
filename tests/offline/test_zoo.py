"""`restore_checkpoint` on every causal-LM type: names on disk, bits in the files, what its attention then computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkguard import QKGuardError, restore_checkpoint, verify
from qkguard.layout import AttentionSpec
from qkguard.offline.pair import folder_attention
from tests.layout.test_zoo import EAGER, PARTIAL, REFUSED
from tests.support import zoo

REARRANGED = {"hrm_text"}  # one fused tensor on disk, four in memory
CHOOSING = {"jetmoe"}  # a router, which is no projection and stays tuned, chooses the experts that make the queries


@pytest.mark.parametrize("model_type", sorted(set(zoo.CONFIGS) - set(REFUSED)))
def test_type(model_type: str, tmp_path: Path) -> None:
    base, tuned = save_pair(model_type, tmp_path)
    manifest = restore_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", include_norms=True)
    specs = folder_attention(tmp_path / "tuned")  # what it has just found
    verify(tmp_path / "out")
    assert any("cuts or joins" in w for w in manifest["warnings"]) == (model_type in REARRANGED)
    restored = load(base, tmp_path / "out")
    compare(parameters(restored), expected(base, tuned, specs))
    with pytest.raises(AssertionError):
        compare(parameters(restored), parameters(tuned))
    if model_type not in EAGER:
        judged = queries_and_keys_are_the_bases(base, tuned, restored, specs)
        assert judged or model_type in PARTIAL or model_type in CHOOSING


def save_pair(model_type: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    """A base and a tuned model, in memory and in folders; every weight differs."""
    base: Any = zoo.tiny_model(model_type, "eager" if model_type in EAGER else zoo.ORACLE)
    base.save_pretrained(folder / "base")
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in tuned.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.01)
    tuned.save_pretrained(folder / "tuned")
    return load(base, folder / "base"), load(base, folder / "tuned")


def load(like: nn.Module, folder: Path) -> Any:
    """A saved model as transformers loads it (it clears the padding token's embedding, for instance)."""
    loader: Any = type(like)
    implementation = like.config.get_text_config()._attn_implementation
    with zoo.attention(lambda *_, **__: None):
        return loader.from_pretrained(folder, attn_implementation=implementation).eval()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


def expected(base: nn.Module, tuned: nn.Module, specs: list[AttentionSpec]) -> dict[str, Tensor]:
    """The tuned parameters with the base's rows, one slice at a time."""
    before, out = parameters(base), {name: param.clone() for name, param in parameters(tuned).items()}
    for param in {p.name: p for s in specs for p in s.params}.values():
        for block in param.blocks:
            if "v" not in block.role:
                rows = (slice(None),) * param.dim + (slice(block.start, block.stop),)
                out[param.name][rows] = before[param.name][rows]
    return out


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    wrong = [name for name, value in found.items() if not torch.equal(value, wanted[name])]
    assert not wrong, wrong


def queries_and_keys_are_the_bases(
    base: nn.Module, tuned: nn.Module, restored: nn.Module, specs: list[AttentionSpec]
) -> int:
    """Attention modules that, given the same inputs in all three models, have the base's q and k and the tuned v.

    Left out are those in which rows that stay tuned make queries or keys too. Returns how many were judged.
    """
    seen = [zoo.Attentions(model) for model in (base, tuned, restored)]
    modules = [dict(model.named_modules()) for model in (base, tuned, restored)]
    moved = judged = 0
    for spec in specs:
        if spec.notes or any(block.shared for param in spec.params for block in param.blocks):
            continue
        inputs = seen[0].arguments(modules[0][spec.module])
        (q0, k0, v0), (q1, _, v1), (q2, k2, v2) = (
            attentions.again(found[spec.module], like=inputs) for attentions, found in zip(seen, modules, strict=True)
        )
        assert torch.equal(q2, q0) and torch.equal(k2, k0) and torch.equal(v2, v1), spec.module
        assert not torch.equal(q1, q0), "the twin: SFT moved nothing"
        moved += not torch.equal(v1, v0)  # layers that share another one's keys and values take these from it
        judged += 1
    assert moved or not judged
    return judged


def test_rearranged_tensors_take_restore_alone(tmp_path: Path) -> None:
    save_pair("hrm_text", tmp_path)
    with pytest.raises(QKGuardError, match="or use method restore"):
        restore_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", method="interpolate", alpha=0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]
