"""The restored model of a save, made in a thread beside the training: one at a time.

What the thread does needs files alone: raw files are never rewritten in place, and the rows from before SFT are on
disk. It calls no collective, touches no model, no random stream and no setting of torch's, and sends nothing to
trackers. It renames nothing into a checkpoint either. Trainer's rotation, in the main thread, removes checkpoints file
by file and goes by their times: a folder that appears in the middle of that would keep a rotated checkpoint alive, or
let a newer one be rotated in its place. So the main thread does the rename, at its next event (`look`). That waits for
no disk, and nothing of the guard's ever runs beside a rotation.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qkguard.checkpoint.shares import Heed, ShareError
from qkguard.checkpoint.staging import Staging
from qkguard.choice.candidates import Candidate
from qkguard.distributed import ranks
from qkguard.errors import QKGuardError
from qkguard.training.attempt import ENDS_TRAINING, LATER, attempt, say_failed
from qkguard.training.resume import holds_only_restored
from qkguard.training.run_folder import RESTORED

logger = logging.getLogger(__name__)

STOP_SECONDS = 30.0
"""How long the end of an interrupted process waits for the thread to notice; one file operation takes no longer."""


class StoppedError(QKGuardError):
    """The process ends before the write does."""


@dataclass(frozen=True)
class Save:
    """What a save is to the guard.

    Attributes:
        step: the training's.
        record: what manifests say of the training so far.
        checkpoint: the folder that Trainer has written and may remove at any time, which ends the write quietly. None
            for folders that stay: the final ones, and those that the user named.
        awaited: whether the training waits for the write, so that its end is no news.
        chosen: what restored folders hold, raw or a restore; None for the restore of checkpoints, as configured.
    """

    step: int
    record: Mapping[str, Any]
    checkpoint: Path | None = None
    awaited: bool = False
    chosen: Candidate | None = None

    @property
    def outlives_training(self) -> bool:
        """Whether no event of a training may follow, so that the thread does the rename."""
        return not self.awaited and self.checkpoint is None


@dataclass(eq=False)
class Write:
    """One rank's part in making restored folders: one, or of adapters one for each.

    Attributes:
        outs: the folders that will appear.
        raw: the files they are made from.
        make: assembles the folders and returns what is to be renamed, which for other ranks than the first is nothing;
            it calls what it is given several times a second, and leaves nothing behind when it raises.
        save: what it is part of.
        shared: whether several ranks take part, of which rank 0 tells the outcome.
        temporary: what to remove after a failure, when no rank writes into it any more.
        error: what ended the write.
        removed: whether it ended because the checkpoint was removed.
        told: whether the log has the outcome.
        seconds: how long the thread worked.
        waited: of that, how long the training waited for it.
    """

    outs: tuple[Path, ...]
    raw: tuple[Path, ...]
    make: Callable[[Heed], Sequence[Staging]]
    save: Save
    shared: bool = False
    temporary: Path | None = None
    error: BaseException | None = None
    removed: bool = False
    told: bool = False
    seconds: float = 0.0
    waited: float = 0.0
    _made: Sequence[Staging] = ()
    _stop: threading.Event = field(default_factory=threading.Event)
    _process: int = field(default_factory=os.getpid)
    _rank: int = field(default_factory=ranks.rank)  # asked now: the process group may be gone when it ends
    _thread: threading.Thread | None = None

    def start(self) -> None:
        # A daemon: whether the end of the process waits for it is decided in `_at_exit`, not by the interpreter
        thread = threading.Thread(target=self._run, name="qkguard-write", daemon=True)
        try:
            thread.start()
            self._thread = thread
        except RuntimeError:  # no more threads: other ranks count on this one's part all the same
            self._run()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._made = self.make(self._heed)
            if self.save.outlives_training:
                self._rename()
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - started
        if self.save.outlives_training:
            self.tell()

    def _heed(self) -> None:
        if self._stop.is_set():
            raise StoppedError("the process ended first")

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def here(self) -> bool:
        """Whether this process began it; those that data loaders fork from it have no thread, and no say."""
        return os.getpid() == self._process

    def wait(self) -> None:
        started = time.perf_counter()
        self._join()
        self.waited += time.perf_counter() - started

    def stop(self) -> None:
        """Let the write end as soon as it notices, with a `StoppedError`."""
        self._stop.set()
        self._join(STOP_SECONDS)

    def _join(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def conclude(self) -> None:
        """After the thread's end, in the main thread: rename what was made, unless the checkpoint is gone."""
        if self.save.checkpoint is not None and self._raw_is_gone():
            self.error, self.removed = None, True
        if self.error is None and not self.removed and not self.save.outlives_training:
            try:
                self._rename()
            except Exception as error:
                self.error = error
        for made in self._made:
            made.discard()
        self.remove_leftover()

    def _rename(self) -> None:
        """The times of the folder around it stay as they are: Trainer's rotation goes by those of checkpoints."""
        for made in self._made:
            around = made.out.parent
            before = around.stat()
            made.rename()
            with suppress(OSError):  # another user's folder
                os.utime(around, ns=(before.st_atime_ns, before.st_mtime_ns))

    def _raw_is_gone(self) -> bool:
        """Whether raw files were removed; listed, because on network file systems `exists` may remember."""
        for folder in {file.parent for file in self.raw}:
            try:
                there = os.listdir(folder)
            except OSError as error:
                return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
            if any(file.name not in there for file in self.raw if file.parent == folder):
                return True
        return False

    def remove_leftover(self) -> None:
        """Remove a checkpoint that holds nothing but its restored model: resuming would take it for a checkpoint.

        Somebody else than Trainer has then removed it while the folder was renamed.
        """
        checkpoint = self.save.checkpoint
        with suppress(OSError):
            if checkpoint is not None and holds_only_restored(checkpoint):
                self.removed = True
                shutil.rmtree(checkpoint / RESTORED, ignore_errors=True)
                checkpoint.rmdir()

    def tell(self) -> None:
        """Log the outcome, once, on rank 0."""
        if self.told or self._rank != 0:
            return
        self.told = True
        names = ", ".join(map(str, self.outs))
        if self.removed:
            logger.info("%s was removed while its restored model was written, so there is none.", self.save.checkpoint)
        elif isinstance(self.error, StoppedError):
            logger.warning("The process ended before %s was written. %s", names, LATER)
        elif self.error is not None:
            say_failed(f"writing {names}", self.error, LATER)
        elif not self.save.awaited:
            logger.info("Wrote %s (%.1f s, beside the training).", names, self.seconds)


class BackgroundWriter:
    """The writes of one session, one at a time.

    `begin` and `finish` belong to ALL ranks; `look` to each by itself.

    Args:
        strict: whether a failed write ends the training, when ranks meet next.
        note: takes every write that has succeeded beside the training, in the main thread.
    """

    def __init__(self, strict: bool, note: Callable[[Write], None]) -> None:
        self.strict, self.note = strict, note
        self._about: str | None = None  # what `finish` waits for; equal on all ranks
        self._write: Write | None = None
        self._ended: Write | None = None

    def begin(self, about: str, write: Write | None) -> None:
        """Start a write that ranks do together, or each by itself; ALL ranks must call this, after `finish`.

        `about` says what is done, in the same words on all ranks; `write` is this rank's part, if it has one.
        """
        assert self._about is None, f"{self._about} is not finished"
        self._about, self._write, self._ended = about, write, None
        if write is not None:
            _running.add(self)
            write.start()

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._write is not None and self._write.running

    def look(self) -> None:
        """Put what this rank's thread has made in its place; for the trainer's events, where nobody waits."""
        if self._write is not None and self._write.here and not self.busy:
            self._end(self.strict)

    def finish(self, *, strict: bool | None = None) -> None:
        """Wait for the write that goes on; ALL ranks must call this.

        Raises:
            Exception: what ended the write, on all ranks, if `strict` (default: the session's setting); a wrong
                reference always.
        """
        if self._about is None:
            return
        strict = self.strict if strict is None else strict
        try:
            with attempt(self._about, strict=strict, advice=LATER):
                ranks.agree(self._about, partial(self._join, strict))
        finally:
            self._clear_up()

    def _join(self, strict: bool) -> None:
        """Wait for this rank's part, and raise what ended it, unless another rank does or rank 0 has told it."""
        if self._write is not None:
            self._write.wait()
            self._end(strict)
        ended = self._ended
        if ended is None or ended.error is None or isinstance(ended.error, ShareError):
            return
        rank_zero_tells = ended.shared and not strict
        if isinstance(ended.error, ENDS_TRAINING) or not (ended.told or rank_zero_tells):
            raise ended.error

    def _end(self, strict: bool) -> None:
        """What follows the thread's end: the rename, a line in the log, `note`."""
        assert self._write is not None
        ended, self._write = self._write, None
        self._ended = ended
        _running.discard(self)
        ended.conclude()
        if ended.error is None or not (strict or isinstance(ended.error, ENDS_TRAINING)):
            ended.tell()
        if ended.error is None and not ended.removed and not ended.save.awaited:
            self.note(ended)

    def _clear_up(self) -> None:
        """When all ranks have stopped writing: what a rank wrote after rank 0 had given up, a checkpoint's rest."""
        if self._write is not None:  # the wait was interrupted, and may be taken up again
            return
        ended, self._ended, self._about = self._ended, None, None
        if ended is None:
            return
        ended.remove_leftover()
        if ended.temporary is not None and (ended.error is not None or ended.removed):
            shutil.rmtree(ended.temporary, ignore_errors=True)

    def at_exit(self) -> None:
        """The process ends in the middle of a write: wait for it, or give it up if there is a hurry."""
        write = self._write
        if write is None or not write.here:
            return
        if _in_a_hurry(write):
            write.stop()
        else:
            write.wait()
        if not write.running:
            self._end(strict=False)


_running: set[BackgroundWriter] = set()


def _in_a_hurry(write: Write) -> bool:
    """Whether the process ends by Ctrl-C, or by an error that may have ended other ranks that take part."""
    failure = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)  # the former since Python 3.12
    return isinstance(failure, KeyboardInterrupt) or (failure is not None and write.shared)


def _at_exit() -> None:
    for writer in list(_running):
        writer.at_exit()


# Private (Python 3.9 to 3.14): runs before the interpreter forbids new threads and thread pools, without which copying
# and hashing cannot go on. `atexit` runs after that: a write that the process does not wait for would then fail.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
