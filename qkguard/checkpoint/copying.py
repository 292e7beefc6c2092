"""Bytes of whole files: shared extents where there are some, else ranges in parallel, written out as they go.

`cp` and `sync` copy, then wait for the disk. Here the disk starts with the first range that is final: a copy tells
how far it has come (`FileCopy.wait`), whoever changes it follows behind, and what lies behind him is written out.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from qkguard.errors import QKGuardError

FICLONE = 0x40049409  # ioctl: share all extents with another file (btrfs, xfs, bcachefs, overlay on them)
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL
RANGE_BYTES = 32 << 20
BUFFER_BYTES = 8 << 20
COPIERS = 2  # more gain little: within one file ext4 and xfs let one writer in at a time
WRITE = 2  # SYNC_FILE_RANGE_WRITE: start writing dirty pages, wait for none

Span = tuple[int, int]
"""Bytes of a file: the first, and the one after the last."""

BytesCopied = Callable[[int], None]
"""Called with the number of bytes copied since the last call, from any thread."""


def nobody(count: int) -> None:
    """Where nobody follows a copy."""


def can_clone(source: Path, folder: Path) -> bool:
    """Whether copies of a file in a folder share its extents, and so take no space until they change."""
    with open(source, "rb") as src, tempfile.TemporaryFile(dir=folder) as dst:
        try:
            return _clone(src.fileno(), dst.fileno())
        except OSError:
            return False


def copy_bytes(src: int, dst: int) -> None:
    """Copy all bytes between two open files, and start writing them to disk."""
    if _clone(src, dst):
        return
    size = os.fstat(src).st_size
    for start in range(0, size, RANGE_BYTES):
        stop = min(start + RANGE_BYTES, size)
        copy_range(src, dst, start, stop)
        start_writing(dst, start, stop)


def _clone(src: int, dst: int) -> bool:
    """Share all extents of a file with an empty one; False where the file system does not."""
    try:
        fcntl.ioctl(dst, FICLONE, src)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        return False
    return True


def copy_range(src: int, dst: int, start: int, stop: int, copied: BytesCopied = nobody) -> None:
    """Copy some bytes to the same place in another file: inside the kernel, else through a buffer."""
    done = start
    try:
        while done < stop:
            count = os.copy_file_range(src, dst, stop - done, done, done)
            if count == 0:
                break
            done += count
            copied(count)
    except AttributeError:  # macOS
        pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
    # Across file systems and on some network ones the kernel declines, at once or half-way.
    while done < stop:
        view = memoryview(os.pread(src, min(BUFFER_BYTES, stop - done), done))
        if not view:
            raise QKGuardError("A file became shorter while it was copied. Let its writer finish and try again.")
        while view:
            count = os.pwrite(dst, view, done)
            view, done = view[count:], done + count
            copied(count)


def start_writing(fd: int, start: int, stop: int) -> None:
    """Start writing a range to disk and wait for nothing: the fsync that makes it durable then finds little to do.

    Linux alone has it. Errors are left to that fsync.
    """
    call = _sync_file_range()
    if call is not None:
        call(fd, ctypes.c_int64(start), ctypes.c_int64(stop - start), WRITE)


@cache
def _sync_file_range() -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    return found


class FileCopy:
    """A copy in the making, range by range in order, on the threads of a pool.

    Args:
        without: bytes that are not copied, because the caller overwrites all of them: (start, stop), in order.
        at_once: start writing each range to disk when it is copied, whatever is still to change in it.

    Attributes:
        fd: the copy, open for reading and writing.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        pool: ThreadPoolExecutor,
        copied: BytesCopied = nobody,
        *,
        without: Sequence[Span] = (),
        at_once: bool = False,
    ) -> None:
        self.target, self._started, self._at_once = target, 0, at_once
        self._ranges: list[tuple[int, Future[None]]] = []  # with the byte that each starts at
        self._source = os.open(source, os.O_RDONLY)
        try:
            self.fd = os.open(target, CREATE, 0o666)
        except BaseException:
            os.close(self._source)
            raise
        self._size = os.fstat(self._source).st_size
        if _clone(self._source, self.fd):
            copied(self._size - sum(stop - start for start, stop in without))
            return
        for start, stop in _ranges_but(self._size, without):
            self._ranges.append((start, pool.submit(self._copy, start, stop, copied)))

    def _copy(self, start: int, stop: int, copied: BytesCopied) -> None:
        copy_range(self._source, self.fd, start, stop, copied)
        if self._at_once:
            start_writing(self.fd, start, stop)

    def wait(self, position: int) -> None:
        """Wait until all bytes before a position are there; raises what copying them raised."""
        for start, done in self._ranges:
            if start < position:
                done.result()

    def write_out(self, position: int) -> None:
        """Start writing what lies before a position to disk, once it is copied; nothing there may change after it."""
        while self._started < position:
            stop = min(position, self._started + RANGE_BYTES)
            self.wait(stop)
            start_writing(self.fd, self._started, stop)
            self._started = stop

    def finish(self) -> None:
        """Make the whole copy durable and close it."""
        try:
            self.wait(self._size)
            os.fsync(self.fd)
        finally:
            self.close()

    def cancel(self) -> None:
        """Begin no further range; who waits for one gets a CancelledError."""
        for _, copying in self._ranges:
            copying.cancel()

    def close(self) -> None:
        """Stop where it is, and close both files; again does nothing."""
        self.cancel()
        for _, copying in self._ranges:
            if not copying.cancelled():
                copying.exception()  # a range under way still uses the files
        if self._source >= 0:
            os.close(self._source)
            os.close(self.fd)
        self._source = -1

    def rename(self, target: Path) -> None:
        """Give it another name; it goes on under it."""
        os.rename(self.target, target)
        self.target = target

    def remove(self) -> None:
        """Close it and delete what there is of it."""
        self.close()
        self.target.unlink()


def _ranges_but(size: int, without: Sequence[Span]) -> Iterator[Span]:
    """A file of some size in ranges of at most `RANGE_BYTES`, without some spans of it."""
    position = 0
    for start, stop in (*without, (size, size)):
        for first in range(position, start, RANGE_BYTES):
            yield first, min(first + RANGE_BYTES, start)
        position = stop


class Copies:
    """Copies of a folder's files into another, started ahead of being needed; leaving the block stops all of them.

    With `at_once` the disk starts with each range when it is copied: where it is known only much later what changes,
    it would have nothing to do until then. Pages that change are written twice.

    with Copies(raw, folder) as copies:
        copies.start("model.safetensors")
        ...  # meanwhile, something else
        copy = copies.take("model.safetensors")
        ...  # change it
        copies.finish(copy)
        copies.settle()
    """

    def __init__(self, source: Path, target: Path, threads: int = COPIERS, *, at_once: bool = False) -> None:
        self.source, self.target, self._at_once = source, target, at_once
        self._pool, self._finishing = ThreadPoolExecutor(threads), ThreadPoolExecutor(1)
        self._lock, self._done = Lock(), 0
        self._tell: BytesCopied = nobody
        self._under_way: dict[str, FileCopy] = {}
        self._all: list[FileCopy] = []
        self._finished: list[Future[None]] = []

    def tell(self, copied: BytesCopied) -> None:
        """Whom to call with the number of bytes copied: at once with those so far, then as they come."""
        with self._lock:
            self._tell = copied
            copied(self._done)

    def _count(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._tell(count)

    def start(self, name: str, as_name: str | None = None, without: Sequence[Span] = ()) -> None:
        """Start a copy, under its own or another name and maybe `without` some bytes; one that was started goes on."""
        if name not in self._under_way:
            target = self.target / (as_name or name)
            target.parent.mkdir(parents=True, exist_ok=True)
            how: dict[str, Any] = {"without": without, "at_once": self._at_once}
            copy = FileCopy(self.source / name, target, self._pool, self._count, **how)
            self._under_way[name] = copy
            self._all.append(copy)

    def take(self, name: str) -> FileCopy:
        """A copy that was started, to be changed by the caller and then handed to `finish`."""
        return self._under_way.pop(name)

    def drop(self, name: str) -> None:
        """Delete a copy that turned out not to be needed, if it was started."""
        if name in self._under_way:
            self.take(name).remove()

    def finish(self, copy: FileCopy) -> None:
        """Make a copy durable, beside whatever comes next."""
        self._finished.append(self._finishing.submit(copy.finish))

    def cancel(self) -> None:
        """Copy no more, so that nobody waits; the files stay open until the block is left."""
        for copy in self._all:
            copy.cancel()

    def settle(self) -> None:
        """Wait until every finished copy is durable; raises what that raised."""
        for done in self._finished:
            done.result()

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, *error: object) -> None:
        self._finishing.shutdown(cancel_futures=True)
        for copy in self._all:
            copy.close()
        self._pool.shutdown()
