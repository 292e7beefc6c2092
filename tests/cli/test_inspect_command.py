"""`qkguard inspect --verify`, and inspecting a model that is known by rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support.models import CONFIGS


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    """A folder with nothing but a config.json: a gated hybrid in bfloat16."""
    config = {"model_type": "qwen3_next", "dtype": "bfloat16", **CONFIGS["qwen3_next"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_verify(run: Run, hybrid: Path, tmp_path: Path) -> None:
    code, out, _ = run("inspect", hybrid, "--verify")
    assert code == 0 and "layers 3: the rows move exactly what they should" in out
    code, out, _ = run("inspect", hybrid, "--verify", "--json")
    report = json.loads(out)
    assert code == 0 and report["dtype"] == "bfloat16"
    assert report["verified"] == [
        {"layers": [3], "module": "model.layers.3.self_attn", "ok": True, "problems": [], "partial": []}
    ]
    assert json.loads(run("inspect", hybrid, "--json")[1])["verified"] is None


def test_verify_of_a_wrong_spec(run: Run, hybrid: Path, tmp_path: Path) -> None:
    """The gate, which lies between the queries, taken for queries."""
    spec = tmp_path / "spec.yaml"
    assert run("inspect", hybrid, "--write-spec", spec)[0] == 0
    text = spec.read_text()
    assert "[0, 16, q, 0]" in text
    spec.write_text(text.replace("[0, 16, q, 0]", "[0, 32, q, 0]"))
    code, _, err = run("inspect", hybrid, "--spec", spec, "--verify")
    assert code == 2 and err.splitlines()[-1].startswith("error: Layers 3: the layout is wrong: ")
    assert "q_proj.weight, block" in err and "its last row is idle" in err


def test_a_model_known_by_rule(run: Run, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": "hypenet", "head_dim": 16, "mixer_types": ["lightning-attn", "attn"], **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "theirs.Config"}}))
    code, out, _ = run("inspect", tmp_path)
    assert code == 0 and "1 lightning-attn, 1 attn" in out and "6,144 parameters" in out
    code, _, err = run("inspect", tmp_path, "--verify")
    assert code == 2 and "cannot be proven here" in err
