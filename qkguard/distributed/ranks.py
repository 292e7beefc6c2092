"""Agreement between ranks: waiting for one another without NCCL timeouts, and failing together.

Everything here but `rank`, `world_size` and `distributed` is a collective: ALL ranks must call it, in the same order.
Only `agree` talks to other ranks; the others are written with it.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

import qkguard.errors as errors
from qkguard.errors import QKGuardError, RankLostError

T = TypeVar("T")

HEARTBEAT_SECONDS = 2.0
_round = 0  # how often this rank has agreed; equal on all ranks, so it names the keys of one agreement


def rank() -> int:
    """This process's number among the ranks; 0 in a single process."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """How many ranks there are; 1 in a single process."""
    return dist.get_world_size() if distributed() else 1


def distributed() -> bool:
    """Whether torch's process group is up."""
    return dist.is_available() and dist.is_initialized()


def agree(what: str, work: Callable[[], T], *, timeout: float = 600.0) -> list[T]:
    """Run `work` on every rank; every rank gets all results, in rank order. ALL ranks must call this.

    A failure on one rank is raised on all of them. A rank that has finished polls the process group's store instead
    of sitting in a collective, so `work` may take hours on one rank without tripping an NCCL timeout. While it runs,
    a thread posts a heartbeat; a rank without one for `timeout` seconds is given up. Results must be small and
    picklable.

    Raises:
        QKGuardError: the failure of the lowest failing rank, naming `what` and the rank. In a single process the
            original exception goes through unchanged.
        RankLostError: a rank sent no heartbeat for `timeout` seconds.
    """
    if world_size() == 1:
        return [work()]
    global _round
    _round += 1
    store = _store()
    if rank() == 0 and _round > 2:  # every rank has left that round: it has posted the one after
        for r in range(world_size()):
            store.delete_key(_done_key(_round - 2, r))
            store.delete_key(_beat_key(_round - 2, r))

    with _heartbeat(store, _beat_key(_round, rank())):
        outcome, interrupt = _outcome_of(work)
    store.set(_done_key(_round, rank()), pickle.dumps(outcome))  # type: ignore[arg-type]  # torch takes bytes as well
    if interrupt is not None:
        raise interrupt

    outcomes = [_await(store, r, what, timeout) for r in range(world_size())]
    for r, (status, value) in enumerate(outcomes):
        if status != "ok":
            raise getattr(errors, status)(f"{what} failed on rank {r}: {value}")
    return [value for _, value in outcomes]  # type: ignore[misc]  # an "ok" outcome holds what `work` returned


def _store() -> dist.Store:
    """The store that the ranks met at. torch has no public way to it (2.11 to 2.13), and a store of our own would need
    an address that every launcher agrees on.
    """
    return dist.PrefixStore("qkguard", dist.distributed_c10d._get_default_store())


def _done_key(round_: int, r: int) -> str:
    return f"{round_}/done/{r}"


def _beat_key(round_: int, r: int) -> str:
    return f"{round_}/beat/{r}"


@contextmanager
def _heartbeat(store: dist.Store, key: str) -> Iterator[None]:
    """Inside the block a thread counts `key` up every `HEARTBEAT_SECONDS`."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            store.add(key, 1)

    store.add(key, 1)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _outcome_of(work: Callable[[], object]) -> tuple[tuple[str, object], BaseException | None]:
    """("ok", result) or (the name of an error in qkguard.errors, its message), and what must still be raised here."""
    try:
        return ("ok", work()), None
    except QKGuardError as error:
        return (type(error).__name__, str(error)), None
    except Exception as error:
        return ("QKGuardError", f"{type(error).__name__}: {error}"), None
    except BaseException as error:  # KeyboardInterrupt, SystemExit: tell the others, then leave
        return ("QKGuardError", type(error).__name__), error


def _await(store: dist.Store, other: int, what: str, timeout: float) -> tuple[str, object]:
    """Another rank's outcome of this round."""
    done, beat = _done_key(_round, other), _beat_key(_round, other)
    beats_seen, last_beat, pause = -1, time.monotonic(), 0.002
    while not store.check([done]):
        beats = store.add(beat, 0)
        if beats != beats_seen:
            beats_seen, last_beat = beats, time.monotonic()
        elif time.monotonic() - last_beat > timeout:
            raise RankLostError(
                f"{what}: rank {other} sent no heartbeat for {timeout:.0f} s; it may have crashed or hung. Check its "
                "log"
            )
        time.sleep(pause)
        pause = min(0.25, pause * 1.5)
    return pickle.loads(store.get(done))


def all_ranks(what: str, work: Callable[[], T], *, timeout: float = 600.0) -> T:
    """Run `work` on every rank and return this rank's own result, which never travels; ALL ranks must call this."""
    results: list[T] = []

    def keep_result() -> None:
        results.append(work())

    agree(what, keep_result, timeout=timeout)
    return results[0]


def on_rank(owner: int, what: str, work: Callable[[], T], *, timeout: float = 600.0) -> T:
    """Run `work` on rank `owner` alone while the others wait; all get its result. ALL ranks must call this."""

    def work_of_owner() -> T | None:
        return work() if rank() == owner else None

    return agree(what, work_of_owner, timeout=timeout)[owner]  # type: ignore[return-value]  # the owner's is a T


def on_rank_zero(what: str, work: Callable[[], T], *, timeout: float = 600.0) -> T:
    """`on_rank` for rank 0; ALL ranks must call this."""
    return on_rank(0, what, work, timeout=timeout)


def held_by(owner: int, what: str, make: Callable[[], T]) -> T | None:
    """`on_rank` for what cannot travel (open files, large tensors): the result stays on rank `owner`, the others get
    None. ALL ranks must call this.
    """

    def make_on_owner() -> T | None:
        return make() if rank() == owner else None

    return all_ranks(what, make_on_owner)
