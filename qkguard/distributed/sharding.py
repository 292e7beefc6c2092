"""The one seam between qkguard and sharded parameters: plain, DDP, ZeRO-1/2/3 and FSDP2.

Every parameter is seen as its flattened elements `0:numel`, tiled over the ranks: each element belongs to exactly one
rank, also where all ranks hold a full copy (plain DDP, ZeRO-1/2: an even split). A rank reads its own tile from the
storage it has, so keeping and comparing weights needs no gather. Nothing outside this file knows what is sharded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from qkguard.distributed import collectives, ranks
from qkguard.errors import QKGuardError

Span = tuple[int, int]
Param = Any  # an nn.Parameter; DeepSpeed hangs attributes on it that type checkers do not know


def unwrap(model: nn.Module) -> nn.Module:
    """The model without the wrappers of DDP, DataParallel, DeepSpeed and `torch.compile(model)`."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def backend(model: nn.Module) -> str:
    """A name for how the parameters lie: "zero3", "fsdp2", "replicated" or "single"."""
    for param in model.parameters():
        if hasattr(param, "ds_tensor"):
            return "zero3"
        if isinstance(param, DTensor):
            return "fsdp2"
    return "replicated" if ranks.world_size() > 1 else "single"


def is_sharded(param: Param) -> bool:
    """Whether this rank may hold a part of the parameter alone."""
    return hasattr(param, "ds_tensor") or isinstance(param, DTensor)


def full_shape(param: Param) -> tuple[int, ...]:
    """The shape of the whole parameter, whatever part of it this rank holds."""
    return tuple(getattr(param, "ds_shape", param.shape))


def full_numel(param: Param) -> int:
    return prod(full_shape(param))


def dtype(param: Param) -> torch.dtype:
    """The dtype of the weight that the forward pass uses."""
    return param.ds_tensor.dtype if hasattr(param, "ds_tensor") else param.dtype


def device(param: Param) -> torch.device:
    """Where this rank's part of the weight lies."""
    return param.ds_tensor.device if hasattr(param, "ds_tensor") else param.device


def check_supported(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse placements whose elements cannot be counted exactly once.

    Raises:
        QKGuardError: naming the parameter, the placement found, and what works.
    """
    wanted = set(names)
    if getattr(model, "tp_size", None) not in (None, 0, 1):
        raise QKGuardError(
            f"the model is tensor parallel (tp_size={model.tp_size}), which qkguard does not read; train with ZeRO, "
            "FSDP2 or DDP, or restore the finished checkpoint with `qkguard restore`"
        )
    for name, param in model.named_parameters():
        if name in wanted and (why := _unsupported(param)):
            raise QKGuardError(
                f"{name}: {why}, which qkguard does not read; supported are plain, DDP, ZeRO-1/2/3 (also with CPU "
                "offload) and FSDP2 by rows. `qkguard restore` works on the finished checkpoint whatever the training"
            )


def _unsupported(param: Param) -> str | None:
    if hasattr(param, "ds_tensor"):
        if param.ds_zero_partition_world_size != ranks.world_size():
            return (
                f"partitioned over {param.ds_zero_partition_world_size} of {ranks.world_size()} ranks (MiCS or expert "
                "parallelism)"
            )
        if getattr(param.ds_tensor, "final_location", None) == "nvme":  # "not-nvme" is DeepSpeed's word for the CPU
            return "offloaded to NVMe"
        if hasattr(param.ds_tensor, "ds_quant_scale"):
            return "held quantised by ZeRO++"
        return None
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        labels = mesh.mesh_dim_names or ("",) * mesh.ndim
        shards = [p for p in param.placements if not isinstance(p, Replicate)]
        if any("tp" in label for label in labels):
            return f"tensor parallel (mesh {labels})"
        if len(shards) > 1 or any(type(p) is not Shard or p.dim != 0 for p in shards):
            return f"placed as {param.placements}"
        if mesh.size() != ranks.world_size():
            return f"placed on a mesh of {mesh.size()} of {ranks.world_size()} ranks"
        return None
    if param.is_meta:
        return "on the meta device (no weights loaded)"
    return None


def shard_span(param: Param) -> Span:
    """The half-open span of flat elements that this rank counts; over all ranks the spans tile the parameter once."""
    numel = full_numel(param)
    if hasattr(param, "ds_tensor"):
        per = param.ds_tensor.numel()  # equal on all ranks; the last ones are padded past the end
        start = min(numel, param.ds_zero_partition_rank * per)
        return start, min(numel, start + per)
    if isinstance(param, DTensor):
        start, stop = _dtensor_span(param)
        copies, mine = 1, 0  # replicas (HSDP) share the work of the shard they hold
        for axis, placement in enumerate(param.placements):
            if isinstance(placement, Replicate):
                size = param.device_mesh.size(axis)
                copies, mine = copies * size, mine * size + param.device_mesh.get_local_rank(axis)
        return _share(start, stop, mine, copies)
    return _share(0, numel, ranks.rank(), ranks.world_size())


def read(param: Param, span: Span) -> Tensor:
    """Flat elements `span` of the weight the forward uses, as a detached 1-D tensor (a view where possible).

    `span` must lie within what this rank holds: its own `shard_span`, or anything where it holds a full copy.
    """
    start, stop = span
    if hasattr(param, "ds_tensor"):
        # also while the parameter is gathered: after the optimizer step ds_tensor is the truth
        offset = param.ds_zero_partition_rank * param.ds_tensor.numel()
        return param.ds_tensor.detach().view(-1)[start - offset : stop - offset]
    if isinstance(param, DTensor):
        offset = _dtensor_span(param)[0]
        return param.to_local().detach().reshape(-1)[start - offset : stop - offset]
    return param.detach().reshape(-1)[start:stop]


@torch.no_grad()
def write(param: Param, flat: Tensor) -> None:
    """Set the weight that the forward uses, every rank handing in its own shard of it; ALL ranks must call this.

    Full copies on other ranks change with it, and so does one that ZeRO-3 has gathered and not yet let go. The
    optimizer's master weights are not touched. Call `settle` first: a gather under way would bring old values.
    """
    spans = shards([param])[0]
    start, stop = spans[ranks.rank()]
    if hasattr(param, "ds_tensor"):
        offset = param.ds_zero_partition_rank * param.ds_tensor.numel()
        param.ds_tensor.data.view(-1)[start - offset : stop - offset] = flat.to(param.ds_tensor.device)
        if param.ds_status.name == "AVAILABLE":
            param.data.view(-1).copy_(collectives.all_gather_flat(flat, spans))
    elif isinstance(param, DTensor):
        first, last = _dtensor_span(param)
        whole = collectives.all_gather_flat(flat, spans) if spans[ranks.rank()] != (first, last) else None
        local = param.to_local().detach()
        local.copy_((flat if whole is None else whole[first:last]).view(local.shape))
    else:
        param.data.copy_(collectives.all_gather_flat(flat, spans).view(param.shape))


def settle(model: nn.Module) -> None:
    """Let go of what forward passes without gradients leave behind in a sharded model; ALL ranks must call this.

    ZeRO-3 learns the order of parameters from one pass and fetches ahead by it in the next: a probe's order must not
    reach a training step, where parameters fetched for nothing crash the backward pass (a fused loss never calls the
    output embedding). Its fetches still under way are finished. FSDP2's unsharded copies are dropped, and a pass that
    an exception ended is over for it too.
    """
    coordinator = _zero3_coordinator(model)
    if coordinator is not None:
        coordinator._clean_inflight_param_registry()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _end_pass(module)
            module.reshard()


def _end_pass(module: Any) -> None:
    """Tell FSDP2 that no forward pass is under way; only an exception in one has left it of another opinion.

    It would keep parameters gathered, and the next pass would not wait for the optimizer's step on other streams.
    """
    context = module._get_fsdp_state()._state_ctx  # one for all modules, the root comes first
    if context.iter_forward_root is None:
        return
    if hasattr(module, "reset_iter_state"):  # torch 2.13
        module.reset_iter_state()
        return
    for state in context.all_states:
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # the latter in torch 2.11
        for part in (state, *(group for group in groups if group is not None)):
            part._training_state = type(part._training_state).IDLE
        state._modules_to_run_forward.clear()
    context.iter_forward_root = None


def can_settle(model: nn.Module) -> bool:
    """Whether `settle` finds what it needs; where not, a forward pass between training steps is not safe."""
    return backend(model) != "zero3" or _zero3_coordinator(model) is not None


def _zero3_coordinator(model: nn.Module) -> Any:
    """DeepSpeed's coordinator of gathers, which the hook at the start of the model's forward belongs to."""
    for hook in model._forward_pre_hooks.values():
        if inspect.isroutine(function := inspect.unwrap(hook)) and hasattr(function, "__closure__"):
            owner = inspect.getclosurevars(function).nonlocals.get("self")
            if owner is not None and hasattr(owner, "get_param_coordinator"):
                return owner.get_param_coordinator()
    return None


def shards(params: list[Param]) -> list[list[Span]]:
    """`shard_span` of every parameter on every rank, as [parameter][rank]; one small collective."""
    mine = torch.tensor([shard_span(p) for p in params], dtype=torch.int64).reshape(len(params), 2)
    table = collectives.all_gather_table(mine)
    return [[(int(a), int(b)) for a, b in table[:, i].tolist()] for i in range(len(params))]


def gather_full(params: list[Param]) -> Iterator[Tensor | None]:
    """Every parameter's full tensor on rank 0 in turn (None elsewhere); ALL ranks must exhaust the iterator.

    Shape `full_shape`, dtype `dtype`, one parameter in memory at a time.
    """
    for param, spans in zip(params, shards(params), strict=True):
        flat = collectives.gather_flat(read(param, spans[ranks.rank()]), spans)
        yield None if flat is None else flat.cpu().view(full_shape(param))


def _share(start: int, stop: int, index: int, count: int) -> Span:
    per = -(-(stop - start) // count)
    first = min(stop, start + index * per)
    return first, min(stop, first + per)


def _dtensor_span(param: DTensor) -> Span:
    """Flat elements of a DTensor sharded by rows over at most one mesh axis that this rank stores."""
    rows, inner = param.shape[0] if param.ndim else 1, prod(param.shape[1:])
    for axis, placement in enumerate(param.placements):
        if isinstance(placement, Shard):
            per = -(-rows // param.device_mesh.size(axis))  # as torch.chunk: the last ranks may hold less or nothing
            first = min(rows, param.device_mesh.get_local_rank(axis) * per)
            return first * inner, min(rows, first + per) * inner
    return 0, rows * inner
