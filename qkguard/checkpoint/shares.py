"""Ranks that write one folder together without talking: each leaves what it has done as a file, rank 0 collects.

The files lie beside the folder in the making, on the disk that the ranks share. Nothing here is a collective, so all
of it may run in threads beside a training. `write.prepare` comes first, on rank 0.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkguard.checkpoint.files import write_json
from qkguard.checkpoint.staging import Staging
from qkguard.checkpoint.write import FolderPlan, Record, complete, write_files
from qkguard.errors import QKGuardError, reason_of

SHARES = "shares"
BEAT_SECONDS = 1.0
PATIENCE_SECONDS = 600.0
"""A rank that has left no sign of life for so long is given up, as in `distributed.ranks`."""

Heed = Callable[[], None]
"""Called several times a second while files are written; raises where the write should end."""


class ShareError(QKGuardError):
    """This rank gave up because another one has failed, which has the reason."""


@dataclass
class Shares:
    """Where the ranks leave their records, beside the folder being assembled.

    `rank-3.json` says that rank 3 is done or has failed, or `rank-3.failed` if there is no space for the reason; until
    then `rank-3.alive` is a sign of life.
    """

    folder: Path
    _last_beat: float = field(default=0.0, repr=False)

    @property
    def place(self) -> Path:
        return self.folder.parent / SHARES

    def open(self) -> None:
        """Rank 0, before the others begin: make an empty place for the records."""
        shutil.rmtree(self.place, ignore_errors=True)  # a killed process may have left one
        self.place.mkdir()

    def close(self) -> None:
        """Rank 0 gives up: the place goes at once, before its files go one by one.

        Else another rank that misses one of them would take that for a failure of its own.
        """
        with suppress(OSError):
            self.place.rename(self.place.with_name(f"{SHARES}-closed"))

    def leave(self, rank: int, records: list[Record]) -> None:
        """Rank `rank` is done."""
        write_json(self._record(rank), {"records": records})

    def leave_failure(self, rank: int, error: BaseException) -> None:
        """Rank `rank` has failed, and says why."""
        try:
            write_json(self._record(rank), {"failed": reason_of(error)})
        except OSError:  # no space for the reason
            with suppress(OSError):
                (self.place / f"rank-{rank}.failed").touch()

    def beat(self, rank: int) -> None:
        """Leave a sign of life, about once a second; fails where rank 0 has given up and removed the place."""
        now = time.monotonic()
        if now - self._last_beat >= BEAT_SECONDS:
            self._last_beat = now
            (self.place / f"rank-{rank}.alive").touch()

    def collect(self, world: int, heed: Heed) -> list[Record]:
        """Rank 0: wait for the records of the ranks from 1 to `world` - 1.

        Raises:
            ShareError: at once when another rank has failed.
            QKGuardError: a rank left no sign of life for `PATIENCE_SECONDS`.
        """
        records: list[Record] = []
        waiting = {rank: (0, time.monotonic()) for rank in range(1, world)}  # -> its last sign, and when seen
        pause = 0.01
        while waiting:
            heed()
            there = set(os.listdir(self.place))  # on network file systems this looks anew, `exists` may not
            if lost := [rank for rank in waiting if f"rank-{rank}.failed" in there]:
                raise ShareError(f"rank {lost[0]}: it failed and could not write why; the disk may be full")
            for rank in [rank for rank in waiting if self._record(rank).name in there]:
                left = json.loads(self._record(rank).read_text())
                if "failed" in left:
                    raise ShareError(f"rank {rank}: {left['failed']}")
                records += left["records"]
                del waiting[rank]
            for rank, (sign, seen) in waiting.items():
                waiting[rank] = self._look_for_sign(rank, sign, seen)
            time.sleep(pause if waiting else 0)
            pause = min(0.5, pause * 1.5)
        return records

    def _look_for_sign(self, rank: int, sign: int, seen: float) -> tuple[int, float]:
        with suppress(FileNotFoundError):
            new = (self.place / f"rank-{rank}.alive").stat().st_mtime_ns
            if new != sign:
                return new, time.monotonic()
        if time.monotonic() - seen > PATIENCE_SECONDS:
            raise QKGuardError(
                f"Rank {rank} has written nothing for {PATIENCE_SECONDS:.0f} s; it may have crashed or hung. Check "
                "its log"
            )
        return sign, seen

    def _record(self, rank: int) -> Path:
        return self.place / f"rank-{rank}.json"


def write_share(plan: FolderPlan, shares: Shares, rank: int, world: int, heed: Heed) -> None:
    """Another rank than 0: write its files of the plan and leave the records, or the reason why not.

    Raises:
        ShareError: rank 0 has given up, so that nobody waits for this share.
    """

    def progress(done: int, total: int) -> None:
        heed()
        shares.beat(rank)

    with telling(shares, rank):
        shares.beat(rank)
        shares.leave(rank, write_files(plan, shares.folder, rank, world, progress))


@contextmanager
def telling(shares: Shares, rank: int) -> Iterator[None]:
    """Inside the block another rank than 0 tells rank 0 of what it fails by."""
    try:
        yield
    except BaseException as error:
        if not shares.place.is_dir():
            raise ShareError("rank 0 gave up") from error
        shares.leave_failure(rank, error)
        raise


def write_together(
    plan: FolderPlan, staging: Staging, world: int, extra: Mapping[str, Any], heed: Heed
) -> dict[str, Any]:
    """Rank 0: write its files of the plan, wait for the other ranks' and complete the folder, all but the rename.

    Returns:
        The manifest. After an error the temporary folder is gone.
    """

    def progress(done: int, total: int) -> None:
        heed()

    shares = Shares(staging.folder)
    try:
        records = write_files(plan, staging.folder, 0, world, progress)
        return complete(plan, staging, records + shares.collect(world, heed), extra)
    except BaseException:
        shares.close()
        staging.discard()
        raise
