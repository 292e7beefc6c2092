"""`verify` passes on what was written, and fails on everything that could have happened to it since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkguard.checkpoint.safetensors_io import read_header
from qkguard.errors import QKGuardError
from qkguard.offline.restore import restore_checkpoint
from qkguard.offline.verify import verify
from tests.support.models import save_pair

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, tuned and tuned/qk_restored."""
    folder = tmp_path_factory.mktemp("written")
    base, tuned = save_pair(folder, "phi3", dtype=torch.bfloat16, shard="60KB")
    restore_checkpoint(base, tuned, tuned / "qk_restored")
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """A private copy of it, hard links dissolved."""
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


def file_with(folder: Path, part: str) -> Path:
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    return folder / next(file for name, file in where.items() if part in name)


def change(file: Path, part: str, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(file)
    name = next(name for name in tensors if part in name)
    tensors[name] = how(tensors[name].clone()).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def swap_rows(tensor: torch.Tensor) -> torch.Tensor:
    tensor[[2, 5]] = tensor[[5, 2]]
    return tensor


def test_what_was_written_verifies(copy: Path) -> None:
    report = verify(copy / "tuned" / "qk_restored", full=True)
    assert report["raw"] == "unchanged" and report["tensors"] == report["layers"] == 4
    assert report["restored_bytes"] == 4 * 96 * 64 * 2
    shutil.copytree(copy / "tuned" / "qk_restored", copy / "elsewhere")  # moved: raw is not where it was
    assert verify(copy / "elsewhere")["raw"] == "not found"


RESTORED: dict[str, tuple[Callable[[Path], object], str]] = {
    "swapped rows": (lambda d: change(file_with(d, "2.self_attn.qkv"), "2.self_attn.qkv", swap_rows), "content"),
    "a value row": (
        lambda d: change(file_with(d, "2.self_attn.qkv"), "2.self_attn.qkv", lambda t: t.roll(1, 1)),
        "content",
    ),
    "another dtype": (
        lambda d: change(file_with(d, "2.self_attn.qkv"), "2.self_attn", torch.Tensor.float),
        "bytes",
    ),
    "a renamed tensor": (lambda d: rename(file_with(d, "norm.weight"), "norm", "morn"), "header"),
    "a linked shard": (
        lambda d: change(file_with(d, "embed_tokens"), "embed_tokens", lambda t: t.roll(1, 0)),
        "content",
    ),
    "a truncated shard": (lambda d: truncate(file_with(d, "3.self_attn.qkv")), "bytes"),
    "a missing shard": (lambda d: file_with(d, "3.self_attn.qkv").unlink(), "is missing"),
    "a missing config": (lambda d: (d / "config.json").unlink(), "lacks config.json"),
    "a missing index": (lambda d: (d / INDEX).unlink(), "lacks model.safetensors.index.json"),
    "a missing manifest": (lambda d: (d / "qkguard.json").unlink(), "no qkguard.json"),
    "a broken manifest": (lambda d: (d / "qkguard.json").write_text("{"), "not a readable manifest"),
    "an emptied manifest": (lambda d: (d / "qkguard.json").write_text('{"format": 1}'), "is damaged"),
    "a newer manifest": (lambda d: (d / "qkguard.json").write_text('{"format": 99}'), "Update qkguard"),
    "something else saved": (lambda d: shutil.copy(file_with(d, "norm"), d / "model.safetensors"), "something else"),
}


def rename(file: Path, old: str, new: str) -> None:
    data = file.read_bytes()
    file.write_bytes(data.replace(old.encode(), new.encode(), 1))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("case", RESTORED)
def test_a_changed_restored_folder_fails(case: str, copy: Path) -> None:
    damage, message = RESTORED[case]
    folder = copy / "tuned" / "qk_restored"
    damage(folder)
    with pytest.raises(QKGuardError, match=message):
        verify(folder)


RAW: dict[str, Callable[[Path], object]] = {
    "trained on": lambda d: change(file_with(d, "1.self_attn.qkv"), "1.self_attn.qkv", lambda t: t + 1),
    "other weights": lambda d: change(file_with(d, "embed_tokens"), "embed_tokens", lambda t: t + 1),
    "truncated": lambda d: truncate(file_with(d, "embed_tokens")),
    "a file gone": lambda d: file_with(d, "embed_tokens").unlink(),
    "the base instead": lambda d: shutil.copytree(d.parent / "base", d, dirs_exist_ok=True),
}


@pytest.mark.parametrize("case", RAW)
def test_a_raw_folder_that_has_changed_fails(case: str, copy: Path) -> None:
    RAW[case](copy / "tuned")
    with pytest.raises(QKGuardError, match="The raw checkpoint has changed since"):
        verify(copy / "tuned" / "qk_restored")
    assert verify(copy / "tuned" / "qk_restored", raw=False)["raw"] == "not checked"


def test_samples_do_not_cover_a_large_file_but_rows_and_full_do(tmp_path: Path) -> None:
    """Beyond 1 MiB only samples and restored rows are hashed: one stray byte elsewhere takes the full check."""
    base, tuned = save_pair(tmp_path, "llama", hidden_size=256, intermediate_size=2048)
    restore_checkpoint(base, tuned, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    header = read_header(file)
    assert header.size > 2**23

    def flip(name: str) -> None:
        data = bytearray(file.read_bytes())
        entry = header.tensors[name]
        samples = [i * (header.size - 4096) // 255 for i in range(256)]
        at = next(i for i in range(entry.start, entry.stop) if not any(s <= i < s + 4096 for s in samples))
        data[at] ^= 1
        file.write_bytes(data)

    flip("model.layers.1.mlp.up_proj.weight")
    verify(tmp_path / "out")
    with pytest.raises(QKGuardError, match="outside the restored rows"):
        verify(tmp_path / "out", full=True)
    flip("model.layers.1.mlp.up_proj.weight")
    verify(tmp_path / "out", full=True)
    flip("model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(QKGuardError, match=r"rows of model\.layers\.1\.self_attn\.q_proj\.weight differ"):
        verify(tmp_path / "out")
