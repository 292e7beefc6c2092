"""The reference on disk: written once before the first step, checked whenever it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed import ProcessGroup

from qkguard.arrays import BFLOAT16, Array, cast, dtype_name, same_bits, sha256_of
from qkguard.checkpoint.files import write_json
from qkguard.checkpoint.safetensors_io import SafetensorsWriter, opened, read_header, read_tensor
from qkguard.checkpoint.weights import BaseRows
from qkguard.distributed import ranks
from qkguard.distributed.collectives import Exchange
from qkguard.distributed.reference import Reference
from qkguard.errors import QKGuardError, WrongReferenceError
from qkguard.layout.spec import ParamMap

REFERENCE, REFERENCE_MANIFEST = "reference.safetensors", "reference.json"
WAYS_OUT = "Put the file back from a copy, or name the pre-SFT checkpoint with QKGuardConfig(base_model=...)."


def write_reference(
    reference: Reference,
    folder: Path,
    about: Mapping[str, Any],
    writers: Sequence[int] = (0,),
    group: ProcessGroup | None = None,
) -> None:
    """Write one file with the rows of all ranks, and its manifest, on every writer; ALL ranks must call this.

    The file does not depend on the number of ranks. A writer holds one parameter in memory at a time. A rank whose
    part fails takes part in the rest and raises at the end; the others do not hear of it here.

    Args:
        about: what the manifest says beside the tensors.
        writers: the ranks that write, each into its own `folder`.
        group: a gloo group of all ranks for nothing else, so that a thread may call this.
    """
    exchange, deferred = reference.exchange(group), ranks.Deferred("writing the reference")
    for writer in writers:
        _write_on(writer, reference, folder, about, exchange, deferred)
    if deferred.failure is not None:
        raise deferred.failure


def _write_on(
    writer: int,
    reference: Reference,
    folder: Path,
    about: Mapping[str, Any],
    exchange: Exchange,
    deferred: ranks.Deferred,
) -> None:
    file = deferred.run(partial(_ReferenceWriter, reference, folder)) if ranks.rank() == writer else None
    for name in reference.maps:
        rows = reference.gather_kept(name, exchange, deferred, writer)
        if file is not None and rows is not None:
            deferred.run(partial(file.write, name, rows))
    if file is not None:
        deferred.run(partial(file.finish, about))


class _ReferenceWriter:
    """A reference file in the making. Its manifest comes last: a file without one is never taken for a reference."""

    def __init__(self, reference: Reference, folder: Path) -> None:
        self.reference, self.folder, self.partial = reference, folder, folder / f"{REFERENCE}.partial"
        self.described: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REFERENCE_MANIFEST).unlink(missing_ok=True)
        layout = {n: (reference.slices[n].dtype, m.compact_shape) for n, m in reference.maps.items()}
        self.file = SafetensorsWriter(self.partial, layout)

    def write(self, name: str, rows: Array) -> None:
        """The rows of the next parameter, in the order of the reference's maps."""
        rows = rows.cpu()
        self.file.write(rows)
        pmap = self.reference.maps[name]
        self.described[name] = {
            "shape": list(pmap.shape),
            "dim": pmap.dim,
            "ranges": [list(r) for r in pmap.ranges],
            "dtype": dtype_name(rows.dtype),
            "sha256": sha256_of(rows),
        }

    def finish(self, about: Mapping[str, Any]) -> None:
        self.file.close()
        os.replace(self.partial, self.folder / REFERENCE)
        write_json(self.folder / REFERENCE_MANIFEST, {"format": 1, **about, "tensors": self.described})


class ReferenceFile:
    """A written reference: where restored checkpoints and resumed runs read the rows from before SFT (one process).

    Raises:
        WrongReferenceError: when the file or its manifest is missing, damaged or belongs to another layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = json.loads((folder / REFERENCE_MANIFEST).read_text())
            (folder / REFERENCE).stat()
            self._stored = read_header(folder / REFERENCE).tensors
        except FileNotFoundError as error:
            raise WrongReferenceError(f"The pre-SFT reference is missing: no {error.filename}. {WAYS_OUT}") from None
        except (OSError, ValueError, QKGuardError) as error:
            raise WrongReferenceError(
                f"The pre-SFT reference in {folder} cannot be read ({error}). {WAYS_OUT}"
            ) from None

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / REFERENCE_MANIFEST).is_file()

    @staticmethod
    def discard(folder: Path) -> None:
        """Remove a reference that turned out wrong before the first step (one writer)."""
        for name in (REFERENCE_MANIFEST, REFERENCE):
            (folder / name).unlink(missing_ok=True)

    def get(self, pmap: ParamMap) -> np.ndarray:
        """The compact array of one parameter, checked against its recorded hash."""
        entry = self.manifest["tensors"].get(pmap.name)
        if entry is None or pmap.name not in self._stored:
            raise WrongReferenceError(
                f"The reference in {self.folder} has no rows of {pmap.name}: it was taken with another layout or "
                f"other settings. {WAYS_OUT}"
            )
        held = (tuple(entry["shape"]), entry["dim"], tuple(map(tuple, entry["ranges"])))
        if held != (pmap.shape, pmap.dim, pmap.ranges):
            raise WrongReferenceError(
                f"The reference of {pmap.name} holds rows {entry['ranges']} of shape {entry['shape']}; this run needs "
                f"rows {list(pmap.ranges)} of {list(pmap.shape)}. {WAYS_OUT}"
            )
        with opened(self.folder / REFERENCE) as fd:
            rows = read_tensor(fd, self._stored[pmap.name])
        if sha256_of(rows) != entry["sha256"]:
            raise WrongReferenceError(
                f"The reference of {pmap.name} in {self.folder} has changed since it was taken (its sha256 differs). "
                f"{WAYS_OUT}"
            )
        return rows

    def describe(self) -> dict[str, Any]:
        """What the manifest of a restored checkpoint says of the reference."""
        return {
            **self.manifest["base"],
            "reference": str(self.folder / REFERENCE),
            "taken_with": self.manifest["versions"],
        }


def differing_from_base(reference: ReferenceFile, base: BaseRows, maps: Sequence[ParamMap]) -> list[str]:
    """Names of parameters whose rows in the reference are not those of the base checkpoint's own files (one process).

    Equal means: the stored rows have the reference's bits once cast to its dtype, either directly or through half
    precision (a model that was loaded in bfloat16 and is trained in float32).
    """
    wrong = []
    for pmap in maps:
        kept, stored = reference.get(pmap), base.get(pmap)
        rounded = [stored, *(cast(stored, half) for half in (BFLOAT16, np.dtype(np.float16)))]
        if not any(same_bits(kept, cast(rows, kept.dtype)) for rows in rounded):
            wrong.append(pmap.name)
    return wrong
