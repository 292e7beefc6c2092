"""Folders that appear complete or not at all: assembled under a name that no reader accepts, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from qkguard.checkpoint.files import sync_folder
from qkguard.checkpoint.weights import TEMPORARY
from qkguard.errors import QKGuardError

LOCK, ASSEMBLED, REPLACED = "lock", "new", "old"
"""What is in a temporary folder: its maker's lock, the folder being assembled, the older one it replaces."""


class Staging:
    """A folder in the making: assembled under a name that no reader accepts, then renamed to `out`.

    The temporary folder lies in `place` if `out` can be reached from there by a rename, else beside `out`. Its maker
    holds a lock in it for as long as it lives: so what a killed process left is told from what another one is
    writing. Leaving the `with` block without `publish` removes everything.

    Attributes:
        folder: where the files go.
        place: the folder that holds the temporary folder.

    Raises:
        QKGuardError: another process is writing `out`.
    """

    def __init__(self, out: Path, place: Path | None = None) -> None:
        self.out, self.place = out, out.parent
        self._made: list[Path] = []
        self._lock: BaseFileLock | None = None
        try:
            self._create(place)
        except BaseException:
            self.discard()
            raise

    @property
    def temporary(self) -> Path:
        """The temporary folder, with the lock in it."""
        return self.place / f"{TEMPORARY}{self.out.parent.name}-{self.out.name}"

    @property
    def folder(self) -> Path:
        return self.temporary / ASSEMBLED

    def _create(self, place: Path | None) -> None:
        self._make(self.out.parent)
        remove_abandoned(self.out.parent.glob(f"{TEMPORARY}*"))
        if place is not None and place != self.place:
            self._make(place)
            remove_abandoned(place.glob(f"{TEMPORARY}*"))
            if _can_rename(place, self.out.parent):
                self.place = place
        self._lock = _try_lock(self.temporary)
        if self._lock is None:
            raise QKGuardError(
                f"Another process is writing {self.out}. Wait for it to finish; if none is, delete {self.temporary}."
            )
        for left in (self.folder, self.temporary / REPLACED):  # by a killed process
            if left.exists():
                shutil.rmtree(left)
        self.folder.mkdir()

    def _make(self, folder: Path) -> None:
        self._made += [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)

    def publish(self, *, replace: bool = True) -> None:
        """Make the folder durable and rename it to `out`; with `replace` an older one there gives way."""
        self.sync()
        self.rename(replace=replace)
        sync_folder(self.out.parent)

    def sync(self) -> None:
        """Make the folder durable under its temporary name; its files are already."""
        for folder, _, _ in os.walk(self.folder):
            sync_folder(Path(folder))

    def rename(self, *, replace: bool = True) -> None:
        """After `sync`: the rename alone, which waits for no disk. A crash of the machine may undo it."""
        if replace and self.out.exists():
            os.rename(self.out, self.temporary / REPLACED)
        os.rename(self.folder, self.out)
        self._remove()

    def discard(self) -> None:
        """Remove the temporary folder, and the parents made for it alone; nothing after `publish`."""
        self._remove()
        for folder in self._made:
            with suppress(OSError):  # something else lies in it by now
                folder.rmdir()

    def _remove(self) -> None:
        if self._lock is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()


@contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in `parent` for the length of a block. What a killed process leaves of one goes with the next
    `Staging` beside it.
    """
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=TEMPORARY, dir=parent))
    lock = _try_lock(temporary)
    folder = temporary / "work" / "files"  # a level deeper than what readers refuse as half-written
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            lock.release()


def _can_rename(place: Path, target: Path) -> bool:
    """Whether a folder in `place` can be renamed into `target`: tried, because equal device numbers are no promise
    (two mounts of one file system, as containers have them).
    """
    try:
        probe = Path(mkdtemp(prefix=TEMPORARY, dir=place))
    except OSError:  # read-only, or full
        return False
    try:
        probe.rename(target / probe.name)
    except OSError:
        return False
    finally:
        for folder in (probe, target / probe.name):
            shutil.rmtree(folder, ignore_errors=True)
    return True


def _try_lock(folder: Path) -> BaseFileLock | None:
    """Make a temporary folder and lock it; None where another living process holds it.

    On file systems without `flock` (ENOSYS, as filelock itself does; ENOLCK and EOPNOTSUPP from some network ones)
    the lock is a file that names its process.
    """
    folder.mkdir(exist_ok=True)
    # not `thread_local`: a write may end on another thread than it began on
    lock: BaseFileLock = FileLock(folder / LOCK, thread_local=False)
    try:
        try:
            lock.acquire(timeout=0)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            lock = SoftFileLock(folder / f"{LOCK}.soft", thread_local=False)
            lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove temporary folders whose makers are dead; one that cannot be judged or removed stays."""
    for folder in folders:
        with suppress(OSError):
            lock = _try_lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()
