"""The write itself: ranks, staging, interruptions, full disks, file modes, what is copied and what is not."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qkguard.arrays import as_array, as_tensor
from qkguard.checkpoint import files, restored, write
from qkguard.checkpoint.restored import plan_restored
from qkguard.checkpoint.safetensors_io import TensorEntry
from qkguard.checkpoint.staging import working_folder
from qkguard.checkpoint.weights import BaseFolder, open_weights
from qkguard.checkpoint.write import FolderPlan, prepare, publish, write_files, write_folder
from qkguard.errors import QKGuardError
from qkguard.layout import Block, ParamMap
from qkguard.layout.spec import AttentionSpec
from qkguard.offline.restore import restore_checkpoint
from qkguard.offline.verify import verify
from tests.support import judge
from tests.support.models import save_pair
from tests.support.oracle import differences, expected, load_folder

TEMPORARY = "_qkguard-tmp-"


def by_hand(layers: int = 4) -> list[tuple[AttentionSpec, tuple[ParamMap, ...]]]:
    """The tiny llama's layout without looking at the model."""
    out = []
    for i in range(layers):
        name = f"model.layers.{i}.self_attn"
        heads = {"q": [Block(16 * h, 16 * h + 16, "q", h) for h in range(4)], "k": [Block(0, 32, "k")]}
        params = tuple(
            ParamMap(f"{name}.{role}_proj.weight", (64 if role == "q" else 32, 64), 0, "weight", tuple(heads[role]))
            for role in "qk"
        )
        out.append((AttentionSpec(i, name, "full_attention", 4, 2, 16, params), params))
    return out


class Parts:
    """What `plan_restored` needs for one tiny llama, sharded and bf16 unless said otherwise."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.base, self.raw = save_pair(folder, "llama", **({"dtype": torch.bfloat16, "shard": "60KB"} | options))
        self.selection = by_hand()
        self.names = {p.name: p.name for _, params in self.selection for p in params}
        self.source: Any = BaseFolder(open_weights(self.base), self.names)
        self.wanted = expected("llama", load_folder(self.base), load_folder(self.raw))

    def plan(self, out: Path, **settings: Any) -> FolderPlan:
        return plan_restored(open_weights(self.raw), out, self.selection, self.names, self.source, **settings)

    def write_all(self, out: Path, extra: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
        return write_folder(self.plan(out, **settings), extra)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("world", [2, 3, 9])
def test_ranks_share_the_files(world: int, parts: Parts, tmp_path: Path) -> None:
    one = parts.write_all(tmp_path / "one", extra={"step": 3})
    plans = [parts.plan(tmp_path / "many") for _ in range(world)]
    staging = prepare(plans[0])
    records = [record for n, plan in enumerate(plans) for record in write_files(plan, staging.folder, n, world)]
    with pytest.raises(QKGuardError, match="not every weight file"):
        publish(plans[0], staging, records[1:])
    many = publish(plans[0], staging, json.loads(json.dumps(records)), {"step": 3})
    assert many | {"created": 0} == one | {"created": 0}
    skip = {"qkguard.json", "README.md"}
    found = [{k: v for k, v in hashes(tmp_path / name).items() if k not in skip} for name in ("one", "many")]
    assert found[0] == found[1]
    assert differences(load_folder(tmp_path / "many"), parts.wanted) == []


def test_raw_is_untouched_and_linked_where_it_can_be(parts: Parts, tmp_path: Path) -> None:
    before = hashes(parts.raw)
    manifest = parts.write_all(parts.raw / "qk_restored")
    inside = hashes(parts.raw)
    assert {k: v for k, v in inside.items() if not k.startswith("qk_restored/")} == before
    made = {name: file["made"] for name, file in manifest["files"].items()}
    assert set(made.values()) == {"linked", "patched"}
    for name, how in made.items():
        assert (parts.raw / name).samefile(parts.raw / "qk_restored" / name) == (how == "linked")
    assert manifest["raw"]["path"] == ".."
    assert differences(load_folder(parts.raw / "qk_restored"), parts.wanted) == []


def test_copies_where_links_and_kernel_copies_fail(parts: Parts, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "copy_file_range", fail)
    manifest = parts.write_all(tmp_path / "out")
    assert {file["made"] for file in manifest["files"].values()} == {"copied", "patched"}
    assert all((tmp_path / "out" / name).stat().st_nlink == 1 for name in manifest["files"])
    assert differences(load_folder(tmp_path / "out"), parts.wanted) == []


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system at hand")
def test_another_file_system(parts: Parts, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if os.stat(folder).st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is no file system of its own")
        manifest = parts.write_all(Path(folder) / "out")
        assert {file["made"] for file in manifest["files"].values()} == {"copied", "patched"}
        assert differences(load_folder(Path(folder) / "out"), parts.wanted) == []
        with prepare(parts.plan(tmp_path / "beside", staging=Path(folder))) as staging:
            assert staging.place == tmp_path, "no rename leads from there, so it is assembled beside the target"
        with prepare(parts.plan(Path(folder) / "there", staging=tmp_path)) as staging:
            assert staging.place == Path(folder)
        assert os.listdir(folder) == ["out"]
    verify_nothing_left(tmp_path)


def test_a_working_folder_goes_with_its_block_or_with_the_next_write(parts: Parts, tmp_path: Path) -> None:
    left = tmp_path / f"{TEMPORARY}killed/work/files"
    left.mkdir(parents=True)
    with working_folder(tmp_path) as work:
        save_file({"a": torch.zeros(1)}, work / "model.safetensors")
        parts.write_all(tmp_path / "out")
        assert open_weights(work).shapes() == {"a": (1,)}, "in use, and no folder that readers refuse"
        assert not left.exists()
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


def test_another_mount_of_the_same_file_system(parts: Parts, tmp_path: Path, monkeypatch: Any) -> None:
    """Device numbers are equal then, as between two volumes of a container, and a rename fails all the same."""
    place, real = tmp_path / "volume", os.rename

    def rename(source: Any, target: Any, **options: Any) -> None:
        if (place in Path(source).parents) != (place in Path(target).parents):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source, None, target)
        real(source, target, **options)

    place.mkdir()
    with prepare(parts.plan(tmp_path / "reached", staging=place)) as staging:
        assert staging.place == place
    monkeypatch.setattr(os, "rename", rename)
    parts.write_all(tmp_path / "out", staging=place)
    verify(tmp_path / "out")
    assert list(place.iterdir()) == [] and not list(tmp_path.glob(f"{TEMPORARY}*"))


def test_leftovers_are_removed_wherever_they_lie(parts: Parts, tmp_path: Path) -> None:
    place = tmp_path / "place"
    left = [folder / f"{TEMPORARY}run-{name}" for folder in (place, parts.raw) for name in ("qk_restored", "other")]
    for folder in left:
        (folder / "new").mkdir(parents=True)
        (folder / "new" / "model.safetensors").write_text("half")
    living = prepare(parts.plan(place / "living"))
    parts.write_all(parts.raw / "qk_restored", staging=place)
    assert not any(folder.exists() for folder in left)
    assert living.folder.is_dir(), "another writer's, who is alive"
    living.discard()


def test_a_kernel_copy_that_stops_half_way_is_finished(tmp_path: Path, monkeypatch: Any) -> None:
    data = os.urandom(300_000)
    (tmp_path / "a").write_bytes(data)
    real = os.copy_file_range
    calls: list[int] = []

    def short(src: int, dst: int, count: int, a: int, b: int) -> int:
        calls.append(a)
        return real(src, dst, min(count, 100_000), a, b) if len(calls) < 3 else 0

    monkeypatch.setattr(os, "copy_file_range", short)
    files.copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data
    assert len(calls) == 3


@pytest.mark.parametrize("step0", ["float32", "bfloat16", "float16"])
def test_rows_pass_through_the_dtype_of_step_0(step0: str, tmp_path: Path) -> None:
    dtype = getattr(torch, step0)

    class Kept(BaseFolder):
        def get(self, param: ParamMap, /) -> np.ndarray:
            return as_array(as_tensor(super().get(param)).to(dtype))

    parts = Parts(tmp_path, dtype=torch.float32)
    parts.source = Kept(open_weights(parts.base), parts.names)
    parts.write_all(tmp_path / "out")
    base, raw, found = load_folder(parts.base), load_folder(parts.raw), load_folder(tmp_path / "out")
    assert differences(found, expected("llama", base, raw, step0=dtype)) == []
    assert bool(differences(found, expected("llama", base, raw))) == (step0 != "float32")


def test_headers_are_read_once(parts: Parts, tmp_path: Path, monkeypatch: Any) -> None:
    """Restoring reads the header of every base and raw file once; verifying, that of every raw and restored one."""
    from qkguard.checkpoint import safetensors_io, weights
    from qkguard.offline import verify as verifying

    read: list[Path] = []

    def counted(path: Path) -> safetensors_io.Header:
        read.append(path.resolve())
        return safetensors_io.read_header(path)

    for module in (weights, write, verifying):
        monkeypatch.setattr(module, "read_header", counted)
    folders = [parts.base, parts.raw, tmp_path / "out"]
    restore_checkpoint(parts.base, parts.raw, tmp_path / "out")
    files = [sorted(folder.glob("*.safetensors")) for folder in folders]
    assert sorted(read) == sorted(files[0] + files[1])
    read.clear()
    verify(tmp_path / "out", full=True)
    assert sorted(read) == sorted(files[1] + files[2])


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_file_systems_without_flock(code: int, parts: Parts, tmp_path: Path, monkeypatch: Any) -> None:
    """A lock file that names its process stands in: a living writer is respected, and folders are published."""
    import fcntl

    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock says that it falls back
        staging = prepare(parts.plan(tmp_path / "out"))
        with pytest.raises(QKGuardError, match="Another process is writing"):
            parts.write_all(tmp_path / "out")
        staging.discard()
        verify_nothing_left(tmp_path)
        parts.write_all(tmp_path / "out")
    assert not list(tmp_path.glob("_*"))
    verify(tmp_path / "out")


@pytest.mark.parametrize("links", [True, False])
def test_file_modes_follow_the_umask(links: bool, parts: Parts, tmp_path: Path, monkeypatch: Any) -> None:
    """Of what is written. A link is the user's own file under another name, and keeps its mode."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EXDEV, "another file system")

    if not links:
        monkeypatch.setattr(os, "link", fail)
    for file in parts.raw.glob("*.safetensors"):
        file.chmod(0o600)
    before = modes(parts.raw)
    old = os.umask(0o027)
    try:
        manifest = parts.write_all(tmp_path / "out")
    finally:
        os.umask(old)
    assert modes(parts.raw) == before
    linked = {name for name, file in manifest["files"].items() if file["made"] == "linked"}
    assert bool(linked) == links
    assert modes(tmp_path / "out") == {name: 0o600 if name in linked else 0o640 for name in modes(tmp_path / "out")}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def modes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}


def test_what_travels_with_the_weights(parts: Parts, tmp_path: Path) -> None:
    travels = "tokenizer.json tokenizer.model chat_template.jinja additional_chat_templates/tool.jinja modeling_x.py "
    travels += "kernels/__init__.py generation_config.json preprocessor_config.json LICENSE"
    stays = "optimizer.pt scheduler.pt scaler.pt rng_state_0.pth trainer_state.json training_args.bin latest "
    stays += "zero_to_fp32.py global_step9/x_model_states.pt qk_restored/model.safetensors checkpoint-3/x.json "
    stays += "pytorch_model.bin old.safetensors x.pth _qkguard/reference.safetensors wandb/run.json "
    stays += "adapter_config.json .gitattributes train_results.json optimizer_0/0.distcp x.gguf other/config.json"
    for name in (travels + " " + stays).split():
        (parts.raw / name).parent.mkdir(parents=True, exist_ok=True)
        (parts.raw / name).write_text("text")
    (parts.raw / "README.md").write_text("---\nlicense: mit\ntags: [sft]\nbase_model: org/base\n---\nraw card\n")
    manifest = parts.write_all(tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    weights = {p.name for p in parts.raw.glob("model-*.safetensors")} | {"model.safetensors.index.json"}
    assert found == {*travels.split(), "config.json", "README.md", "qkguard.json"} | weights
    assert {"optimizer.pt", "old.safetensors", "pytorch_model.bin"} <= set(manifest["left_out"])
    assert found.isdisjoint(manifest["left_out"])
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("license: mit", "- sft", "- qkguard", "base_model: org/base", "base_model_relation: finetune"):
        assert line in card
    assert "library_name: transformers" in card and "raw card" not in card


def test_the_card_names_a_base_from_the_hub(parts: Parts, tmp_path: Path) -> None:
    """Also where only the cache's folder name says which model it is; a local folder is no base_model of the hub's."""
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-8B" / "snapshots" / ("0123456789" * 4)
    snapshot.parent.mkdir(parents=True)
    local = parts.write_all(tmp_path / "local")
    assert "base_model" not in (tmp_path / "local" / "README.md").read_text()
    assert local["base"]["id"] == parts.base.name
    judge.no_private_paths(tmp_path / "local")
    parts.base.rename(snapshot)
    parts.source = BaseFolder(open_weights(snapshot), parts.names, model_id=str(snapshot))
    manifest = parts.write_all(tmp_path / "out")
    assert manifest["base"]["id"] == "Qwen/Qwen3-8B" and manifest["base"]["revision"] == "0123456789" * 4
    assert "base_model: Qwen/Qwen3-8B\nbase_model_relation: finetune" in (tmp_path / "out" / "README.md").read_text()


def test_staging_elsewhere(parts: Parts, tmp_path: Path) -> None:
    """A background upload of the checkpoint folder never sees a file in the making."""
    plan = parts.plan(parts.raw / "qk_restored", staging=tmp_path / "run" / "_staging")
    before = sorted(parts.raw.iterdir())
    staging = prepare(plan)
    records = write_files(plan, staging.folder)
    assert sorted(parts.raw.iterdir()) == before
    (temporary,) = (tmp_path / "run" / "_staging").iterdir()
    assert temporary.name.startswith("_")
    publish(plan, staging, records)
    assert list((tmp_path / "run" / "_staging").iterdir()) == []
    verify(parts.raw / "qk_restored")


def test_overwriting(parts: Parts, tmp_path: Path) -> None:
    parts.write_all(tmp_path / "out")
    with pytest.raises(QKGuardError, match=r"exists.*--overwrite"):
        parts.write_all(tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("from before")
    parts.write_all(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale.txt").exists()
    verify(tmp_path / "out")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years")
    with pytest.raises(QKGuardError, match="not written by qkguard"):
        parts.write_all(tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "years"
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


@pytest.mark.parametrize("where", ["raw", "parent"])
def test_a_target_that_holds_the_raw_folder_is_refused(where: str, parts: Parts) -> None:
    with pytest.raises(QKGuardError, match="is or contains"):
        parts.write_all(parts.raw if where == "raw" else parts.raw.parent, overwrite=True)
    verify_nothing_left(parts.raw.parent)


def verify_nothing_left(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["base", "tuned"]


class Failing:
    """A source whose rows run out at the third layer."""

    def __init__(self, source: Any, action: Callable[[], None]) -> None:
        self.source, self.action = source, action

    def get(self, param: ParamMap, /) -> np.ndarray:
        if ".2." in param.name:
            self.action()
        return self.source.get(param)

    def describe(self) -> dict[str, Any]:
        return self.source.describe()


@pytest.mark.parametrize("method", ["restore", "interpolate"])
def test_one_parameter_is_in_memory_at_a_time(method: str, parts: Parts, tmp_path: Path, monkeypatch: Any) -> None:
    """Read, written, the next read; a method that looks at the whole layer reads the whole layer."""
    order: list[tuple[str, str]] = []
    real = restored.write_rows

    class Noting(BaseFolder):
        def get(self, param: ParamMap, /) -> np.ndarray:
            order.append(("read", param.name))
            return super().get(param)

    def noted(fd: int, entry: TensorEntry, param: ParamMap, rows: Any) -> None:
        order.append(("write", param.name))
        real(fd, entry, param, rows)

    monkeypatch.setattr(restored, "write_rows", noted)
    monkeypatch.setattr(restored, "MOST_AT_ONCE", 1)
    parts.source = Noting(open_weights(parts.base), parts.names)
    parts.write_all(tmp_path / "out", method=method, options={"alpha": 0.5} if method == "interpolate" else {})
    q, k = (f"model.layers.0.self_attn.{role}_proj.weight" for role in "qk")
    turns = [("read", q), ("write", q), ("read", k), ("write", k)]
    found = [step for step in order if ".layers.0." in step[1]]
    assert sorted(found) == sorted(turns) and (found == turns) == (method == "restore")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, QKGuardError])
def test_an_exception_leaves_nothing(error: type[BaseException], parts: Parts, tmp_path: Path) -> None:
    def stop() -> None:
        raise error("stop")

    parts.source = Failing(parts.source, stop)
    with pytest.raises(error):
        parts.write_all(tmp_path / "new" / "parents" / "out")
    verify_nothing_left(tmp_path)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(parts: Parts, tmp_path: Path, monkeypatch: Any) -> None:
    real, left = os.pwrite, [40_000]

    def short(fd: int, data: Any, offset: int) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(QKGuardError, match=r"no space left for .*out"):
        parts.write_all(tmp_path / "out")
    verify_nothing_left(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(QKGuardError, match=r"not enough space.* 0\.00 GB free"):
        parts.write_all(tmp_path / "out")
    verify_nothing_left(tmp_path)


def hang(queue: Any) -> None:
    queue.put("reached")
    signal.pause()


def run_to(point: str, parts: Parts, out: Path, queue: Any) -> None:
    """In a child process: write, and stop for good at one point of the way."""
    torch.set_num_threads(1)
    if point == "rows":
        parts.source = Failing(parts.source, lambda: hang(queue))
    elif point == "manifest":
        real = write.write_text
        write.write_text = lambda path, text: hang(queue) if path.name == "qkguard.json" else real(path, text)  # type: ignore[assignment]
    else:
        os.rename = lambda a, b: hang(queue)  # type: ignore[assignment]
    parts.write_all(out)


@pytest.mark.parametrize("point", ["rows", "manifest", "rename"])
def test_a_killed_write_never_counts_and_the_next_one_succeeds(point: str, parts: Parts, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=run_to, args=(point, parts, tmp_path / "out", queue), daemon=True)
    child.start()
    assert queue.get() == "reached"
    with pytest.raises(QKGuardError, match="Another process is writing"):  # while its writer is alive
        parts.write_all(tmp_path / "out")
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob("_*")
    assert left.name.startswith(TEMPORARY)
    for folder in (left, tmp_path / "out"):
        with pytest.raises(QKGuardError):
            verify(folder)
    parts.write_all(tmp_path / "out")
    assert not list(tmp_path.glob("_*"))
    verify(tmp_path / "out")
    assert differences(load_folder(tmp_path / "out"), parts.wanted) == []


def test_nan_in_tuned_weights_is_reported(parts: Parts, tmp_path: Path) -> None:
    names = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight")
    index = json.loads((parts.raw / "model.safetensors.index.json").read_text())["weight_map"]
    for name, value in zip(names, (float("nan"), float("inf")), strict=True):
        tensors = load_file(parts.raw / index[name])
        tensors[name][0, 0] = value
        save_file(tensors, parts.raw / index[name], metadata={"format": "pt"})
    rows_only = parts.write_all(tmp_path / "a")
    assert rows_only["nonfinite"] == [names[1]]
    manifest = restore_checkpoint(parts.base, parts.raw, tmp_path / "b")
    assert manifest["nonfinite"] == sorted(names)
    assert "NaN or Inf in 2 tensor(s)" in manifest["warnings"][0]
    assert "NaN or Inf" in (tmp_path / "b" / "README.md").read_text()
    layer = manifest["layers"][0]["drift"]
    assert layer["k_rel"] is None and layer["q_rel"] > 0
    verify(tmp_path / "b")


def test_nan_in_the_base_is_an_error(parts: Parts, tmp_path: Path) -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    file = parts.base / open_weights(parts.base).where[name]
    tensors = load_file(file)
    tensors[name][5, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QKGuardError, match=rf"{name} holds NaN or Inf before SFT"):
        parts.write_all(tmp_path / "out")
    verify_nothing_left(tmp_path)


def test_quantised_rows_are_refused(parts: Parts, tmp_path: Path) -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    file = parts.raw / open_weights(parts.raw).where[name]
    tensors = load_file(file)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QKGuardError, match=rf"{name} is stored as F8_E4M3.*unquantised"):
        parts.write_all(tmp_path / "out")
    verify_nothing_left(tmp_path)


def test_partial_restores_say_so(parts: Parts, tmp_path: Path) -> None:
    from dataclasses import replace

    spec, params = parts.selection[1]
    latent = replace(params[1], blocks=(Block(0, 16, "k"), Block(16, 32, "kv")))
    kept = replace(latent, blocks=latent.blocks[:1])
    parts.selection[1] = (replace(spec, params=(params[0], latent)), (params[0], kept))
    manifest = parts.write_all(tmp_path / "out")
    assert manifest["partial"] == [latent.name]
    assert "partial" in manifest["warnings"][0]


def test_extra_keys_reach_the_manifest(parts: Parts, tmp_path: Path) -> None:
    extra = {"step": 12, "probe": {"recall": float("nan")}, "warnings": ["the loss spiked"]}
    parts.write_all(tmp_path / "out", extra=extra)
    manifest = json.loads((tmp_path / "out" / "qkguard.json").read_text())
    assert manifest["step"] == 12 and manifest["probe"] == {"recall": None}
    assert manifest["warnings"] == ["the loss spiked"]
    with pytest.raises(ValueError, match="tensors"):
        parts.write_all(tmp_path / "other", extra={"tensors": []})
    assert not (tmp_path / "other").exists()
