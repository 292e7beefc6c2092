"""Agreement between ranks: they wait for one another without NCCL's timeouts, and fail together.

Everything here but `rank`, `world_size`, `distributed` and `sign_of_life` is a collective: ALL ranks must call it, in
the same order. An agreement is one all-reduce of three numbers over a gloo group of the guard's own; its cost grows as
that of an all-reduce. Text travels through the store that the ranks met at, and only when something is wrong.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import qkguard.errors as errors
from qkguard.errors import QKGuardError, RankLostError, reason_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

TIMEOUT = 600.0
"""Seconds after a rank's last sign of life when the others give it up."""
HEARTBEAT_SECONDS = 1.0
"""Between two signs of life of a rank that works for the guard, or waits."""
WARNING_SECONDS = 60.0
"""Until a rank that waits says which ranks are missing."""
_LOST, _CLOSED = "lost", "closed"  # in the store: why the run is given up; a connection has closed
_FOREVER = timedelta(days=365)  # gloo's own timeout would count an hour of rank 0's file work as a failure


def rank() -> int:
    """This process's number among the ranks; 0 in a single process."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """How many ranks there are; 1 in a single process."""
    return dist.get_world_size() if distributed() else 1


def distributed() -> bool:
    """Whether torch's process group is up."""
    return dist.is_available() and dist.is_initialized()


def agree(what: str, work: Callable[[], T], *, timeout: float = TIMEOUT) -> T:
    """Run `work` on every rank and return this rank's own result; all fail if one does. ALL ranks must call this.

    `work` may take hours on one rank: while it runs, a thread gives signs of life. `what` says what the ranks meet
    for, in words that are the same on all of them; paths in it may differ.

    Raises:
        QKGuardError: the failure of the lowest failing rank, naming `what` and the rank; or the ranks met for
            different things. In a single process the original exception goes through unchanged.
        RankLostError: a rank died, or gave no sign of life for `timeout` seconds.
    """
    if world_size() == 1:
        return work()
    return _meetings().agree(what, work, timeout)


def everywhere(what: str, test: Callable[[], bool]) -> bool:
    """Whether `test` holds on every rank; ALL ranks must call this, all get the same answer."""
    holds = agree(what, test)
    return holds if world_size() == 1 else _meetings().everywhere(what, holds)


def on_rank(owner: int, what: str, work: Callable[[], T], *, timeout: float = TIMEOUT) -> T:
    """Run `work` on rank `owner` alone while the others wait; all get its result, which must be picklable.

    ALL ranks must call this. Where the others need no result, `held_by` sends none.
    """
    result = held_by(owner, what, work, timeout=timeout)
    if world_size() == 1:
        return result  # type: ignore[return-value]  # the owner's is a T
    return _meetings().broadcast(owner, what, result)


def on_rank_zero(what: str, work: Callable[[], T], *, timeout: float = TIMEOUT) -> T:
    """`on_rank` for rank 0; ALL ranks must call this."""
    return on_rank(0, what, work, timeout=timeout)


def held_by(owner: int, what: str, make: Callable[[], T], *, timeout: float = TIMEOUT) -> T | None:
    """Run `make` on rank `owner` alone; the result stays there, the others get None. ALL ranks must call this."""

    def make_on_owner() -> T | None:
        return make() if rank() == owner else None

    return agree(what, make_on_owner, timeout=timeout)


def sign_of_life() -> None:
    """Say that this rank is alive, for ranks that may wait for it: in long work between two agreements."""
    if world_size() > 1 and _current is not None:
        _current.live()


class Deferred:
    """Failures among a row of collectives, kept until the ranks agree on them, once, at the end.

    A rank that stayed out of a collective would leave the others waiting in it. So what may fail between collectives
    runs through `run`, and a rank where something failed takes part in the rest with whatever it has.

        deferred = Deferred("measuring routing drift")
        for layer in layers:
            rows = gather(layer)  # a collective
            deferred.run(partial(measure, rows))
        deferred.agree()
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.failure: Exception | None = None

    def run(self, work: Callable[[], T]) -> T | None:
        """This rank's result; None if this fails, or anything did before on this rank."""
        if self.failure is None:
            try:
                return work()
            except Exception as failure:
                self.failure = failure
        return None

    def agree(self) -> None:
        """Raise the failure of one rank on all of them; ALL ranks must call this."""
        agree(self.what, self._raise)

    def _raise(self) -> None:
        if self.failure is not None:
            raise self.failure


# -- how ranks meet ---------------------------------------------------------------------------------------------------

_current: _Meetings | None = None


def _meetings() -> _Meetings:
    """The meetings of the present default group; made at the first agreement, on ALL ranks."""
    global _current
    if _current is None or _current.world is not dist.group.WORLD:
        _current = _Meetings()
    return _current


def side_group() -> Any:
    """A gloo group of the guard's own over all ranks, which never times out by itself; ALL ranks must call this."""
    return dist.new_group(backend="gloo", timeout=_FOREVER)


class _Meetings:
    """The agreements of one process group, numbered; ALL ranks must make one and call its methods.

    Only `live`, `lives` and what is called from a wait are no collectives.
    """

    made = 0
    """Of these, in this process, and so in all: their names in the store."""

    def __init__(self) -> None:
        self.world = dist.group.WORLD
        self.rank, self.size = rank(), world_size()
        _Meetings.made += 1
        # torch has no public way to the store that the ranks met at (2.11 to 2.13), and a store of our own would need
        # an address that every launcher agrees on
        self.store = dist.PrefixStore(f"qkguard-{_Meetings.made}", dist.distributed_c10d._get_default_store())
        self.number, self.beats, self.last_beat = 0, 0, 0.0
        self.store.set(_life(self.rank), "0 0")  # before the group is made: after that, every rank's is there
        self.group = side_group()
        self.working = False
        threading.Thread(target=self._beat, name="qkguard-signs-of-life", daemon=True).start()

    def agree(self, what: str, work: Callable[[], T], timeout: float) -> T:
        """`ranks.agree`."""
        self.number += 1
        self.working = True
        try:
            result = work()
        except Exception as error:
            self._meet(what, error, timeout)
            raise  # not reached: `_meet` raises the failure of one rank on all of them
        except BaseException as interrupt:  # this rank is made to end, and waits for nobody
            self.lose(f"{what}: rank {self.rank} was interrupted ({type(interrupt).__name__}).")
            raise
        finally:
            self.working = False
        self._meet(what, None, timeout)
        return result

    def everywhere(self, what: str, holds: bool) -> bool:
        """Whether a test held on every rank."""
        answer = torch.tensor([holds], dtype=torch.int64)
        self._finish(partial(dist.all_reduce, answer, dist.ReduceOp.MIN), what)
        return bool(answer.item())

    def broadcast(self, owner: int, what: str, result: Any) -> Any:
        """The owner's object on every rank."""
        sent = torch.frombuffer(bytearray(pickle.dumps(result)), dtype=torch.uint8)
        length = torch.tensor([len(sent)], dtype=torch.int64)
        self._finish(partial(dist.broadcast, length, owner), what)
        if self.rank != owner:
            sent = torch.empty(int(length), dtype=torch.uint8)
        self._finish(partial(dist.broadcast, sent, owner), what)
        return result if self.rank == owner else pickle.loads(sent.numpy().tobytes())

    def _meet(self, what: str, failure: Exception | None, timeout: float) -> None:
        """One all-reduce of status and purpose, and what follows from it."""
        if failure is not None:
            self._post("failure", json.dumps(_described(failure)))
        topic = _topic(what)
        numbers = torch.tensor([self.size - self.rank if failure else 0, topic, -topic], dtype=torch.int64)
        self._finish(partial(dist.all_reduce, numbers, dist.ReduceOp.MAX), what, timeout)

        failing, highest, lowest = numbers.tolist()
        if highest != -lowest:
            raise QKGuardError(self._crossed(what))
        if failing:
            first = self.size - failing
            kind, text, complete = json.loads(self.store.get(self._key("failure", first)))
            raise getattr(errors, kind)(text if complete else f"{what} failed on rank {first}: {text}")

    def _crossed(self, what: str) -> str:
        """A sentence on ranks that met for different things."""
        self._post("what", what)
        self._finish(partial(dist.barrier), what)
        calls = [self.store.get(self._key("what", r)).decode() for r in range(self.size)]
        who = {call: _ranks(r for r in range(self.size) if calls[r] == call) for call in calls}
        met = "; ".join(f"{callers} for {call!r}" for call, callers in who.items())
        return f"The ranks met for different things: {met}. All ranks must make the same calls, guard.save() too."

    def _finish(self, collective: Callable[..., Any], what: str, timeout: float = TIMEOUT) -> None:
        """Start a collective on the guard's group and wait for it, watching the other ranks."""
        watch = _Watch(self, what, timeout)
        started = None
        while True:
            # looked at before the wait: a collective that ends just as the wait gives up has not failed
            ended = started is not None and started.is_completed()
            try:
                started = started or collective(group=self.group, async_op=True)
                # torch's `Work.wait` gives up after this time while the collective goes on (gloo, torch 2.11 to 2.13)
                started.wait(timedelta(seconds=min(1.0, timeout / 4)))
                return
            except RuntimeError as error:
                closed = error if ended or started is None else None
            watch.look(closed)

    # -- signs of life -----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Give signs of life while this rank works; a thread of its own does."""
        while True:
            time.sleep(HEARTBEAT_SECONDS)
            if self.working:
                try:
                    self.live()
                except RuntimeError:  # the store is gone; the next agreement says so
                    return

    def live(self) -> None:
        """Give a sign of life, at most one in half of `HEARTBEAT_SECONDS`: this rank's meeting, and a counter."""
        now = time.monotonic()
        if now - self.last_beat >= HEARTBEAT_SECONDS / 2:
            self.last_beat, self.beats = now, self.beats + 1
            self.store.set(_life(self.rank), f"{self.number} {self.beats}")

    def lives(self) -> list[str]:
        """Every rank's last sign of life."""
        return [value.decode() for value in self.store.multi_get([_life(r) for r in range(self.size)])]

    def lose(self, sentence: str) -> RankLostError:
        """Give the run up; the error has the sentence of the rank that was first to do so."""
        return RankLostError(self.store.compare_set(_LOST, "", sentence).decode())

    def _post(self, kind: str, text: str) -> None:
        """Leave a text about this meeting for all ranks."""
        self.store.set(self._key(kind, self.rank), text)

    def _key(self, kind: str, r: int) -> str:
        return f"{self.number}/{kind}/{r}"


class _Watch:
    """One rank's view of the others while it waits for them."""

    def __init__(self, meetings: _Meetings, what: str, timeout: float) -> None:
        self.meetings, self.what, self.timeout = meetings, what, timeout
        # many ranks look seldom: a look asks the store for as many values as there are ranks
        self.interval = min(max(2 * HEARTBEAT_SECONDS, meetings.size / 50), timeout / 4)
        self.began = self.last_look = time.monotonic()
        self.seen: dict[int, tuple[str, float]] = {}  # each rank's last sign of life, and when it was new
        self.warned = False

    def look(self, closed: Exception | None) -> None:
        """Raise where the run is given up, a rank has been silent for too long, or a connection has closed."""
        store = self.meetings.store
        try:
            if store.check([_LOST]):
                raise RankLostError(store.get(_LOST).decode())
            if closed or store.check([_CLOSED]):
                raise self.meetings.lose(f"{self.what}: {self._ended(closed)}. Look into the log there.")
            if time.monotonic() - self.last_look > self.interval:
                self._look_at_ranks()
        except dist.DistNetworkError:  # the store lives in rank 0's process, or in its launcher
            raise RankLostError(f"{self.what}: rank 0 or its launcher ended. Look into the log there.") from closed

    def _look_at_ranks(self) -> None:
        self.last_look = time.monotonic()
        self.meetings.live()
        silent = self._silent(self.timeout)
        if silent:
            raise self.meetings.lose(
                f"{self.what}: {_ranks(silent)} gave no sign of life for {self.timeout:.0f} s and may have crashed or "
                "hung. Look into the log there."
            )
        if self.last_look - self.began > WARNING_SECONDS and not self.warned:
            self._warn()

    def _ended(self, closed: Exception | None) -> str:
        """A connection has closed: which ranks give no sign of life from now on, as a clause."""
        self.meetings.store.set(_CLOSED, "")  # all who wait come here, and those who work give their signs
        self._silent(0)
        until = time.monotonic() + 2 * HEARTBEAT_SECONDS
        while time.monotonic() < until:
            time.sleep(HEARTBEAT_SECONDS / 2)
            self.meetings.live()
        dead = [r for r in self._silent(2 * HEARTBEAT_SECONDS) if r != self.meetings.rank]
        return (
            f"{_ranks(dead)} ended or gave no sign of life"
            if dead
            else f"a connection between ranks closed ({closed})"
        )

    def _silent(self, seconds: float) -> list[int]:
        """The ranks whose last sign of life has been the same for at least so long."""
        now = time.monotonic()
        for r, life in enumerate(self.meetings.lives()):
            if r not in self.seen or self.seen[r][0] != life:
                self.seen[r] = (life, now)
        return [r for r, (_, since) in self.seen.items() if now - since >= seconds]

    def _warn(self) -> None:
        """Say which ranks have not come to this meeting; the lowest that has come says it."""
        self.warned = True
        missing = [r for r, (life, _) in self.seen.items() if int(life.split()[0]) < self.meetings.number]
        here = [r for r in self.seen if r not in missing]
        if missing and self.meetings.rank == min(here):
            logger.warning(
                "%s: waiting for %s for %.0f s. All ranks must make this call, guard.save() too.",
                *(self.what[:1].upper() + self.what[1:], _ranks(missing), time.monotonic() - self.began),
            )


@cache
def _topic(what: str) -> int:
    """What an agreement is about, as a number; paths do not count, because they may differ from node to node."""
    return zlib.crc32(re.sub(r"\S*/\S*", "", what).encode())


def _life(r: int) -> str:
    return f"life/{r}"


def _ranks(numbers: Iterable[int]) -> str:
    """ "rank 3", "ranks 0, 2" """
    numbers = list(numbers)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _described(failure: Exception) -> tuple[str, str, bool]:
    """The name of an error in `qkguard.errors`, its message, and whether that is complete."""
    if isinstance(failure, QKGuardError):
        return type(failure).__name__, str(failure), failure.complete
    return QKGuardError.__name__, reason_of(failure), False
