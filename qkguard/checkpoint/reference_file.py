"""The reference on disk: written once before the first step, verified whenever it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkguard.checkpoint.files import write_json
from qkguard.checkpoint.safetensors_io import SafetensorsWriter, sha256_of
from qkguard.checkpoint.weights import BaseRows
from qkguard.distributed import collectives, ranks
from qkguard.distributed.reference import Reference, same_bits
from qkguard.errors import WrongReferenceError
from qkguard.layout.spec import ParamMap

REFERENCE, REFERENCE_MANIFEST = "reference.safetensors", "reference.json"


def write_reference(reference: Reference, folder: Path, about: dict[str, Any], writer_rank: int = 0) -> None:
    """Write one consolidated file and its manifest, independent of the number of ranks; a collective.

    `writer_rank` writes, one parameter in memory at a time; the manifest comes last, so that a file without one is
    never taken for a reference. `about` goes into the manifest.
    """
    partial = folder / f"{REFERENCE}.partial"
    tensors = {n: (reference.slices[n].dtype, m.compact_shape) for n, m in reference.maps.items()}
    digests: dict[str, str] = {}

    def begin() -> SafetensorsWriter:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REFERENCE_MANIFEST).unlink(missing_ok=True)
        return SafetensorsWriter(partial, tensors)

    def finish(writer: SafetensorsWriter) -> None:
        writer.close()
        os.replace(partial, folder / REFERENCE)
        described = {
            n: {
                "shape": list(m.shape),
                "dim": m.dim,
                "ranges": [list(r) for r in m.ranges],
                "dtype": str(reference.slices[n].dtype).removeprefix("torch."),
                "sha256": digests[n],
            }
            for n, m in reference.maps.items()
        }
        write_json(folder / REFERENCE_MANIFEST, {"format": 1, **about, "tensors": described})

    writer = ranks.held_by(writer_rank, "writing the reference", begin)
    for (name, pmap), shares in zip(reference.maps.items(), reference.slice_spans(list(reference.maps)), strict=True):
        flat = collectives.gather_flat(reference.slices[name], shares, writer_rank)
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
            self.manifest = json.loads((folder / REFERENCE_MANIFEST).read_text())
            self._file = safe_open(folder / REFERENCE, framework="pt")
            self._names = set(self._file.keys())
        except FileNotFoundError as error:
            missing = error.filename or folder / REFERENCE
            raise WrongReferenceError(f"the pre-SFT reference is missing: no {missing}; {ways}") from None
        except (OSError, ValueError, SafetensorError) as error:
            raise WrongReferenceError(f"the pre-SFT reference in {folder} cannot be read ({error}); {ways}") from None
        self._ways = ways

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / REFERENCE_MANIFEST).is_file()

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
            "reference": str(self.folder / REFERENCE),
            "taken_with": self.manifest["versions"],
        }


def compare_with_base(reference: ReferenceFile, base: BaseRows, maps: Sequence[ParamMap]) -> list[str]:
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
