"""Layouts as YAML: written and read back unchanged, and every slip of the pen answered in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qkguard.errors import QKGuardError
from qkguard.layout import find_attention
from qkguard.layout.spec_file import dump_specs, load_specs
from tests.support.models import CONFIGS, tiny_config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layout_survives_the_file(name: str, tmp_path: Path) -> None:
    specs = find_attention(tiny_config(name))
    (tmp_path / "spec.yaml").write_text(dump_specs(specs))
    found = load_specs(tmp_path / "spec.yaml")
    assert found == specs
    changed = replace(specs[0], num_heads=specs[0].num_heads + 1)
    assert found != [changed, *specs[1:]]


def test_layers_of_one_kind_share_an_entry() -> None:
    data = yaml.safe_load(dump_specs(find_attention(tiny_config("llama"))))
    assert [entry["layers"] for entry in data["attention"]] == [[0, 1, 2, 3]]


EXAMPLE = """
version: 1
attention:
  - layers: [1, 3]
    module: layers.{layer}.attn
    kind: full_attention
    num_heads: 2
    num_kv_heads: 1
    head_dim: 16
    params:
      - name: layers.{layer}.attn.wq.weight
        shape: [64, 32]
        blocks: [[0, 16, q, 0], [32, 48, q, 1]]
      - name: layers.{layer}.attn.wk.bias
        shape: [16]
        blocks: [[0, 16, k, 0]]
"""


def test_written_by_hand(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(EXAMPLE)
    specs = load_specs(tmp_path / "spec.yaml")
    assert [s.layer for s in specs] == [1, 3]
    assert [(p.name, p.kind, p.ranges) for p in specs[1].params] == [
        ("layers.3.attn.wq.weight", "weight", ((0, 16), (32, 48))),
        ("layers.3.attn.wk.bias", "bias", ((0, 16),)),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version: 1", "version: 7", "version: expected 1, found 7"),
        ("version: 1\n", "", "version is missing"),
        ("num_heads", "num_head", r"attention\[0\]\.num_head: unknown key; did you mean 'num_heads'"),
        ("head_dim: 16", "head_dim: big", r"attention\[0\]\.head_dim: expected a valid integer, found 'big'"),
        ("kind: full_attention", "kind: 3", r"attention\[0\]\.kind: expected a valid string, found 3"),
        (
            "kind: full_attention",
            "kind: full_attention\n    rotary: spiral",
            r"rotary: expected 'half', 'interleaved' or 'none', found 'spiral'",
        ),
        ("[1, 3]", "[1, -3]", r"layers\[1\]: expected a number greater than or equal to 0, found -3"),
        ("[0, 16, q, 0]", "[0, 40, q, 0]", r"params\[0\]: .*overlaps"),
        ("[0, 16, q, 0]", "[0, 16, w, 0]", r"params\[0\]\.blocks\[0\]\[2\]: expected 'q', .* or 'qkv', found 'w'"),
        ("[32, 48, q, 1]", "[32, 80, q, 1]", "leaves dimension 0"),
        ("[64, 32]", "[64, x]", r"params\[0\]\.shape\[1\]: expected a valid integer, found 'x'"),
        ("attention:", "attention: {}\nx:", "x: unknown key$"),
        ("version: 1", "version: [", "not valid YAML"),
        ("[0, 16, q, 0]", "[0, 16]", r"blocks\[0\]\[2\] is missing"),
        ("[0, 16, q, 0]", "[0, 16, q, 0, 1]", r"blocks\[0\]: expected \[first row, .*found \[0, 16, 'q', 0, 1\]"),
        ("[0, 16, q, 0]", "16", r"blocks\[0\]: expected \[first row, .*found 16"),
        ("[64, 32]", "[64, 32]\n        dim: 2", r"dim 2 is not a dimension of shape \[64, 32\]"),
        ("[64, 32]", "[]", "shape: expected at least one entry"),
        ("num_heads: 2", "num_heads: true", "num_heads: expected a valid integer, found True"),
        ("num_heads: 2", "num_heads: 0", "num_heads: expected a number greater than 0, found 0"),
        ("- layers: [1, 3]", "- 3\n  - layers: [1, 3]", r"attention\[0\]: expected keys with values, found 3"),
    ],
)
def test_slips_are_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in EXAMPLE
    (tmp_path / "spec.yaml").write_text(EXAMPLE.replace(old, new, 1))
    with pytest.raises(QKGuardError, match=message) as caught:
        load_specs(tmp_path / "spec.yaml")
    assert "\n" not in str(caught.value) and "spec.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(QKGuardError, match=r"Cannot read the layout .*none\.yaml"):
        load_specs(tmp_path / "none.yaml")
