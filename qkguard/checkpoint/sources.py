"""Where the pre-SFT rows come from: anything with `get` and `describe`, among them a base checkpoint's folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qkguard.checkpoint.weights import WeightFolder
from qkguard.errors import QKGuardError
from qkguard.layout.spec import ParamMap


class QKSource(Protocol):
    """The rows of queries and keys before SFT."""

    def get(self, param: ParamMap, /) -> Tensor:
        """The compact CPU tensor of one parameter: in the dtype held at step 0 where there was a step 0, else as
        stored. The writer rounds it to the raw file's dtype."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON values for the manifest: at least "id", the base model's hub id or folder."""
        ...


class FolderSource:
    """A base checkpoint's own files, read a parameter at a time.

    Args:
        weights: the base folder, opened by `open_weights`.
        names: parameter name -> tensor name in the base files (`disk_names`).
        model_id: what the user called the base: a hub id or a folder.

    Raises:
        QKGuardError: from `check` and `get`, where the base lacks a tensor, or holds it in another shape or quantised.
    """

    def __init__(self, weights: WeightFolder, names: Mapping[str, str], *, model_id: str | None = None) -> None:
        self.weights, self.names = weights, names
        self.model_id = model_id or str(weights.folder)

    def check(self, params: Iterable[ParamMap]) -> None:
        """Fail before anything is copied if one of these parameters cannot be read."""
        shapes = self.weights.shapes()
        for param in params:
            name = self.names.get(param.name)
            if name is None or name not in shapes:
                raise QKGuardError(
                    f"the base {self.weights.folder} has no tensor for {param.name}; "
                    "expected the checkpoint that the tuned model started from"
                )
            if shapes[name] != param.shape:
                raise QKGuardError(
                    f"{name} has shape {list(shapes[name])} in the base {self.weights.folder} but {list(param.shape)} "
                    "in the tuned model; expected the checkpoint that the tuned model started from"
                )
            self.weights.dtype(name)

    def get(self, param: ParamMap, /) -> Tensor:
        if param.name not in self.names:
            self.check([param])
        return self.weights.read(self.names[param.name], param)

    def describe(self) -> dict[str, Any]:
        files = self.weights.files
        return {
            **identify(self.model_id, self.weights.folder),
            "files": {name: {"size": h.size, "header_sha256": h.sha256} for name, h in files.items()},
        }


def identify(name: str, folder: Path) -> dict[str, str]:
    """The hub id (and revision) of a model, read off the cache's folder names if need be, else its path."""
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$", str(folder))
    if cached:
        return {"id": f"{cached[1]}/{cached[2]}", "revision": cached[3]}
    return {"id": name if not os.path.exists(name) else str(Path(name).resolve())}
