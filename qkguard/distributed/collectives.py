"""The few collectives the guard needs, on small vectors and on flat slices.

ALL ranks must call each of them, in the same order and with arguments that agree. `spans[r]` is the half-open range of
elements of the whole 1-D tensor that rank r holds.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from qkguard.distributed import ranks
from qkguard.distributed.ranks import distributed

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


def gather_flat(local: Tensor, spans: list[Span], dst: int = 0) -> Tensor | None:
    """Join the ranks' 1-D slices on rank `dst`; None on the others. ALL ranks must call this.

    The result lies on the communication device, in the slices' dtype. `dst` needs twice its memory.
    """
    if ranks.world_size() == 1:
        return local
    padded = _padded(local, spans)
    buffers = [torch.empty_like(padded) for _ in spans] if ranks.rank() == dst else None
    dist.gather(padded, buffers, dst=dst)
    return None if buffers is None else _joined(buffers, spans, local.dtype)


def all_gather_flat(local: Tensor, spans: list[Span]) -> Tensor:
    """`gather_flat` whose result every rank gets; ALL ranks must call this."""
    if ranks.world_size() == 1:
        return local
    padded = _padded(local, spans)
    buffers = [torch.empty_like(padded) for _ in spans]
    dist.all_gather(buffers, padded)
    return _joined(buffers, spans, local.dtype)


def scatter_flat(full: Tensor | None, spans: list[Span], dtype: torch.dtype) -> Tensor:
    """Hand every rank its slice, on the CPU, of a 1-D tensor that rank 0 has; ALL ranks must call this.

    The others pass None for `full`.
    """
    start, stop = spans[ranks.rank()]
    if ranks.world_size() == 1:
        assert full is not None
        return full[start:stop].cpu()
    buffers = None if full is None else [_padded(full[a:b], spans) for a, b in spans]
    mine = torch.empty(_longest(spans) * dtype.itemsize, dtype=torch.uint8, device=comm_device())
    dist.scatter(mine, buffers, src=0)
    return mine[: (stop - start) * dtype.itemsize].cpu().view(dtype)


def flat_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bit patterns as a flat uint8 tensor: collectives carry them whatever the dtype."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _longest(spans: list[Span]) -> int:
    return max(stop - start for start, stop in spans)


def _padded(local: Tensor, spans: list[Span]) -> Tensor:
    """A slice's bytes on the communication device, followed by zeros up to the longest slice: sizes must be equal."""
    padded = torch.zeros(_longest(spans) * local.element_size(), dtype=torch.uint8, device=comm_device())
    padded[: local.numel() * local.element_size()] = flat_bytes(local).to(padded.device)
    return padded


def _joined(buffers: list[Tensor], spans: list[Span], dtype: torch.dtype) -> Tensor:
    """The slices in the order of their spans, without their padding."""
    in_order = sorted(range(len(spans)), key=spans.__getitem__)
    slices = [buffers[r][: (spans[r][1] - spans[r][0]) * dtype.itemsize].view(dtype) for r in in_order]
    return torch.cat(slices)
