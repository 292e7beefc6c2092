"""Swap restored queries and keys into the live model for a block of code, and the tuned ones back after it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.distributed import ranks, sharding
from qkguard.distributed.collectives import Exchange
from qkguard.distributed.reference import Reference
from qkguard.layout.selection import unselected_norms
from qkguard.layout.spec import AttentionSpec, ParamMap
from qkguard.restore.apply import restore_layer
from qkguard.restore.registry import Method, check_options, check_per_layer, get_method


@contextmanager
def restored(model: nn.Module, reference: Reference, *, method: str = "restore", **options: Any) -> Iterator[None]:
    """Run `model` with restored queries and keys inside the block; ALL ranks must enter and leave it.

        with qkguard.restored(model, guard.session.reference):
            ...  # forward passes without gradients, generation, evaluation

    Inside the block the model is the one that `qk_restored/` of a checkpoint of this step holds. After it, also after
    an exception, every weight has the bits it had before. Optimizer states and master weights never change. Each rank
    needs CPU memory for its part of the queries and keys; methods other than restore also gather a layer at a time on
    rank 0.

    Args:
        model: the live model, plain or sharded.
        reference: its queries and keys from before SFT.
        method: the name of a restore method.
        **options: the method's options, as for `restore_checkpoint`.

    Raises:
        QKGuardError: the model is not the one that the reference was taken from, or an option is wrong.
    """
    model = sharding.unwrap(model)
    sharding.settle(model)
    params = reference.params(model)
    reference.wait_for_readers()
    plain = method == "restore" and not options
    new = reference.slices if plain else _new_slices(model, params, reference, method, options)
    exchange = ranks.agree("reserving memory to swap weights", partial(_exchange, reference, params))
    deferred = ranks.Deferred("swapping restored weights in")
    tuned: dict[str, Tensor] = {}
    try:
        for name, param in params.items():
            live = reference.live(params, name)
            tuned[name] = live.to("cpu", copy=True)
            swapped = deferred.run(partial(_with_rows, reference, name, live, new[name]))
            sharding.write(param, tuned[name] if swapped is None else swapped, reference.shards[name], exchange)
        deferred.agree()
        yield
    finally:
        sharding.settle(model)
        for name, shard in tuned.items():
            sharding.write(params[name], shard, reference.shards[name], exchange)


def _exchange(reference: Reference, params: Mapping[str, Any]) -> Exchange:
    """Memory for writing any of these weights."""
    return Exchange.of((reference.shards[name], sharding.dtype(param)) for name, param in params.items())


def _new_slices(
    model: nn.Module, params: dict[str, sharding.Param], reference: Reference, name: str, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """This rank's slices of what a method makes of the reference and the live weights; ALL ranks must call this.

    Rank 0 gathers one layer at a time, applies the method and hands the slices out.
    """
    roles = {role for pmap in reference.maps.values() for block in pmap.blocks for role in block.role}
    method, chosen = get_method(name), check_options(name, options, sorted(roles - {"v"}))
    check_per_layer(chosen, reference.selection)
    live = dict(model.named_parameters())
    norms = unselected_norms(reference.selection) if method.needs_gains(chosen) else []
    exchange = ranks.agree("reserving memory to restore weights", reference.exchange)
    deferred = ranks.Deferred(f"restoring queries and keys with {name}")
    gains = _gathered_rows(norms, live, deferred)
    slices = {}
    for spec, maps in reference.selection:
        pairs = {p.name: reference.gather(params, p.name, exchange, deferred) for p in maps}
        rows = None
        if ranks.rank() == 0:
            rows = deferred.run(partial(_restored_rows, method, chosen, spec, maps, pairs, gains))
        for pmap in maps:
            kept = reference.slices[pmap.name]
            flat = None if rows is None else rows[pmap.name].to(kept.dtype).reshape(-1)
            mine = exchange.scatter(flat, reference.slice_spans[pmap.name], kept.dtype, deferred)
            slices[pmap.name] = kept if mine is None else mine
    deferred.agree()
    return slices


def _gathered_rows(maps: Sequence[ParamMap], live: Mapping[str, Any], deferred: ranks.Deferred) -> dict[str, Tensor]:
    """Compact tensors of live parameters by name, on rank 0 (empty elsewhere); ALL ranks must call this."""
    full = sharding.gather_full([live[p.name] for p in maps], deferred)
    return {p.name: p.take(tensor) for p, tensor in zip(maps, full, strict=True) if tensor is not None}


def _restored_rows(
    method: Method,
    options: Mapping[str, Any],
    spec: AttentionSpec,
    maps: Sequence[ParamMap],
    pairs: Mapping[str, tuple[Tensor, Tensor] | None],
    gains: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """One layer's restored rows by parameter from its (pre, live) pairs; rank 0, which has gathered them."""
    gathered = {name: pair for name, pair in pairs.items() if pair is not None}
    pre = {name: pair[0].cpu() for name, pair in gathered.items()}
    post = {name: pair[1].cpu() for name, pair in gathered.items()}
    with _all_cores():  # launchers give each rank a single thread; the others wait for this one
        return restore_layer(method, options, spec, maps, pre, post, gains=gains, compare=False).rows


@contextmanager
def _all_cores() -> Iterator[None]:
    """As many threads for torch's arithmetic on the CPU as this process may use cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _with_rows(reference: Reference, name: str, live: Tensor, rows: Tensor) -> Tensor:
    """A copy of this rank's shard of a live weight, with a slice of other rows in it."""
    shard, rows = live.clone(), rows.to(live)
    for found in reference.maps[name].role_slices(*reference.spans[name]):
        shard[found.flat] = rows[found.compact]
    return shard
