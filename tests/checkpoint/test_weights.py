"""Opening checkpoints: everything that is wrong with the files is said in one line before anything is written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qkguard.arrays import as_tensor
from qkguard.checkpoint.safetensors_io import opened, read_header, read_rows, write_rows
from qkguard.checkpoint.weights import open_weights, resolve_folder
from qkguard.errors import QKGuardError
from qkguard.layout import Block, ParamMap
from tests.support.models import save_pair

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "dim", "ranges"),
    [
        ((10, 6), 0, [(0, 10)]),
        ((10, 6), 0, [(1, 3), (7, 8)]),
        ((6, 10), 1, [(0, 4), (9, 10)]),
        ((12,), 0, [(2, 5), (11, 12)]),
        ((4, 6, 3), 1, [(1, 2), (4, 6)]),
    ],
)
def test_rows_in_place(
    dtype: torch.dtype, shape: tuple[int, ...], dim: int, ranges: list[tuple[int, int]], tmp_path: Path
) -> None:
    """Rows read and written at byte offsets are those that torch's own indexing names."""
    param = ParamMap("w", shape, dim, "weight", tuple(Block(lo, hi, "q") for lo, hi in ranges))
    tensors = {"a": torch.randn(7).to(dtype), "w": torch.randn(shape).to(dtype), "z": torch.arange(3)}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    entry = read_header(file).tensors["w"]
    index = torch.cat([torch.arange(lo, hi) for lo, hi in ranges])
    with opened(file) as fd:
        assert torch.equal(as_tensor(read_rows(fd, entry, param)), tensors["w"].index_select(dim, index))
    new = torch.randn(param.compact_shape).to(dtype)
    with open(file, "r+b") as handle:
        write_rows(handle.fileno(), entry, param, new)
    found = load_file(file)
    wanted = tensors["w"].clone().index_copy_(dim, index, new)
    assert torch.equal(found["w"], wanted) and not torch.equal(found["w"], tensors["w"])
    assert torch.equal(found["a"], tensors["a"]) and torch.equal(found["z"], tensors["z"])


def raw_file(path: Path, header: object, data: bytes, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


GOOD = {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
BROKEN: dict[str, tuple[object, bytes, int | None]] = {
    "empty": (b"", b"", None),
    "not json": (b"{nonsense", bytes(16), None),
    "a list": ([], bytes(16), None),
    "truncated": (GOOD, bytes(15), None),
    "too long": (GOOD, bytes(17), None),
    "huge header": (GOOD, bytes(16), 2**40),
    "sizes disagree": ({"w": GOOD["w"] | {"shape": [2, 3]}}, bytes(16), None),
    "a gap": ({"w": GOOD["w"] | {"data_offsets": [4, 20]}}, bytes(20), None),
    "overlap": (GOOD | {"v": GOOD["w"] | {"data_offsets": [8, 24]}}, bytes(24), None),
    "no dtype": ({"w": {"shape": [2, 2], "data_offsets": [0, 16]}}, bytes(16), None),
    "offsets are text": ({"w": GOOD["w"] | {"data_offsets": ["0", "16"]}}, bytes(16), None),
    "backwards": ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [16, 8]}}, bytes(16), None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_as_the_library_does(case: str, tmp_path: Path) -> None:
    file = raw_file(tmp_path / "model.safetensors", *BROKEN[case])
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    with pytest.raises(QKGuardError, match=str(file)):
        open_weights(tmp_path)


def test_a_good_handmade_file_is_read(tmp_path: Path) -> None:
    file = raw_file(tmp_path / "model.safetensors", GOOD, bytes(16))
    with safe_open(file, "pt") as handle:
        assert list(handle.keys()) == ["w"]
    assert open_weights(tmp_path).shapes() == {"w": (2, 2)}


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def point_at(file: str) -> Callable[[Path], None]:
    return lambda d: edit_index(d, lambda i: i["weight_map"].update({"model.norm.weight": file}))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "parent": (point_at("../model.safetensors"), "points outside its folder"),
    "absolute": (point_at("/etc/passwd"), "points outside its folder"),
    "nested parent": (point_at("a/../../b.safetensors"), "points outside its folder"),
    "a number": (lambda d: edit_index(d, lambda i: i["weight_map"].update({"x": 3})), "not a readable weight index"),
    "no map": (lambda d: edit_index(d, lambda i: i.pop("weight_map")), "not a readable weight index"),
    "not json": (lambda d: (d / INDEX).write_text("{"), "not a readable weight index"),
    "missing shard": (lambda d: (d / "model-00002-of-00006.safetensors").unlink(), "lacks model-00002-of-00006"),
    "a tensor too many": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update({"x": "model-00002-of-00006.safetensors"})),
        "lacks x, which",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_indices_are_refused(case: str, tmp_path: Path) -> None:
    _, tuned = save_pair(tmp_path, "llama", dtype=torch.bfloat16, shard="60KB")
    open_weights(tuned)
    damage, message = WRONG[case]
    damage(tuned)
    with pytest.raises(QKGuardError, match=message):
        open_weights(tuned)


def test_a_file_chosen_in_the_config_is_the_one_that_counts(tmp_path: Path) -> None:
    """`transformers_weights` overrules the usual names in from_pretrained too."""
    _, tuned = save_pair(tmp_path, "llama")
    save_file({"w": torch.zeros(2)}, tuned / "model.v2.safetensors", metadata={"format": "pt"})
    config = json.loads((tuned / "config.json").read_text())
    for chosen, message in (
        ("model.v2.safetensors", None),
        ("../x.safetensors", "outside"),
        ("no.safetensors", "lacks"),
    ):
        (tuned / "config.json").write_text(json.dumps(config | {"transformers_weights": chosen}))
        if message is None:
            assert open_weights(tuned).shapes() == {"w": (2,)}
        else:
            with pytest.raises(QKGuardError, match=message):
                open_weights(tuned)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("adapter_config.json adapter_model.safetensors", "adapter, not a full checkpoint"),
        ("pytorch_model.bin", "pickles"),
        ("global_step7 latest", "sharded training state"),
        ("pytorch_model_fsdp_0", "sharded training state"),
        ("model-q4.gguf", "GGUF"),
        ("config.json", "no weights"),
    ],
)
def test_folders_without_readable_weights_say_what_they_hold(files: str, message: str, tmp_path: Path) -> None:
    for name in files.split():
        (tmp_path / name).touch()
    with pytest.raises(QKGuardError, match=message):
        open_weights(tmp_path)


def test_the_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    """Files of a hub snapshot are links to ../../blobs: inside the folder by name, outside by target."""
    _, tuned = save_pair(tmp_path, "llama", dtype=torch.bfloat16, shard="60KB")
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(tuned.glob("*.safetensors"))):
        file.rename(tmp_path / "blobs" / str(i))
        file.symlink_to(tmp_path / "blobs" / str(i))
    assert len(open_weights(tuned).shapes()) == 39


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "no such folder"])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(name: str) -> None:
    with pytest.raises(QKGuardError, match="no such folder:"):
        resolve_folder(name)


def test_an_unreachable_hub_id_is_one_line() -> None:
    with pytest.raises(QKGuardError, match=r"nobody/nothing is neither a folder here nor .* on the hub") as caught:
        resolve_folder("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_resolved_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen = {}

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        seen[name, revision] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_folder("org/model") == tmp_path
    assert "*.safetensors" in seen["org/model", None] and "*.bin" not in seen["org/model", None]
    assert resolve_folder("org/model@refs/pr/7") == tmp_path and ("org/model", "refs/pr/7") in seen


def test_a_folder_has_no_revision_and_may_have_an_at_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "step@7").mkdir()
    assert resolve_folder(tmp_path / "step@7") == tmp_path / "step@7"
    with pytest.raises(QKGuardError, match=r"step@7 is a folder here, which has no revisions. Leave @main out"):
        resolve_folder(f"{tmp_path / 'step@7'}@main")
    with pytest.raises(QKGuardError, match="no revision after the @"):
        resolve_folder("org/model@")
