"""The restored model without a copy of it: restored queries and keys in the live model, and the tuned ones back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qkguard.distributed import collectives, ranks, sharding
from qkguard.distributed.reference import Reference
from qkguard.layout.selection import unselected_norms
from qkguard.restore.apply import restore_layer
from qkguard.restore.registry import check_options, check_per_layer, get_method


@contextmanager
def restored(model: nn.Module, reference: Reference, *, method: str = "restore", **options: Any) -> Iterator[None]:
    """Run `model` with restored queries and keys inside the block; ALL ranks must enter and leave it.

        with qkguard.restored(model, guard.session.reference):
            ...  # forward passes without gradients, generation, evaluation

    Afterwards, also after an exception, every weight has the bits it had before; optimizer states and master weights
    are not touched. Gives the same model as `qk_restored/` of a checkpoint of the same step. Costs the memory of this
    rank's share of queries and keys, on the CPU; methods other than restore also gather a layer at a time on rank 0.

    Args:
        model: the live model, plain or sharded.
        reference: what it was before SFT.
        method, options: a restore method and its options (`restore_checkpoint`).

    Raises:
        QKGuardError: the model is not the one that the reference was taken from, or bad options.
    """
    model = sharding.unwrap(model)
    sharding.settle(model)
    params = reference.params(model)
    pieces = reference.slices if method == "restore" and not options else _mixed(model, reference, method, options)
    kept: dict[str, Tensor] = {}
    try:
        for name, param in params.items():
            live = reference.live(params, name)
            kept[name] = live.cpu().clone()
            sharding.write(param, _with_rows(reference, name, live, pieces[name]))
        yield
    finally:
        sharding.settle(model)
        for name, tile in kept.items():
            sharding.write(params[name], tile.to(sharding.device(params[name])))


def _mixed(model: nn.Module, reference: Reference, name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """This rank's pieces of what a method makes of the reference and the live weights; a collective."""
    parts = sorted({role for pmap in reference.maps.values() for block in pmap.blocks for role in block.role} - {"v"})
    method, chosen = get_method(name), check_options(name, options, parts)
    check_per_layer(chosen, reference.selection)
    live = dict(model.named_parameters())
    norms = unselected_norms(reference.selection) if method.needs_gains(chosen) else []
    whole = zip(norms, sharding.gather_full([live[p.name] for p in norms]), strict=True)
    gains = {p.name: p.take(full) for p, full in whole if full is not None}
    pieces = {}
    for spec, maps in reference.selection:
        pairs = {p.name: reference.gather(model, p.name) for p in maps}

        def make(spec: Any = spec, maps: Any = maps, pairs: Any = pairs) -> dict[str, Tensor]:
            pre, post = ({n: pair[i].cpu() for n, pair in pairs.items()} for i in range(2))
            return restore_layer(method, chosen, spec, maps, pre, post, gains=gains).rows

        rows = ranks.held_by(0, f"restoring {spec.module} ({name})", make)
        for pmap, shares in zip(maps, reference.slice_spans([p.name for p in maps]), strict=True):
            dtype = sharding.dtype(live[pmap.name])
            full = None if rows is None else rows[pmap.name].to(dtype).reshape(-1)
            pieces[pmap.name] = collectives.scatter_flat(full, shares, dtype)
    return pieces


def _with_rows(reference: Reference, name: str, live: Tensor, piece: Tensor) -> Tensor:
    """The flat tile of a live weight with this rank's piece of new rows in it, as a new tensor."""
    start, stop = reference.spans[name]
    tile, piece = live.clone(), piece.to(live)
    for part in reference.maps[name].role_slices(start, stop):
        tile[part.flat] = piece[part.compact]
    return tile
