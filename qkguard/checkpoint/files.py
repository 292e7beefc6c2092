"""Copying and linking whole files, and folders that appear complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qkguard.checkpoint.weights import TEMPORARY
from qkguard.errors import QKGuardError

FICLONE = 0x40049409  # ioctl: share all extents with another file (btrfs, xfs, bcachefs, overlay on them)
CHUNK = 64 << 20
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes and make them durable; the mode follows the umask, not the source."""
    with open(source, "rb") as src, os.fdopen(os.open(target, CREATE, 0o666), "r+b") as dst:
        copy_bytes(src.fileno(), dst.fileno())
        os.fsync(dst.fileno())


def copy_named(folder: Path, name: str, target: Path) -> None:
    """`copy_file` from one folder to another, subfolders in the name included."""
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    copy_file(folder / name, target / name)


def can_clone(source: Path, folder: Path) -> bool:
    """Whether copies of a file in a folder share its extents, and so take no space until they change."""
    with open(source, "rb") as src, tempfile.TemporaryFile(dir=folder) as dst:
        try:
            fcntl.ioctl(dst.fileno(), FICLONE, src.fileno())
        except OSError:
            return False
    return True


def copy_bytes(src: int, dst: int, tick: Callable[[int], None] = lambda count: None) -> None:
    """Copy all bytes between two open files: shared extents, else inside the kernel, else through a buffer.

    `tick` is called with the number of bytes copied since the last call.
    """
    size, done = os.fstat(src).st_size, 0
    try:
        fcntl.ioctl(dst, FICLONE, src)
        tick(size)
        return
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
    try:
        while done < size and (count := os.copy_file_range(src, dst, min(CHUNK, size - done), done, done)):
            done += count
            tick(count)
    except AttributeError:  # macOS
        pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
    # Across file systems and on some network ones the kernel declines, at once or half-way.
    while done < size:
        view = memoryview(os.pread(src, min(CHUNK >> 3, size - done), done))
        if not view:
            raise QKGuardError("a file became shorter while it was copied; let the writer finish and try again")
        while view:
            count = os.pwrite(dst, view, done)
            view, done = view[count:], done + count
            tick(count)


def link_or_copy(source: Path, target: Path, mode: int) -> bool:
    """Hard-link a file, or copy it where that fails; True where it was linked.

    A link shares its permissions with the source, and safetensors writes 0600: bits of `mode` that the source lacks
    are added, so that whoever may read the new folder can read all of it.
    """
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        copy_file(source, target)
        return False
    have = target.stat().st_mode & 0o777
    if have | mode != have:
        try:
            os.chmod(target, have | mode)
        except OSError:  # somebody else's file
            os.unlink(target)
            copy_file(source, target)
            return False
    return True


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:  # some network file systems do not know it for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write a small file and make it durable."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class Staging:
    """A folder in the making: assembled under a name that no reader accepts, then renamed into place.

    The temporary folder lies beside `out`, or in `parent` on the same file system. While its maker lives it holds a
    lock on it, so that what a killed process left can be told from what another one is writing.
    """

    def __init__(self, out: Path, parent: Path | None = None) -> None:
        self.out = out
        self.path = (parent or out.parent) / f"{TEMPORARY}{out.parent.name}-{out.name}"
        self._lock: int | None = None
        self._created = False
        self._made: list[Path] = []

    def create(self) -> int:
        """Clear what killed processes left, make the folder and lock it; return the file mode the umask gives."""
        parent = self.path.parent
        for folder in (self.out.parent, parent):
            missing = [p for p in (folder, *folder.parents) if not p.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._made += missing
        if parent.stat().st_dev != self.out.parent.stat().st_dev:
            raise QKGuardError(f"{parent} and {self.out.parent} are on different file systems; choose a nearer one")
        for left in parent.glob(f"{TEMPORARY}*"):
            if not remove_stale(left, certain=left == self.path) and left == self.path:
                raise QKGuardError(f"another process is writing {self.out} right now; wait for it to finish")
        self.path.mkdir()
        self._created = True
        self._lock = _try_lock(self.path)
        return self.path.stat().st_mode & 0o666

    def publish(self, *, replace: bool) -> None:
        """Make the folder durable and rename it to `out`; with `replace` an older one there gives way."""
        for folder, _, _ in os.walk(self.path):
            sync_folder(Path(folder))
        old = self.path.with_name(f"{self.path.name}-old")
        if replace and self.out.exists():
            os.rename(self.out, old)
        os.rename(self.path, self.out)
        self._created = False
        sync_folder(self.out.parent)
        self._unlock()
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove the temporary folder if this object made it, and parents made for it alone."""
        if self._created:
            shutil.rmtree(self.path, ignore_errors=True)
            self._created = False
        self._unlock()
        for folder in self._made:
            with suppress(OSError):  # something else lies in it by now
                folder.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            with suppress(OSError):  # a forked child (a data loader's worker) may hold the descriptor too
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None


@contextmanager
def published(out: Path, parent: Path | None = None, *, replace: bool = True) -> Iterator[tuple[Path, int]]:
    """A folder to fill, and the file mode the umask gives; it becomes `out` when the block ends without an error."""
    staging = Staging(out, parent)
    try:
        mode = staging.create()
        yield staging.path, mode
        staging.publish(replace=replace)
    except BaseException:
        staging.discard()
        raise


def remove_stale(folder: Path, *, certain: bool) -> bool:
    """Remove a temporary folder unless its maker is still alive; say whether it is gone.

    On file systems without locks on folders that cannot be told, so there it stays unless the caller is `certain`.
    """
    try:
        lock = _try_lock(folder)
    except BlockingIOError:
        return False
    if lock is None and not certain:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
    return not folder.exists()


def _try_lock(folder: Path) -> int | None:
    """Lock a folder for as long as the descriptor lives; None where the file system has no such locks."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:
        os.close(fd)
        return None
    return fd


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write and fsync a JSON file through a temporary name, so that it is there whole or not at all."""
    partial = path.with_name(f"_{path.name}.partial")
    with open(partial, "w") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
