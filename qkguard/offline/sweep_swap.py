"""Restored tensors in one loaded model: put in for a candidate, taken out again to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.arrays import as_tensor, cast, same_bits, sha256_of
from qkguard.checkpoint.weights import BaseFolder
from qkguard.choice.candidates import Candidate
from qkguard.choice.value_output import find_value_output
from qkguard.errors import QKGuardError
from qkguard.layout import disk_names, find_attention
from qkguard.layout.rows import RETRIEVAL, RowSelection
from qkguard.layout.selection import select, unselected_norms
from qkguard.layout.spec import ParamMap
from qkguard.offline.pair import Folders, tensor_names
from qkguard.restore.apply import restore_layer
from qkguard.restore.registry import get_method


@dataclass
class CandidateRows:
    """What a candidate puts into the model: new compact rows by parameter, and per layer what the method did."""

    rows: list[tuple[ParamMap, Tensor]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Equal for equal rows, whatever made them."""
        found = sorted((param.name, param.ranges, sha256_of(rows)) for param, rows in self.rows)
        return sha256(repr(found).encode()).hexdigest()


class CandidateSwap:
    """Rows from before SFT, or made from them, for a model loaded from the tuned folder.

    Args:
        model: the tuned checkpoint, loaded; its attention layers are found by `find_attention`.
        folders: both checkpoints.
        spec: a layout by hand.
        rows: which rows; the candidates choose among the projections.
        device: where the arithmetic of the methods runs.

    Raises:
        QKGuardError: a layout that is not known for certain, a base without the rows, weights that are not loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        folders: Folders,
        *,
        rows: RowSelection | None = None,
        spec: Any = None,
        device: str = "cpu",
    ) -> None:
        rows = rows or RowSelection()
        self.model, self.folders, self.spec, self.device = model, folders, spec, device
        self.live = dict(model.named_parameters())
        self.specs = find_attention(model, spec=spec)
        self.rows = rows
        self.selection = select(self.specs, rows)
        if not self.selection:
            raise QKGuardError("There is nothing to restore: no layer is selected. Check layers.")
        params = [p for _, maps in self.selection for p in maps]
        offloaded = [p.name for p in params if self.live[p.name].is_meta]
        if offloaded:
            raise QKGuardError(
                f"{offloaded[0]} is offloaded to disk, so it cannot be swapped. Use a larger device, or cpu."
            )
        self._base_names = self._disk_names(folders.base, params)
        self._tuned_names = self._disk_names(folders.tuned, params)
        self._source(params)
        self._value_output: dict[str, list[ParamMap]] = {}

    @property
    def layers(self) -> list[int]:
        """The selected decoder layers, in order."""
        return sorted({spec.layer for spec, _ in self.selection if spec.layer is not None})

    def prepare(self, candidate: Candidate) -> CandidateRows:
        """The rows of a candidate that differ from the model's own, in the dtype of the tuned files.

        They are those that `restore_checkpoint` would write.
        """
        out = CandidateRows()
        projections = [role for role in ("q", "k") if role in candidate.tensors]
        if projections:
            self._prepare_attention(candidate, projections, out)
        for which in ("v", "o"):
            if which in candidate.tensors:
                self._prepare_value_output(which, out)
        out.rows = [(param, rows) for param, rows in out.rows if not self._holds(param, rows)]
        return out

    def _holds(self, param: ParamMap, rows: Tensor) -> bool:
        """Whether the model has these rows already."""
        live = param.take(self.live[param.name].data)
        return same_bits(live, rows.to(live))

    @contextmanager
    def swapped(self, new: CandidateRows) -> Iterator[None]:
        """The model with these rows inside the block; afterwards, also after an exception, it has its own bits again.

        Raises:
            QKGuardError: on leaving, if the weights are not the bits they were.
        """
        kept = [(param, param.take(self.live[param.name].data).clone()) for param, _ in new.rows]
        try:
            with torch.no_grad():
                for param, rows in new.rows:
                    full = self.live[param.name].data
                    param.put(full, rows.to(full))
            yield
        finally:
            with torch.no_grad():
                for param, rows in kept:
                    param.put(self.live[param.name].data, rows)
        for param, rows in kept:
            if not same_bits(param.take(self.live[param.name].data), rows):
                raise QKGuardError(
                    f"{param.name} did not return to its own bits. Report this, and load the model again."
                )

    def _prepare_attention(self, candidate: Candidate, projections: Sequence[str], out: CandidateRows) -> None:
        method = get_method(candidate.method)
        layers = self.rows.layers if candidate.layers is None else candidate.layers
        assert layers != RETRIEVAL  # `with_layers` has put numbers in its place
        selection = select(self.specs, replace(self.rows, projections=tuple(projections), layers=layers))
        source = self._source([p for _, maps in selection for p in maps])
        tuned = self.folders.tuned
        for index, (spec, maps) in enumerate(selection):
            pre = {p.name: source.get(p) for p in maps}
            post = {p.name: tuned.read(self._tuned_names[p.name], p) for p in maps} if method.computes else {}
            gains = {}
            if method.needs_gains(candidate.options):
                norms = unselected_norms([(spec, maps)])
                names = self._disk_names(tuned, norms)
                gains = {p.name: tuned.read(names[p.name], p) for p in norms}
            new = restore_layer(method, candidate.options, spec, maps, pre, post, gains=gains, device=self.device)
            for param in maps:
                dtype = tuned.dtype(self._tuned_names[param.name])
                out.rows.append((param, as_tensor(cast(new.rows[param.name], dtype))))
            out.layers.append({"index": index, "layer": spec.layer, **new.report})

    def _prepare_value_output(self, which: str, out: CandidateRows) -> None:
        if which not in self._value_output:
            found = find_value_output(self.model, [spec for spec, _ in self.selection], which)
            self._value_output[which] = [param for _, param in found]
        params = self._value_output[which]
        source = self._source(params)
        out.rows += [(param, as_tensor(source.get(param)).to(self.live[param.name].dtype)) for param in params]

    def _source(self, params: Sequence[ParamMap]) -> BaseFolder:
        """Where the base keeps these rows.

        Raises:
            QKGuardError: it does not have them.
        """
        names = {p.name: self._base_names[p.name] for p in params if p.name in self._base_names}
        missing = [p for p in params if p.name not in names]
        if missing:
            names |= self._disk_names(self.folders.base, missing)
        source = BaseFolder(self.folders.base, names, model_id=self.folders.base_id)
        source.check(params)
        return source

    def _disk_names(self, weights: Any, params: Sequence[ParamMap]) -> Mapping[str, str]:
        if self.spec is not None:
            return tensor_names(params, weights, self.folders.tuned.folder, by_hand=True)
        return disk_names(params, weights.shapes(), self.model.config) if params else {}
