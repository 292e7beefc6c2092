"""The pre-SFT queries and keys: taken once from the live weights, written once, verified, reloaded on resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.distributed import collectives, ranks, sharding
from qkguard.distributed.sharding import Param, Span
from qkguard.errors import QKGuardError
from qkguard.layout.selection import Selection
from qkguard.layout.spec import ParamMap


class Reference:
    """This rank's share of the pre-SFT query and key rows, on the CPU.

    `slices[name]` is the 1-D part of the flattened compact tensor of parameter `name` that lies in this rank's tile
    `spans[name]` of the full parameter, in the dtype the weights had at step 0. Over all ranks the pieces make the
    selection exactly once, so it costs the bytes of Q and K divided by the number of ranks. `selection` has the same
    parameters layer by layer.
    """

    def __init__(
        self, selection: Selection, maps: dict[str, ParamMap], spans: dict[str, Span], pieces: dict[str, Tensor]
    ) -> None:
        self.selection, self.maps, self.spans, self.slices = selection, maps, spans, pieces

    @classmethod
    def take(cls, model: nn.Module, selection: Selection) -> Reference:
        """Copy this rank's tiles from the live weights; no communication."""
        maps, params = _bind(model, selection)
        spans = {name: sharding.shard_span(param) for name, param in params.items()}
        pieces = {}
        for name, pmap in maps.items():
            flat = sharding.read(params[name], spans[name])
            pieces[name] = _keep(pmap.take_flat(flat, spans[name][0]))
        return cls(selection, maps, spans, pieces)

    @classmethod
    def scatter(cls, model: nn.Module, selection: Selection, source: Any) -> Reference:
        """Rank 0 reads compact tensors from `source.get(param_map)` and hands every rank its share; a collective.

        The values are cast to the dtype the live weights have. Memory on rank 0: one parameter beyond its share.

        Raises:
            QKGuardError: on all ranks, when the source lacks a tensor or its shape differs.
        """
        maps, params = _bind(model, selection)
        names = list(maps)
        table = sharding.shards([params[name] for name in names])
        spans, pieces = {}, {}
        for name, tiles in zip(names, table, strict=True):
            pmap, dtype = maps[name], sharding.dtype(params[name])

            def load(pmap: ParamMap = pmap, dtype: torch.dtype = dtype) -> Tensor:
                return _cast(source.get(pmap), pmap, dtype).reshape(-1)

            full = ranks.held_by(0, f"reading the reference of {name}", load)
            shares = [(pmap.compact_offset(a), pmap.compact_offset(b)) for a, b in tiles]
            spans[name] = tiles[ranks.rank()]
            pieces[name] = _keep(collectives.scatter_flat(full, shares, dtype))
        return cls(selection, maps, spans, pieces)

    @property
    def nbytes(self) -> int:
        """Bytes this rank keeps."""
        return sum(p.numel() * p.element_size() for p in self.slices.values())

    def live(self, params: dict[str, Param], name: str) -> Tensor:
        """The flat tile of the live weight of parameter `name`, on its device; take rows from it with `maps[name]`."""
        return sharding.read(params[name], self.spans[name])

    def params(self, model: nn.Module) -> dict[str, Param]:
        """The model's parameters that the reference covers."""
        live = dict(sharding.unwrap(model).named_parameters())
        return {name: live[name] for name in self.maps}

    def changed(self, model: nn.Module) -> list[str]:
        """Names of parameters whose live rows differ from the reference by at least one bit; a collective."""
        params = self.params(model)
        differs = torch.zeros(len(self.maps), dtype=torch.float64)
        for i, (name, pmap) in enumerate(self.maps.items()):
            piece = pmap.take_flat(self.live(params, name), self.spans[name][0]).cpu()
            differs[i] = not same_bits(piece, self.slices[name])
        return [name for name, n in zip(self.maps, collectives.all_reduce_sum(differs).tolist(), strict=True) if n]

    def gather(self, model: nn.Module, name: str, dst: int = 0) -> tuple[Tensor, Tensor] | None:
        """(pre, live) compact tensors of one parameter on rank `dst`, on one device, None elsewhere; a collective."""
        pmap, params = self.maps[name], self.params(model)
        shares = self.slice_spans([name])[0]
        live = pmap.take_flat(self.live(params, name), self.spans[name][0])
        pair = [collectives.gather_flat(piece, shares, dst) for piece in (self.slices[name], live)]
        if pair[0] is None or pair[1] is None:
            return None
        pre = pair[0].to(pair[1].device)  # one process on an accelerator: kept on the CPU, live there
        return pre.view(pmap.compact_shape), pair[1].view(pmap.compact_shape)

    def slice_spans(self, names: Sequence[str]) -> list[list[Span]]:
        """[name][rank]: which elements of the flattened compact tensor every rank keeps; a collective."""
        mine = [[self.maps[name].compact_offset(p) for p in self.spans[name]] for name in names]
        table = collectives.all_gather_table(torch.tensor(mine, dtype=torch.int64))
        return [[(int(a), int(b)) for a, b in table[:, i].tolist()] for i in range(len(names))]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bit patterns (NaNs included, 0.0 and -0.0 apart)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _bind(model: nn.Module, selection: Selection) -> tuple[dict[str, ParamMap], dict[str, Param]]:
    """Parameter maps and live parameters by name, their shapes compared."""
    live = dict(sharding.unwrap(model).named_parameters())
    maps = {pmap.name: pmap for _, pmaps in selection for pmap in pmaps}
    for name, pmap in maps.items():
        if name not in live:
            raise QKGuardError(f"the layout names {name}, which the model does not have; pass the layout with spec=")
        if (found := sharding.full_shape(live[name])) != pmap.shape:
            raise QKGuardError(f"{name}: the layout expects shape {pmap.shape}, the model has {found}")
    sharding.check_supported(sharding.unwrap(model), maps)
    return maps, {name: live[name] for name in maps}


def _cast(tensor: Tensor, pmap: ParamMap, dtype: torch.dtype) -> Tensor:
    if tuple(tensor.shape) != pmap.compact_shape:
        raise QKGuardError(
            f"{pmap.name}: expected rows of shape {pmap.compact_shape}, the base has {tuple(tensor.shape)}"
        )
    return tensor.to(dtype)


def _keep(piece: Tensor) -> Tensor:
    """A CPU copy that shares no memory with the model, pinned where an accelerator will read it back."""
    kept = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=torch.cuda.is_available())
    return kept.copy_(piece)
