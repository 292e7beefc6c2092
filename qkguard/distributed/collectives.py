"""The few collectives the guard needs, on small vectors and on flat slices.

ALL ranks must call each of them, in the same order and with arguments that agree. `spans[r]` is the half-open range of
elements of the whole 1-D tensor that rank r holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qkguard.distributed import ranks
from qkguard.distributed.ranks import Deferred, distributed

Span = tuple[int, int]  # half-open: the first element, and one past the last


def comm_device() -> torch.device:
    """Where tensors must live for the default process group: the accelerator under NCCL and its like, else the CPU."""
    if distributed() and "gloo" not in dist.get_backend():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def all_reduce_sum(vector: Tensor) -> Tensor:
    """Sum of a small vector over all ranks, in its dtype, on the CPU; ALL ranks must call this."""
    if ranks.world_size() == 1:
        return vector.cpu()
    # Gloo and NCCL both sum float64; devices without float64 (MPS) never run distributed
    buffer = vector.to(comm_device(), copy=True)
    dist.all_reduce(buffer)
    return buffer.cpu()


def all_gather_table(rows: Tensor) -> Tensor:
    """int64 `rows`, of one shape on every rank -> (world_size, *rows.shape) on the CPU; ALL ranks must call this."""
    if ranks.world_size() == 1:
        return rows[None].cpu()
    local = rows.to(comm_device(), copy=True).contiguous()
    tables = [torch.empty_like(local) for _ in range(ranks.world_size())]
    dist.all_gather(tables, local)
    return torch.stack(tables).cpu()


def agreed_sums(tensors: Mapping[str, Tensor], deferred: Deferred) -> dict[str, Tensor]:
    """Sums over the ranks of float64 CPU tensors, in one all-reduce behind a row of collectives; ALL ranks.

    Where something failed on a rank since the ranks last agreed, that is raised on all of them.
    """
    failed = torch.tensor([float(deferred.failure is not None)], dtype=torch.float64)
    sums = all_reduce_sum(torch.cat([failed, *(tensor.flatten() for tensor in tensors.values())]))
    if sums[0] > 0:
        deferred.agree()
    split = sums[1:].split([tensor.numel() for tensor in tensors.values()])
    return {name: flat.view(tensors[name].shape) for name, flat in zip(tensors, split, strict=True)}


class Exchange:
    """Gathers flat slices on one rank, or scatters them from rank 0, through memory that is reserved once.

    Reserving may fail on one rank alone (out of memory), so the ranks should agree on it. After that, a rank whose own
    part failed still takes part, with whatever its memory holds: nobody waits for it. ALL ranks must make one of the
    same size and call its methods.

    Args:
        nbytes: of the longest slice to come.
        group: a gloo group of all ranks; the default one if None.
    """

    def __init__(self, nbytes: int, group: Any = None) -> None:
        self.group = group
        if ranks.world_size() > 1:
            device = comm_device() if group is None else torch.device("cpu")
            self.slice = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            self.slices = torch.zeros(ranks.world_size(), nbytes, dtype=torch.uint8, device=device)

    @classmethod
    def of(cls, tensors: Iterable[tuple[list[Span], torch.dtype]], group: Any = None) -> Exchange:
        """One for slices of these spans and dtypes."""
        return cls(max((_longest(spans) * dtype.itemsize for spans, dtype in tensors), default=0), group)

    def gather(
        self, local: Tensor | None, spans: list[Span], dtype: torch.dtype, deferred: Deferred, dst: int = 0
    ) -> Tensor | None:
        """The ranks' 1-D slices in one, on rank `dst` and the communication device; None elsewhere. ALL ranks.

        `local` is None on a rank that has failed.
        """
        if ranks.world_size() == 1:
            return local
        length = _longest(spans) * dtype.itemsize
        if local is not None:
            deferred.run(partial(_fill, self.slice, local))
        received = [row[:length] for row in self.slices] if ranks.rank() == dst else None
        dist.gather(self.slice[:length], received, dst=dst, group=self.group)
        return None if received is None else deferred.run(partial(_joined, received, spans, dtype))

    def all_gather(self, local: Tensor, spans: list[Span]) -> list[Tensor]:
        """Every rank's 1-D slice, as views of memory that the next exchange overwrites; ALL ranks."""
        if ranks.world_size() == 1:
            return [local]
        size = local.element_size()
        length = _longest(spans) * size
        _fill(self.slice, local)
        received = [row[:length] for row in self.slices]
        dist.all_gather(received, self.slice[:length], group=self.group)
        return [row[: (b - a) * size].view(local.dtype) for row, (a, b) in zip(received, spans, strict=True)]

    def scatter(self, full: Tensor | None, spans: list[Span], dtype: torch.dtype, deferred: Deferred) -> Tensor | None:
        """This rank's slice, on the CPU, of a 1-D tensor that rank 0 has (the others pass None); ALL ranks.

        None on a rank that has failed; rank 0 then passes None too.
        """
        start, stop = spans[ranks.rank()]
        if ranks.world_size() == 1:
            return None if full is None else full[start:stop].cpu()
        length = _longest(spans) * dtype.itemsize
        sent = [row[:length] for row in self.slices] if ranks.rank() == 0 else None
        if full is not None and sent is not None:
            deferred.run(partial(_fill_all, sent, full, spans))
        dist.scatter(self.slice[:length], sent, src=0, group=self.group)
        mine = self.slice[: (stop - start) * dtype.itemsize]
        return deferred.run(partial(_copied, mine, dtype))


def flat_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bit patterns as a flat uint8 tensor: collectives carry them whatever the dtype."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _fill(space: Tensor, local: Tensor) -> None:
    """Put a slice's bytes at the start of reserved memory."""
    space[: local.numel() * local.element_size()] = flat_bytes(local).to(space.device)


def _fill_all(rows: list[Tensor], full: Tensor, spans: list[Span]) -> None:
    for row, (start, stop) in zip(rows, spans, strict=True):
        _fill(row, full[start:stop])


def _copied(received: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU of bytes that the next exchange overwrites."""
    return received.to("cpu", copy=True).view(dtype)


def _longest(spans: list[Span]) -> int:
    return max(stop - start for start, stop in spans)


def _joined(buffers: list[Tensor], spans: list[Span], dtype: torch.dtype) -> Tensor:
    """The slices in the order of their spans, without their padding."""
    in_order = sorted(range(len(spans)), key=spans.__getitem__)
    slices = [buffers[r][: (spans[r][1] - spans[r][0]) * dtype.itemsize].view(dtype) for r in in_order]
    return torch.cat(slices)
