"""The few collectives the guard needs, on small vectors and on flat slices; ALL ranks must call each of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from qkguard.distributed.ranks import distributed, rank, world_size


def comm_device() -> torch.device:
    """Where tensors must live for the default process group: the accelerator under NCCL and its like, else the CPU."""
    if distributed() and "gloo" not in dist.get_backend():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


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
