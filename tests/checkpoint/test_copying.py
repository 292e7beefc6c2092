"""Copying that overlaps with patching, with the disk and with finding out what to patch."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qkguard.checkpoint import copying
from qkguard.checkpoint.ahead import HeadStart
from qkguard.checkpoint.copying import Copies, FileCopy
from qkguard.errors import QKGuardError
from qkguard.layout import find_attention
from qkguard.offline.restore import restore_checkpoint
from tests.support.models import save_pair
from tests.support.oracle import differences, expected, load_folder

SIZE = 10_500


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "RANGE_BYTES", 1000)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a file of 10,500 bytes, and an empty one."""
    for name in ("raw", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "raw" / "a").write_bytes(os.urandom(SIZE))
    return tmp_path / "raw", tmp_path / "new"


def held(monkeypatch: pytest.MonkeyPatch) -> Event:
    """Copying of the ranges from 5,000 on waits for this event."""
    real, go = copying.copy_range, Event()

    def copy_range(src: int, dst: int, start: int, stop: int, copied: Callable[[int], None]) -> None:
        if start >= 5000:
            assert go.wait(30)
        real(src, dst, start, stop, copied)

    monkeypatch.setattr(copying, "copy_range", copy_range)
    monkeypatch.setattr(copying, "_clone", lambda src, dst: False)
    return go


def test_a_change_waits_for_the_bytes_it_changes(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    raw, new = folders
    go = held(monkeypatch)
    data = (raw / "a").read_bytes()
    with Copies(raw, new) as copies, ThreadPoolExecutor(1) as waiting:
        copies.start("a")
        copy = copies.take("a")
        copy.wait(5000)  # there already
        os.pwrite(copy.fd, b"early", 100)
        late = waiting.submit(copy.wait, 5001)
        time.sleep(0.05)
        assert not late.done()
        os.pwrite(copy.fd, b"too early", 7000)
        go.set()
        late.result()
        copies.finish(copy)
        copies.settle()
    assert (new / "a").read_bytes() == data[:100] + b"early" + data[105:]


@pytest.mark.parametrize("clones", [False, True])
def test_what_is_overwritten_whole_is_not_copied(
    clones: bool, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor waited for, nor counted as copied; a file system that shares extents does all of it at once."""
    raw, new = folders
    data = (raw / "a").read_bytes()

    def clone(src: int, dst: int) -> bool:
        return clones and bool(os.pwrite(dst, data, 0))

    monkeypatch.setattr(copying, "_clone", clone)
    for spans in ([(0, 1500), (3000, 3000), (4200, 9000)], [(9500, SIZE)], [(0, SIZE)], []):
        name = f"b{len(spans)}{spans[:1]}"
        counted: list[int] = []
        with Copies(raw, new) as copies:
            copies.tell(counted.append)
            copies.start("a", name, spans)
            copy = copies.take("a")
            copy.wait(SIZE)
            found = os.pread(copy.fd, SIZE, 0).ljust(SIZE, b"\0")
            for start, stop in spans:
                os.pwrite(copy.fd, data[start:stop], start)
            copies.finish(copy)
            copies.settle()
        hollow = bytearray(data)
        for start, stop in spans:
            hollow[start:stop] = bytes(stop - start)
        assert found == (data if clones else bytes(hollow)) and (new / name).read_bytes() == data
        assert sum(counted) == SIZE - sum(stop - start for start, stop in spans)


def test_the_disk_starts_with_what_is_final(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is handed to the disk before it is copied, and never twice."""
    raw, new = folders
    go, begun = held(monkeypatch), []
    monkeypatch.setattr(copying, "start_writing", lambda fd, start, stop: begun.append((start, stop)))
    with Copies(raw, new) as copies, ThreadPoolExecutor(1) as pool:
        copies.start("a")
        copy = copies.take("a")
        copy.write_out(2500)
        assert begun == [(0, 1000), (1000, 2000), (2000, 2500)]
        rest = pool.submit(copy.write_out, SIZE)
        time.sleep(0.05)
        assert begun[-1][1] <= 5500 and not rest.done()
        go.set()
        rest.result()
    assert [start for start, _ in begun[1:]] == [stop for _, stop in begun[:-1]] and begun[-1][1] == SIZE


def test_patches_come_before_their_pages_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is known at once what changes: the layout is in the cache."""
    base, tuned = save_pair(tmp_path, "llama")
    restore_checkpoint(base, tuned, tmp_path / "known")
    begun: dict[int, int] = {}
    late: list[int] = []
    real = os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if offset < begun.get(fd, 0):
            late.append(offset)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)

    def start_writing(fd: int, start: int, stop: int) -> None:
        begun[fd] = max(stop, begun.get(fd, 0))

    monkeypatch.setattr(copying, "start_writing", start_writing)
    restore_checkpoint(base, tuned, tmp_path / "out")
    assert late == [] and max(begun.values()) > 0.9 * (tuned / "model.safetensors").stat().st_size
    # every page is handed to the disk right before a patch, whichever thread is first
    monkeypatch.setattr(FileCopy, "wait", lambda copy, position: begun.update({copy.fd: 1 << 40}))
    monkeypatch.setattr(FileCopy, "write_out", lambda copy, position: None)
    restore_checkpoint(base, tuned, tmp_path / "again")
    assert late, "pages written too early would be seen"


def test_nobody_waits_for_a_copy_that_was_cancelled(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, new = folders
    go = held(monkeypatch)
    with Copies(raw, new) as copies, ThreadPoolExecutor(1) as waiting:
        copies.start("a")
        late = waiting.submit(copies.take("a").wait, SIZE)
        copies.cancel()
        go.set()  # for the ranges that were under way
        with pytest.raises(CancelledError):
            late.result(30)


def test_an_error_of_the_disk_reaches_who_waits(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    raw, new = folders

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with Copies(raw, new) as copies:
        copies.start("a")
        with pytest.raises(OSError, match="No space left"):
            copies.take("a").wait(1)


def test_a_copy_that_is_not_needed_is_deleted(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    raw, new = folders
    held(monkeypatch).set()
    told: list[int] = []
    with Copies(raw, new) as copies:
        copies.drop("a")
        copies.start("a", "sub/b")
        copies.start("a", "sub/b")
        copies.take("a").wait(SIZE)
        copies.tell(told.append)
        assert sum(told) == SIZE
        copies.start("a", "c")
        copies.drop("a")
    assert sorted(path.name for path in new.rglob("*")) == ["b", "sub"]


@pytest.mark.parametrize("space", [True, False])
def test_an_unknown_config_is_copied_while_its_code_is_imported(
    space: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying starts at once and goes on in the result; what needs no patch is linked all the same."""
    monkeypatch.setenv("QKGUARD_CACHE", str(tmp_path / "cache"))
    base, tuned = save_pair(tmp_path, "llama", dtype=torch.bfloat16, shard="60KB")
    shards = sorted(file.name for file in tuned.glob("*.safetensors"))
    copied: dict[str, int] = {}

    def slow(*args: Any, **options: Any) -> Any:
        for staging in tmp_path.glob("_qkguard-tmp-*/new"):
            wait_for(staging, {name: (tuned / name).stat().st_size for name in shards})
            copied.update({name: (staging / name).stat().st_ino for name in shards})
        return find_attention(*args, **options)

    monkeypatch.setattr("qkguard.layout.find_attention", slow)
    if not space:
        monkeypatch.setattr("qkguard.checkpoint.ahead.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        monkeypatch.setattr("qkguard.checkpoint.write.can_clone", lambda source, folder: True)
        monkeypatch.setattr("qkguard.checkpoint.ahead.can_clone", lambda source, folder: False)
    reported: list[tuple[int, int]] = []
    manifest = restore_checkpoint(
        base, tuned, tmp_path / "out", progress=lambda done, total: reported.append((done, total))
    )
    assert sorted(copied) == (shards if space else [])
    made = {name: file["made"] for name, file in manifest["files"].items()}
    assert set(made.values()) == {"linked", "patched"}
    for name, how in made.items():
        same = (tmp_path / "out" / name).stat().st_ino == copied.get(name)
        assert same == (space and how == "patched")
    assert differences(load_folder(tmp_path / "out"), expected("llama", load_folder(base), load_folder(tuned))) == []
    assert reported[-1][0] == reported[-1][1] and reported == sorted(reported)
    copied.clear()
    restore_checkpoint(base, tuned, tmp_path / "again")
    assert not copied, "the second time nothing is asked"


def test_a_head_start_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKGUARD_CACHE", "")
    base, tuned = save_pair(tmp_path, "llama")
    seen: list[Path] = []

    def refuse(*args: Any, **options: Any) -> Any:
        seen.extend(tmp_path.glob("_qkguard-tmp-*/new/model.safetensors"))
        raise QKGuardError("no layout")

    monkeypatch.setattr("qkguard.layout.find_attention", refuse)
    with pytest.raises(QKGuardError, match="no layout"):
        restore_checkpoint(base, tuned, tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]
    with pytest.raises(QKGuardError, match="no layout"):
        restore_checkpoint(base, tuned, tmp_path / "out")
    assert len(seen) == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def wait_for(folder: Path, sizes: dict[str, int]) -> None:
    """Until the folder holds these files, whole."""
    until = time.monotonic() + 20
    while {file.name: file.stat().st_size for file in folder.iterdir()} != sizes:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_nothing_is_imported_before_copying_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of their own make one more question for the model's code; it waits until copying has begun."""
    monkeypatch.setenv("QKGUARD_CACHE", str(tmp_path / "cache"))
    base, tuned = save_pair(tmp_path, "llama", dtype=torch.bfloat16, tie_word_embeddings=False)
    events: list[str] = []
    begin = HeadStart.begin

    def begun(ahead: HeadStart) -> None:
        events.append("copy")
        begin(ahead)

    monkeypatch.setattr(HeadStart, "begin", begun)
    for module in ("pair", "whole", "missing"):
        monkeypatch.setattr(f"qkguard.offline.{module}.import_model_code", partial(events.append, module))
    restore_checkpoint(base, tuned, tmp_path / "out")
    assert events[0] == "copy" and {"pair", "whole"} <= set(events)


def test_the_disk_starts_at_once_where_it_would_have_nothing_to_do(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, new = folders
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(copying, "start_writing", lambda fd, start, stop: started.append((start, stop)))
    monkeypatch.setattr(copying, "_clone", lambda src, dst: False)
    for at_once in (False, True):
        with Copies(raw, new, at_once=at_once) as copies:
            copies.start("a", f"b{at_once}")
            copies.take("a").wait(SIZE)
        covered = sum(stop - start for start, stop in started)
        assert covered == (SIZE if at_once else 0)
