"""All ranks together: waiting without NCCL timeouts, failing together, and the few collectives the guard needs."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

import qkguard.errors as errors
from qkguard.errors import QKGuardError, RankLostError

T = TypeVar("T")

HEARTBEAT_SECONDS = 2.0
_round = 0


def rank() -> int:
    return dist.get_rank() if _distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if _distributed() else 1


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def comm_device() -> torch.device:
    """Where tensors must live for the default process group: the accelerator under NCCL and its like, else the CPU."""
    if _distributed() and "gloo" not in dist.get_backend():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def together(what: str, work: Callable[[], T], *, patience: float = 600.0) -> list[T]:
    """Run `work` on every rank and return every rank's result; one failure is raised on all ranks.

    ALL ranks must call this. A rank that has finished polls the process group's store instead of sitting in a
    collective, so `work` may take hours on one rank without tripping an NCCL timeout; while it runs, a thread posts
    a heartbeat, and a rank without one for `patience` seconds ends the operation on the others. Results must be
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

    outcomes = [_await(store, r, what, patience) for r in range(size)]
    for r, (status, value) in enumerate(outcomes):
        if status != "ok":
            raise getattr(errors, status)(f"{what} failed on rank {r}: {value}")
    return [value for _, value in outcomes]  # type: ignore[misc]


def _await(store: dist.Store, other: int, what: str, patience: float) -> tuple[str, object]:
    done, beat = f"{_round}/done/{other}", f"{_round}/beat/{other}"
    seen, since, pause = -1, time.monotonic(), 0.002
    while not store.check([done]):
        count = store.add(beat, 0)
        if count != seen:
            seen, since = count, time.monotonic()
        elif time.monotonic() - since > patience:
            raise RankLostError(
                f"{what}: no sign of life from rank {other} for {patience:.0f} s; it crashed or hangs, see its log"
            )
        time.sleep(pause)
        pause = min(0.25, pause * 1.5)
    return pickle.loads(store.get(done))


def on_rank(owner: int, what: str, work: Callable[[], T], *, patience: float = 600.0) -> T:
    """Run `work` on one rank alone, with the others waiting as in `together`; its result on every rank."""
    results = together(what, lambda: work() if rank() == owner else None, patience=patience)
    return results[owner]  # type: ignore[return-value]


def on_rank_zero(what: str, work: Callable[[], T], *, patience: float = 600.0) -> T:
    """`on_rank` 0."""
    return on_rank(0, what, work, patience=patience)


def held_by(owner: int, what: str, make: Callable[[], T]) -> T | None:
    """`on_rank` for things that cannot travel (open files): the result stays on `owner`, None elsewhere."""
    held: list[T] = []

    def work() -> None:
        held.append(make())

    on_rank(owner, what, work)
    return held[0] if held else None


def all_reduce_sum(vector: Tensor) -> Tensor:
    """Sum of a small vector over all ranks, in its dtype; a collective. Returns a CPU tensor."""
    if world_size() == 1:
        return vector.cpu()
    # Gloo and NCCL sum in float64 as they are; devices without float64 (MPS) never run distributed
    buffer = vector.to(comm_device(), copy=True)
    dist.all_reduce(buffer)
    return buffer.cpu()


def all_gather_table(rows: Tensor) -> Tensor:
    """int64 `rows` of one shape on every rank -> (world_size, *rows.shape) on the CPU; a collective."""
    if world_size() == 1:
        return rows[None].cpu()
    local = rows.to(comm_device(), copy=True).contiguous()
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local)
    return torch.stack(parts).cpu()


def gather_flat(local: Tensor, spans: list[tuple[int, int]], dst: int = 0) -> Tensor | None:
    """Join every rank's 1-D piece, rank r's being elements `spans[r]`, on rank `dst` (None elsewhere); a collective.

    The result lies on the communication device, in the pieces' dtype; memory on `dst` is twice its size.
    """
    if world_size() == 1:
        return local
    padded = _padded(local, spans)
    parts = [torch.empty_like(padded) for _ in spans] if rank() == dst else None
    dist.gather(padded, parts, dst=dst)
    return None if parts is None else _joined(parts, spans, local.dtype)


def all_gather_flat(local: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """`gather_flat` whose result every rank gets."""
    if world_size() == 1:
        return local
    padded = _padded(local, spans)
    parts = [torch.empty_like(padded) for _ in spans]
    dist.all_gather(parts, padded)
    return _joined(parts, spans, local.dtype)


def _padded(local: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """A piece's bytes on the communication device, followed by zeros up to the length of the longest piece."""
    width = local.element_size()
    padded = torch.zeros(max(b - a for a, b in spans) * width, dtype=torch.uint8, device=comm_device())
    padded[: local.numel() * width] = local.contiguous().view(torch.uint8).to(padded.device)
    return padded


def _joined(parts: list[Tensor], spans: list[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    """The pieces in the order of their spans, without their padding."""
    ordered = sorted(zip(spans, parts, strict=True), key=lambda pair: pair[0])
    return torch.cat([part[: (b - a) * dtype.itemsize].view(dtype) for (a, b), part in ordered])


def scatter_flat(full: Tensor | None, spans: list[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    """Hand rank r elements `spans[r]` of a 1-D tensor that rank 0 holds (None elsewhere); a collective. On the CPU."""
    start, stop = spans[rank()]
    if world_size() == 1:
        assert full is not None
        return full[start:stop].cpu()
    width = dtype.itemsize
    longest = max(b - a for a, b in spans) * width
    mine = torch.empty(longest, dtype=torch.uint8, device=comm_device())
    parts = None
    if rank() == 0:
        assert full is not None
        parts = []
        for a, b in spans:
            part = torch.zeros_like(mine)
            part[: (b - a) * width] = full[a:b].contiguous().view(torch.uint8).to(part.device)
            parts.append(part)
    dist.scatter(mine, parts, src=0)
    return mine[: (stop - start) * width].cpu().view(dtype)
