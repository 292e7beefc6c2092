"""The one seam between qkguard and sharded parameters: plain, DDP, ZeRO-1/2/3 and FSDP2.

Every parameter is seen as its flattened elements `0:numel`, and every element belongs to the shard of exactly one
rank, also where all ranks hold a full copy (DDP, ZeRO-1/2: an even split). A rank reads its shard from the storage it
has, so keeping and comparing weights needs no gather. Nothing outside this file knows what is sharded.

DeepSpeed documents no way to read a partition in the weights' own dtype without gathering it. So this file reads what
ZeRO-3 hangs on a parameter (checked with DeepSpeed 0.16.0 and 0.19.8): `ds_tensor`, this rank's flat partition,
equally long on all ranks and padded past the end; `ds_shape`, the full shape; `ds_zero_partition_rank` and
`ds_zero_partition_world_size`, which may differ from the global ones (`_partition`); `ds_status`, AVAILABLE while
`.data` holds a gathered copy.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from qkguard.distributed import collectives, ranks
from qkguard.distributed.collectives import Exchange, Span
from qkguard.errors import QKGuardError

Param = Any  # an nn.Parameter, perhaps with DeepSpeed's attributes, which type checkers do not know


def unwrap(model: nn.Module) -> nn.Module:
    """The model without the wrappers of DDP, DataParallel, DeepSpeed and `torch.compile(model)`."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # of torch.compile's OptimizedModule (2.11 to 2.13); no public name
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
    """How many elements the whole parameter has."""
    return prod(full_shape(param))


def dtype(param: Param) -> torch.dtype:
    """The dtype of the weight that the forward pass uses."""
    return param.ds_tensor.dtype if hasattr(param, "ds_tensor") else param.dtype


def device(param: Param) -> torch.device:
    """Where this rank's part of the weight lies."""
    return param.ds_tensor.device if hasattr(param, "ds_tensor") else param.device


def refuse_wrappers(model: nn.Module) -> None:
    """Refuse what flattens or cuts parameters so that a layout cannot be found in them, by its name.

    Raises:
        QKGuardError: naming the wrapper, and what works instead.
    """
    for module in model.modules():
        # FSDP1 of torch, and the classes of the same name in fairscale and torch_xla, which are no subclasses of it
        if any("FullyShardedDataParallel" in cls.__name__ for cls in type(module).__mro__):
            raise QKGuardError(
                f"The model is wrapped by FSDP1 ({_class_name(module)}), which flattens parameters, so queries and "
                "keys cannot be found in them. Train with FSDP2: fsdp_version: 2 in accelerate's fsdp_config, or "
                'fsdp_config={"version": 2} in the training arguments. ZeRO and DDP work too, and `qkguard restore` '
                "on the finished checkpoint."
            )
    for name, param in model.named_parameters():
        # Megatron's mark, which DeepSpeed's AutoTP sets too (0.19.8): this rank has a part under the full one's name
        if getattr(param, "tensor_model_parallel", False):
            raise QKGuardError(
                f"{name} is tensor parallel (DeepSpeed AutoTP or Megatron), which qkguard does not support. Train "
                "with ZeRO, FSDP2 or DDP, or restore the finished checkpoint with `qkguard restore`."
            )


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_supported(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse placements whose elements cannot be counted exactly once.

    Raises:
        QKGuardError: naming the parameter, the placement found, and what works.
    """
    wanted = set(names)
    if getattr(model, "tp_size", None) not in (None, 0, 1):
        raise QKGuardError(
            f"The model is tensor parallel (tp_size={model.tp_size}), which qkguard does not support. Train with "
            "ZeRO, FSDP2 or DDP, or restore the finished checkpoint with `qkguard restore`."
        )
    for name, param in model.named_parameters():
        if name in wanted and (why := unsupported(param)):
            raise QKGuardError(
                f"{name} is {why}, which qkguard does not support. Supported: one process, DDP, ZeRO-1/2/3 (CPU "
                "offload included) and FSDP2 sharded by rows. `qkguard restore` works on any finished checkpoint."
            )


def unsupported(param: Param) -> str | None:
    """What is unsupported about a parameter's placement, as it follows "is"; None where nothing is."""
    if hasattr(param, "ds_tensor"):
        size = _partition(param)[1]
        if size != ranks.world_size():
            return f"partitioned over {size} of {ranks.world_size()} ranks (MiCS or expert parallelism)"
        if getattr(param.ds_tensor, "final_location", None) == "nvme":  # DeepSpeed calls the CPU "not-nvme"
            return "offloaded to NVMe"
        if getattr(param, "ds_zero_param_process_group", None) is not None:
            # forward passes read a second copy that each node keeps, which writing to the partition does not reach
            return "kept a second time on every node (ZeRO++ hpZ, zero_hpz_partition_size)"
        if hasattr(param.ds_tensor, "ds_quant_scale") or _is_gathered_quantised(param):
            return "quantised by ZeRO++ (qwZ, zero_quantized_weights)"
        return None
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        labels = mesh.mesh_dim_names or ("",) * mesh.ndim
        sharded = [p for p in param.placements if not isinstance(p, Replicate)]
        if any("tp" in label for label in labels):
            return f"tensor parallel (mesh {labels})"
        # FSDP2 can also shard by columns, and uneven subclasses of Shard exist: neither has one flat span per rank
        if len(sharded) > 1 or any(type(p) is not Shard or p.dim != 0 for p in sharded):
            return f"placed as {param.placements}"
        if mesh.size() != ranks.world_size():
            return f"placed on a mesh of {mesh.size()} of {ranks.world_size()} ranks"
        return None
    if param.is_meta:
        return "on the meta device (no weights loaded)"
    return None


def _partition(param: Param) -> tuple[int, int]:
    """This rank's number among the ranks that a ZeRO-3 parameter is partitioned over, and how many they are."""
    if hasattr(param, "ds_zero_partition_rank"):
        return param.ds_zero_partition_rank, param.ds_zero_partition_world_size
    partitioner = _enclosing_self(param.partition)  # DeepSpeed before 0.19.3: the same for all of its parameters
    return partitioner.get_partition_rank(), partitioner.num_partitions


def _is_gathered_quantised(param: Param) -> bool:
    """Whether ZeRO++ quantises the weight on its way to the other ranks.

    Known to the object that partitions parameters alone (DeepSpeed 0.16.0 to 0.19.8), which `param.partition` is bound
    to.
    """
    return bool(getattr(_enclosing_self(getattr(param, "partition", None)), "quantized_weights", False))


def _enclosing_self(function: Any) -> Any:
    """The `self` of the method that a function was defined in; None where it uses none.

    `inspect.getclosurevars` looks up every global name too, which is slow for a check of each parameter.
    """
    closure = getattr(function, "__closure__", None) or ()
    cells = dict(zip(function.__code__.co_freevars, closure, strict=True)) if closure else {}
    return cells["self"].cell_contents if "self" in cells else None


def shard_span(param: Param) -> Span:
    """The flat elements of the parameter that this rank accounts for; over all ranks, every element once."""
    numel = full_numel(param)
    if hasattr(param, "ds_tensor"):
        length = param.ds_tensor.numel()
        start = min(numel, _partition(param)[0] * length)
        return start, min(numel, start + length)
    if isinstance(param, DTensor):
        start, stop = _dtensor_span(param)
        copies, mine = 1, 0  # HSDP: the replicas of a shard divide it among them
        for axis, placement in enumerate(param.placements):
            if isinstance(placement, Replicate):
                size = param.device_mesh.size(axis)
                copies, mine = copies * size, mine * size + param.device_mesh.get_local_rank(axis)
        return _even_part(start, stop, mine, copies)
    return _even_part(0, numel, ranks.rank(), ranks.world_size())


def shards(params: Iterable[Param]) -> list[list[Span]]:
    """`shard_span` of every parameter on every rank, as [parameter][rank]; one collective, ALL ranks call it."""
    mine = torch.tensor([shard_span(p) for p in params], dtype=torch.int64).reshape(-1, 2)
    table = collectives.all_gather_table(mine)
    return [[(int(a), int(b)) for a, b in table[:, i].tolist()] for i in range(len(mine))]


def read(param: Param, span: Span) -> Tensor:
    """Flat elements `span` of the weight that the forward uses, as a detached 1-D tensor (a view where possible).

    `span` must lie within what this rank holds: its own `shard_span`, or any span where it holds a full copy.
    """
    start, stop = span
    if hasattr(param, "ds_tensor"):
        # also while a gathered copy exists: that one is stale after an optimizer step, the partition is not
        offset = _partition(param)[0] * param.ds_tensor.numel()
        return param.ds_tensor.detach().view(-1)[start - offset : stop - offset]
    if isinstance(param, DTensor):
        offset = _dtensor_span(param)[0]
        return param.to_local().detach().reshape(-1)[start - offset : stop - offset]
    return param.detach().reshape(-1)[start:stop]


@torch.no_grad()
def write(param: Param, flat: Tensor, spans: list[Span], exchange: Exchange) -> None:
    """Set the weight that the forward uses, each rank passing its own shard of it; ALL ranks must call this.

    `spans` are the shards of all ranks, as `shards` gives them, and `exchange` has memory for them: nothing is
    allocated here. `flat` may lie on any device.

    Full copies on other ranks change too, and so does a copy that ZeRO-3 still holds gathered. The optimizer's master
    weights do not change. Call `settle` first: a gather under way would bring old values back.
    """
    start, stop = spans[ranks.rank()]
    if hasattr(param, "ds_tensor"):
        offset = _partition(param)[0] * param.ds_tensor.numel()
        param.ds_tensor.data.view(-1)[start - offset : stop - offset].copy_(flat)
        if param.ds_status.name == "AVAILABLE":
            _set(param.data, 0, exchange.all_gather(flat, spans), spans)
    elif isinstance(param, DTensor):
        local, (first, last) = param.to_local().detach(), _dtensor_span(param)
        if (start, stop) == (first, last):
            local.copy_(flat.view(local.shape))
        else:  # replicas of a shard divide it among them
            _set(local, first, exchange.all_gather(flat, spans), spans)
    else:
        _set(param.data, 0, exchange.all_gather(flat, spans), spans)


def _set(target: Tensor, first: int, slices: list[Tensor], spans: list[Span]) -> None:
    """Fill a tensor, whose elements begin at `first` of the whole parameter, from all ranks' slices of that."""
    flat = target.reshape(-1)  # a copy where the weight is not contiguous
    last = first + flat.numel()
    for piece, (start, stop) in zip(slices, spans, strict=True):
        lo, hi = max(start, first), min(stop, last)
        if lo < hi:
            flat[lo - first : hi - first].copy_(piece[lo - start : hi - start])
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


def settle(model: nn.Module) -> None:
    """Remove what forward passes without gradients leave behind in a sharded model; ALL ranks must call this.

    ZeRO-3 learns the order of parameters in one pass and prefetches by it in the next. A probe's order must not reach
    a training step: a parameter that is prefetched but never used there (TRL's fused loss never calls the output
    embedding) crashes the backward pass. So prefetches under way are finished, and the order is forgotten. FSDP2's
    unsharded copies are freed, and a pass that an exception ended is closed.
    """
    coordinator = _zero3_coordinator(model)
    if coordinator is not None:
        # DeepSpeed has no public call for this: `reset_step` keeps the recorded order (0.19.8)
        coordinator._clean_inflight_param_registry()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _end_fsdp_pass(module)
            module.reshard()


def _end_fsdp_pass(module: Any) -> None:
    """Close a forward pass that an exception ended.

    FSDP2 would still believe in it: it would keep parameters gathered, and the next pass would not wait for the
    optimizer's step on other streams. torch 2.13 has `reset_iter_state` for this; for 2.11 and 2.12 the private state
    that it resets is set by hand.
    """
    context = module._get_fsdp_state()._state_ctx  # shared by all modules of a model; the root module comes first
    if context.iter_forward_root is None:  # no pass is open
        return
    if hasattr(module, "reset_iter_state"):
        module.reset_iter_state()
        return
    for state in context.all_states:
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # the latter in torch 2.11
        for part in (state, *(group for group in groups if group is not None)):
            part._training_state = type(part._training_state).IDLE
        state._modules_to_run_forward.clear()
    context.iter_forward_root = None


def can_settle(model: nn.Module) -> bool:
    """Whether `settle` finds what it needs; if not, a forward pass between training steps is not safe."""
    return backend(model) != "zero3" or _zero3_coordinator(model) is not None


def _zero3_coordinator(model: nn.Module) -> Any:
    """DeepSpeed's coordinator of gathers; None if this is no ZeRO-3 model.

    Callbacks see the model, not the engine that owns the coordinator. The way back: ZeRO-3 registers a forward
    pre-hook on the model (`_start_of_forward_hook` in DeepSpeed 0.19.8), whose closure holds the owner as `self`.
    """
    for hook in model._forward_pre_hooks.values():
        owner = _enclosing_self(inspect.unwrap(hook))
        if hasattr(owner, "get_param_coordinator"):
            return owner.get_param_coordinator()
    return None


def gather_full(params: list[Param], deferred: ranks.Deferred) -> Iterator[Tensor | None]:
    """One parameter's full tensor after the other, on rank 0's CPU (None elsewhere); ALL ranks must exhaust this.

    Shape `full_shape`, dtype `dtype`; one parameter is in memory at a time. None on rank 0 too once it has failed,
    which `deferred` keeps.
    """
    table = shards(params)
    spans_and_dtypes = [(spans, dtype(param)) for spans, param in zip(table, params, strict=True)]
    exchange = ranks.agree("reserving memory to gather weights", partial(Exchange.of, spans_and_dtypes))
    for param, spans in zip(params, table, strict=True):
        mine = deferred.run(partial(read, param, spans[ranks.rank()]))
        flat = exchange.gather(mine, spans, dtype(param), deferred)
        yield None if flat is None else deferred.run(partial(_on_cpu, flat, full_shape(param)))


def _on_cpu(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat.cpu().view(shape)


def _even_part(start: int, stop: int, index: int, count: int) -> Span:
    """Part `index` of `count` equally long ones; the last may be shorter or empty."""
    length = -(-(stop - start) // count)
    first = min(stop, start + index * length)
    return first, min(stop, first + length)


def _dtensor_span(param: DTensor) -> Span:
    """The flat elements that this rank stores of a DTensor, sharded by rows over at most one axis of its mesh."""
    rows, inner = param.shape[0] if param.ndim else 1, prod(param.shape[1:])
    for axis, placement in enumerate(param.placements):
        if isinstance(placement, Shard):  # divides rows as torch.chunk does
            first, last = _even_part(0, rows, param.device_mesh.get_local_rank(axis), param.device_mesh.size(axis))
            return first * inner, last * inner
    return 0, rows * inner
