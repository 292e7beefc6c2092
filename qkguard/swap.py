"""The restored model without a copy of it: pre-SFT queries and keys in the live model, and the tuned ones back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from qkguard import sharding
from qkguard.reference import Reference


@contextmanager
def restored(model: nn.Module, reference: Reference) -> Iterator[None]:
    """Run `model` with the reference's queries and keys inside the block; ALL ranks must enter and leave it.

        with qkguard.restored(model, guard.session.reference):
            ...  # forward passes without gradients, generation, evaluation

    Afterwards, also after an exception, every weight has the bits it had before; optimizer states and master weights
    are not touched. Gives the same model as `qk_restored/` of a checkpoint of the same step. Costs the memory of this
    rank's share of queries and keys, on the CPU.

    Raises:
        QKGuardError: the model is not the one that the reference was taken from.
    """
    model = sharding.unwrap(model)
    sharding.settle(model)
    params = reference.params(model)
    kept: dict[str, Tensor] = {}
    try:
        for name, param in params.items():
            live = reference.live(params, name)
            kept[name] = live.cpu().clone()
            sharding.write(param, _with_rows(reference, name, live))
        yield
    finally:
        sharding.settle(model)
        for name, tile in kept.items():
            sharding.write(params[name], tile.to(sharding.device(params[name])))


def _with_rows(reference: Reference, name: str, live: Tensor) -> Tensor:
    """The flat tile of a live weight with the reference's rows in it, as a new tensor."""
    start, stop = reference.spans[name]
    tile, piece = live.clone(), reference.pieces[name].to(live)
    for run in reference.maps[name].runs(start, stop):
        tile[run.flat] = piece[run.compact]
    return tile
