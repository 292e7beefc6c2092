"""The pre-SFT queries and keys: taken once from the live weights, written once, verified, reloaded on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qkguard import ranks, sharding
from qkguard.checkpoint.safetensors_io import sha256_of
from qkguard.checkpoint.safetensors_writer import SafetensorsWriter
from qkguard.errors import QKGuardError, WrongReferenceError
from qkguard.layout.spec import ParamMap, Selection
from qkguard.sharding import Param, Span

TENSORS, MANIFEST = "reference.safetensors", "reference.json"


class Reference:
    """This rank's share of the pre-SFT query and key rows, on the CPU.

    `pieces[name]` is the 1-D part of the flattened compact tensor of parameter `name` that lies in this rank's tile
    `spans[name]` of the full parameter, in the dtype the weights had at step 0. Over all ranks the pieces make the
    selection exactly once, so it costs the bytes of Q and K divided by the number of ranks. `selection` has the same
    parameters layer by layer.
    """

    def __init__(
        self, selection: Selection, maps: dict[str, ParamMap], spans: dict[str, Span], pieces: dict[str, Tensor]
    ) -> None:
        self.selection, self.maps, self.spans, self.pieces = selection, maps, spans, pieces

    @classmethod
    def take(cls, model: nn.Module, selection: Selection) -> Reference:
        """Copy this rank's tiles from the live weights; no communication."""
        maps, params = _bind(model, selection)
        spans = {name: sharding.tile(param) for name, param in params.items()}
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
        table = sharding.tiles([params[name] for name in names])
        spans, pieces = {}, {}
        for name, tiles in zip(names, table, strict=True):
            pmap, dtype = maps[name], sharding.dtype(params[name])

            def load(pmap: ParamMap = pmap, dtype: torch.dtype = dtype) -> Tensor:
                return _cast(source.get(pmap), pmap, dtype).reshape(-1)

            full = ranks.held_by(0, f"reading the reference of {name}", load)
            shares = [(pmap.compact_offset(a), pmap.compact_offset(b)) for a, b in tiles]
            spans[name] = tiles[ranks.rank()]
            pieces[name] = _keep(ranks.scatter_flat(full, shares, dtype))
        return cls(selection, maps, spans, pieces)

    @property
    def nbytes(self) -> int:
        """Bytes this rank keeps."""
        return sum(p.numel() * p.element_size() for p in self.pieces.values())

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
            differs[i] = not same_bits(piece, self.pieces[name])
        return [name for name, n in zip(self.maps, ranks.all_reduce_sum(differs).tolist(), strict=True) if n]

    def gather(self, model: nn.Module, name: str, dst: int = 0) -> tuple[Tensor, Tensor] | None:
        """(pre, live) compact tensors of one parameter on rank `dst`, on one device, None elsewhere; a collective."""
        pmap, params = self.maps[name], self.params(model)
        shares = self.shares([name])[0]
        live = pmap.take_flat(self.live(params, name), self.spans[name][0])
        pair = [ranks.gather_flat(piece, shares, dst) for piece in (self.pieces[name], live)]
        if pair[0] is None or pair[1] is None:
            return None
        pre = pair[0].to(pair[1].device)  # one process on an accelerator: kept on the CPU, live there
        return pre.view(pmap.compact_shape), pair[1].view(pmap.compact_shape)

    def shares(self, names: Sequence[str]) -> list[list[Span]]:
        """[name][rank]: which elements of the flattened compact tensor every rank keeps; a collective."""
        mine = [[self.maps[name].compact_offset(p) for p in self.spans[name]] for name in names]
        table = ranks.all_gather_table(torch.tensor(mine, dtype=torch.int64))
        return [[(int(a), int(b)) for a, b in table[:, i].tolist()] for i in range(len(names))]

    def write(self, folder: Path, about: dict[str, Any], writer_rank: int = 0) -> None:
        """Write one consolidated file and its manifest, independent of the number of ranks; a collective.

        `writer_rank` writes, one parameter in memory at a time; the manifest comes last, so that a file without one is
        never taken for a reference. `about` goes into the manifest.
        """
        partial = folder / f"{TENSORS}.partial"
        tensors = {n: (self.pieces[n].dtype, m.compact_shape) for n, m in self.maps.items()}
        digests: dict[str, str] = {}

        def begin() -> SafetensorsWriter:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MANIFEST).unlink(missing_ok=True)
            return SafetensorsWriter(partial, tensors)

        def finish(writer: SafetensorsWriter) -> None:
            writer.close()
            os.replace(partial, folder / TENSORS)
            described = {
                n: {
                    "shape": list(m.shape),
                    "dim": m.dim,
                    "ranges": [list(r) for r in m.ranges],
                    "dtype": str(self.pieces[n].dtype).removeprefix("torch."),
                    "sha256": digests[n],
                }
                for n, m in self.maps.items()
            }
            write_json(folder / MANIFEST, {"format": 1, **about, "tensors": described})

        writer = ranks.held_by(writer_rank, "writing the reference", begin)
        for (name, pmap), shares in zip(self.maps.items(), self.shares(list(self.maps)), strict=True):
            flat = ranks.gather_flat(self.pieces[name], shares, writer_rank)
            if flat is not None and writer is not None:
                full = flat.cpu().view(pmap.compact_shape)
                digests[name] = sha256_of(full)
                writer.write(full)
        ranks.on_rank(writer_rank, "writing the reference", lambda: finish(writer) if writer else None)


class ReferenceFile:
    """A written reference: where checkpoints and resumed runs take the pre-SFT rows from (rank 0 only).

    Raises:
        WrongReferenceError: when the file or its manifest is missing, damaged or belongs to another layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ways = "name the pre-SFT checkpoint with QKGuardConfig(base_model=...), or put the file back from a copy"
        try:
            self.manifest = json.loads((folder / MANIFEST).read_text())
            self._file = safe_open(folder / TENSORS, framework="pt")
            self._names = set(self._file.keys())
        except FileNotFoundError as error:
            missing = error.filename or folder / TENSORS
            raise WrongReferenceError(f"the pre-SFT reference is missing: no {missing}; {ways}") from None
        except (OSError, ValueError, SafetensorError) as error:
            raise WrongReferenceError(f"the pre-SFT reference in {folder} cannot be read ({error}); {ways}") from None
        self._ways = ways

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / MANIFEST).is_file()

    def get(self, pmap: ParamMap) -> Tensor:
        """The compact tensor of one parameter, checked against its recorded hash."""
        entry = self.manifest["tensors"].get(pmap.name)
        if entry is None or pmap.name not in self._names:
            raise WrongReferenceError(
                f"the reference in {self.folder} has no rows of {pmap.name}: it was taken with another layout or "
                f"other options; {self._ways}"
            )
        held = (tuple(entry["shape"]), entry["dim"], tuple(map(tuple, entry["ranges"])))
        if held != (pmap.shape, pmap.dim, pmap.ranges):
            raise WrongReferenceError(
                f"the reference of {pmap.name} covers rows {entry['ranges']} of shape {entry['shape']}, the run asks "
                f"for {list(pmap.ranges)} of {list(pmap.shape)}; {self._ways}"
            )
        tensor = self._file.get_tensor(pmap.name)
        if sha256_of(tensor) != entry["sha256"]:
            raise WrongReferenceError(
                f"the reference of {pmap.name} in {self.folder} has changed since it was taken (sha256 differs); "
                f"{self._ways}"
            )
        return tensor

    def describe(self) -> dict[str, Any]:
        """What the manifest of a restored checkpoint says of the reference."""
        return {
            **self.manifest["base"],
            "reference": str(self.folder / TENSORS),
            "taken_with": self.manifest["versions"],
        }


def compare_with_base(reference: ReferenceFile, base: Any, maps: Sequence[ParamMap]) -> list[str]:
    """Parameters whose reference differs from the base checkpoint's own files (rank 0 only).

    Equal means: the stored tensor cast to the step-0 dtype, directly or through half precision (a model loaded in
    bfloat16 and trained in float32), has the reference's bits. `base.get(param_map)` gives the stored rows.
    """
    wrong = []
    for pmap in maps:
        kept, stored = reference.get(pmap), base.get(pmap)
        casts = [stored.to(kept.dtype)] + [stored.to(h).to(kept.dtype) for h in (torch.bfloat16, torch.float16)]
        if not any(same_bits(kept, cast) for cast in casts):
            wrong.append(pmap.name)
    return wrong


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bit patterns (NaNs included, 0.0 and -0.0 apart)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write and fsync a JSON file through a temporary name, so that it is there whole or not at all."""
    partial = path.with_name(f"_{path.name}.partial")
    with open(partial, "w") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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
