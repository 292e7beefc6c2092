"""The queries and keys from before SFT, each rank keeping the part that lies in its own shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.arrays import as_tensor
from qkguard.distributed import collectives, ranks, sharding
from qkguard.distributed.collectives import Exchange, Span
from qkguard.distributed.sharding import Param
from qkguard.errors import QKGuardError
from qkguard.layout.selection import Selection
from qkguard.layout.spec import ParamMap


class Reference:
    """This rank's part of the pre-SFT query and key rows, on the CPU.

    Over all ranks the parts make up the selected rows exactly once: a rank keeps the bytes of Q and K divided by the
    number of ranks.

    Attributes:
        selection: the layers and the parameters with query and key rows in each.
        maps: parameter name -> which of its rows are queries and keys.
        shards: parameter name -> by rank, its shard of the flattened parameter.
        spans: parameter name -> this rank's shard of the flattened parameter.
        slices: parameter name -> 1-D tensor, the part of the flattened *compact* tensor that lies in this shard, in
            the dtype the weights had at step 0.
        slice_spans: parameter name -> by rank, which elements of the flattened compact tensor it keeps.
        readers: functions that wait for work under way on the live weights; to be called before these are written.
    """

    def __init__(
        self,
        selection: Selection,
        maps: dict[str, ParamMap],
        shards: dict[str, list[Span]],
        slices: dict[str, Tensor],
    ) -> None:
        self.selection, self.maps, self.slices = selection, maps, slices
        self.shards = shards
        self.spans = {name: of_ranks[ranks.rank()] for name, of_ranks in shards.items()}
        self.slice_spans = {name: _compact_spans(maps[name], of_ranks) for name, of_ranks in shards.items()}
        self.readers: list[Callable[[], None]] = []
        self._params: dict[str, Param] = {}

    @classmethod
    def take(cls, model: nn.Module, selection: Selection) -> Reference:
        """Copy the rows from the live weights, each rank from its own shards; ALL ranks must call this."""
        maps, params, shards = _find_rows(model, selection)
        slices = {}
        for name, pmap in maps.items():
            span = shards[name][ranks.rank()]
            slices[name] = _kept(pmap.take_flat(sharding.read(params[name], span), span[0]))
        return cls(selection, maps, shards, slices)

    @classmethod
    def scatter(cls, model: nn.Module, selection: Selection, source: Any) -> Reference:
        """Rank 0 reads the rows and hands every rank its slices; ALL ranks must call this.

        `source.get(param_map)` gives the compact array of one parameter; the other ranks pass None.
        The values are cast to the dtype of the live weights. Rank 0 needs memory for one parameter beside its part.

        Raises:
            QKGuardError: on all ranks, when the source lacks a tensor or its shape differs.
        """
        maps, params, shards = _find_rows(model, selection)
        dtypes = {name: sharding.dtype(param) for name, param in params.items()}
        spans = {name: _compact_spans(pmap, shards[name]) for name, pmap in maps.items()}
        deferred = ranks.Deferred("reading the reference")
        reserve = partial(Exchange.of, [(spans[name], dtypes[name]) for name in maps])
        exchange = ranks.agree("reserving memory for the reference", reserve)
        slices = {}
        for name, pmap in maps.items():
            flat = None
            if ranks.rank() == 0:
                flat = deferred.run(partial(_read_flat, source, pmap, dtypes[name]))
            mine = exchange.scatter(flat, spans[name], dtypes[name], deferred)
            kept = None if mine is None else deferred.run(partial(_kept, mine))
            if kept is not None:
                slices[name] = kept
        deferred.agree()
        return cls(selection, maps, shards, slices)

    def only(self, selection: Selection) -> Reference:
        """The rows of some of its layers, in the same memory; every rank by itself."""
        names = [pmap.name for _, pmaps in selection for pmap in pmaps]
        shards = {name: self.shards[name] for name in names}
        slices = {name: self.slices[name] for name in names}
        part = Reference(selection, {name: self.maps[name] for name in names}, shards, slices)
        part.readers = self.readers
        return part

    def wait_for_readers(self) -> None:
        """Return when nothing reads the live weights beside the training; every rank by itself."""
        for wait in self.readers:
            wait()

    @property
    def nbytes(self) -> int:
        """Bytes this rank keeps."""
        return sum(kept.numel() * kept.element_size() for kept in self.slices.values())

    def params(self, model: nn.Module) -> dict[str, Param]:
        """The model's parameters that the reference covers.

        Raises:
            QKGuardError: the model is not the one that the reference was taken from.
        """
        model = sharding.unwrap(model)
        # what has been checked stays checked: of a large model that takes milliseconds, at every measurement
        if not self._params or not all(_is_at(model, name, param) for name, param in self._params.items()):
            self._params = _find_params(model, self.maps)
        return self._params

    def live(self, params: dict[str, Param], name: str) -> Tensor:
        """This rank's flat shard of a live parameter, on its device; `maps[name]` finds the rows in it."""
        return sharding.read(params[name], self.spans[name])

    def changed(self, model: nn.Module) -> list[str]:
        """The parameters whose live rows differ from the reference by a bit or more; ALL ranks must call this."""
        params = self.params(model)
        differs = torch.zeros(len(self.maps), dtype=torch.float64)
        for i, (name, pmap) in enumerate(self.maps.items()):
            now = pmap.take_flat(self.live(params, name), self.spans[name][0]).cpu()
            # bit patterns, because NaN != NaN and 0.0 == -0.0
            differs[i] = not torch.equal(collectives.flat_bytes(now), collectives.flat_bytes(self.slices[name]))
        counts = collectives.all_reduce_sum(differs).tolist()
        return [name for name, ranks_that_differ in zip(self.maps, counts, strict=True) if ranks_that_differ]

    def exchange(self, group: Any = None) -> Exchange:
        """Memory for gathering and scattering these rows; ALL ranks must make one, and should agree on it."""
        return Exchange.of(((self.slice_spans[name], kept.dtype) for name, kept in self.slices.items()), group)

    def gather(
        self, params: dict[str, Param], name: str, exchange: Exchange, deferred: ranks.Deferred, dst: int = 0
    ) -> tuple[Tensor, Tensor] | None:
        """(pre, live) compact tensors of one of `params` on rank `dst`, on one device; None elsewhere. ALL ranks."""
        mine = deferred.run(partial(self._live_rows, params, name))
        pre = self.gather_kept(name, exchange, deferred, dst)
        now = exchange.gather(mine, self.slice_spans[name], self.slices[name].dtype, deferred, dst)
        if pre is None or now is None:
            return None
        pre = deferred.run(partial(pre.to, now.device))  # one process on an accelerator: kept on the CPU, live there
        return None if pre is None else (pre, now.view(self.maps[name].compact_shape))

    def gather_kept(self, name: str, exchange: Exchange, deferred: ranks.Deferred, dst: int = 0) -> Tensor | None:
        """The compact tensor of one parameter from before SFT on rank `dst`, None elsewhere; ALL ranks."""
        kept = self.slices[name]
        flat = exchange.gather(kept, self.slice_spans[name], kept.dtype, deferred, dst)
        return None if flat is None else flat.view(self.maps[name].compact_shape)

    def _live_rows(self, params: dict[str, Param], name: str) -> Tensor:
        """This rank's slice of a parameter's live rows, in the dtype that is kept of it."""
        rows = self.maps[name].take_flat(self.live(params, name), self.spans[name][0])
        return rows.to(self.slices[name].dtype)


def _find_rows(
    model: nn.Module, selection: Selection
) -> tuple[dict[str, ParamMap], dict[str, Param], dict[str, list[Span]]]:
    """Row maps, live parameters and every rank's shard of them, by name; ALL ranks must call this.

    Raises:
        QKGuardError: on all ranks, when the layout does not fit the model or a placement is not supported.
    """
    maps = {pmap.name: pmap for _, pmaps in selection for pmap in pmaps}
    find = partial(_find_params, sharding.unwrap(model), maps)
    params = ranks.agree("finding the query and key parameters", find)
    return maps, params, dict(zip(maps, sharding.shards(list(params.values())), strict=True))


def _find_params(model: nn.Module, maps: dict[str, ParamMap]) -> dict[str, Param]:
    live = dict(model.named_parameters())
    for name, pmap in maps.items():
        if name not in live:
            raise QKGuardError(f"The layout names {name}, which the model does not have. Pass the layout with spec=.")
        found = sharding.full_shape(live[name])
        if found != pmap.shape:
            raise QKGuardError(f"{name} has shape {found} in the model; the layout expects {pmap.shape}.")
    sharding.check_supported(model, maps)
    return {name: live[name] for name in maps}


def _is_at(model: nn.Module, name: str, param: Param) -> bool:
    try:
        return model.get_parameter(name) is param
    except AttributeError:
        return False


def _compact_spans(pmap: ParamMap, shards: list[Span]) -> list[Span]:
    """Which elements of the flattened compact tensor lie in each shard of the parameter."""
    return [(pmap.compact_offset(start), pmap.compact_offset(stop)) for start, stop in shards]


def _read_flat(source: Any, pmap: ParamMap, dtype: torch.dtype) -> Tensor:
    """The rows of one parameter from a source, flattened, in the dtype of the live weight."""
    rows = source.get(pmap)
    if tuple(rows.shape) != pmap.compact_shape:
        raise QKGuardError(
            f"{pmap.name}: the base has rows of shape {tuple(rows.shape)}, expected {pmap.compact_shape}."
        )
    return as_tensor(rows).to(dtype).reshape(-1)


def _kept(rows: Tensor) -> Tensor:
    """A CPU copy that shares no memory with the model, pinned where an accelerator will read it back."""
    kept = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=torch.cuda.is_available())
    return kept.copy_(rows)
