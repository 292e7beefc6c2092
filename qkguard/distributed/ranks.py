"""All ranks: waiting for one another without NCCL timeouts, and failing together."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

import qkguard.errors as errors
from qkguard.errors import QKGuardError, RankLostError

T = TypeVar("T")

HEARTBEAT_SECONDS = 2.0
_round = 0


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if distributed() else 1


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def agree(what: str, work: Callable[[], T], *, timeout: float = 600.0) -> list[T]:
    """Run `work` on every rank and return every rank's result; one failure is raised on all ranks.

    ALL ranks must call this. A rank that has finished polls the process group's store instead of sitting in a
    collective, so `work` may take hours on one rank without tripping an NCCL timeout; while it runs, a thread posts
    a heartbeat, and a rank without one for `timeout` seconds ends the operation on the others. Results must be
    small and picklable.

    Raises:
        QKGuardError: the failure of the lowest failing rank, naming `what` and the rank. In a single process the
            original exception goes through unchanged.
    """
    if world_size() == 1:
        return [work()]
    global _round
    _round += 1
    store = dist.PrefixStore("qkguard", dist.distributed_c10d._get_default_store())
    me, size = rank(), world_size()
    if me == 0 and _round > 2:  # every rank has left that round: it has posted the one after
        for r in range(size):
            store.delete_key(f"{_round - 2}/done/{r}")
            store.delete_key(f"{_round - 2}/beat/{r}")

    stop = threading.Event()

    def beat(key: str) -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            store.add(key, 1)

    store.add(f"{_round}/beat/{me}", 1)
    thread = threading.Thread(target=beat, args=(f"{_round}/beat/{me}",), daemon=True)
    thread.start()
    outcome: tuple[str, object]  # ("ok", result) or (the error's class in qkguard.errors, message)
    interrupt: BaseException | None = None
    try:
        outcome = ("ok", work())
    except QKGuardError as error:
        outcome = (type(error).__name__, str(error))
    except Exception as error:
        outcome = ("QKGuardError", f"{type(error).__name__}: {error}")
    except BaseException as error:  # KeyboardInterrupt, SystemExit: tell the others, then leave
        outcome, interrupt = ("QKGuardError", type(error).__name__), error
    finally:
        stop.set()
        thread.join()
    store.set(f"{_round}/done/{me}", pickle.dumps(outcome))  # type: ignore[arg-type]  # bytes are fine
    if interrupt is not None:
        raise interrupt

    outcomes = [_await(store, r, what, timeout) for r in range(size)]
    for r, (status, value) in enumerate(outcomes):
        if status != "ok":
            raise getattr(errors, status)(f"{what} failed on rank {r}: {value}")
    return [value for _, value in outcomes]  # type: ignore[misc]


def _await(store: dist.Store, other: int, what: str, timeout: float) -> tuple[str, object]:
    done, beat = f"{_round}/done/{other}", f"{_round}/beat/{other}"
    seen, since, pause = -1, time.monotonic(), 0.002
    while not store.check([done]):
        count = store.add(beat, 0)
        if count != seen:
            seen, since = count, time.monotonic()
        elif time.monotonic() - since > timeout:
            raise RankLostError(
                f"{what}: no sign of life from rank {other} for {timeout:.0f} s; it crashed or hangs, see its log"
            )
        time.sleep(pause)
        pause = min(0.25, pause * 1.5)
    return pickle.loads(store.get(done))


def on_rank(owner: int, what: str, work: Callable[[], T], *, timeout: float = 600.0) -> T:
    """Run `work` on one rank alone, with the others waiting as in `agree`; its result on every rank."""
    results = agree(what, lambda: work() if rank() == owner else None, timeout=timeout)
    return results[owner]  # type: ignore[return-value]


def on_rank_zero(what: str, work: Callable[[], T], *, timeout: float = 600.0) -> T:
    """`on_rank` 0."""
    return on_rank(0, what, work, timeout=timeout)


def held_by(owner: int, what: str, make: Callable[[], T]) -> T | None:
    """`on_rank` for things that cannot travel (open files): the result stays on `owner`, None elsewhere."""
    held: list[T] = []

    def work() -> None:
        held.append(make())

    on_rank(owner, what, work)
    return held[0] if held else None
