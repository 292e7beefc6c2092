"""In every process that a test starts: DeepSpeed compiles nothing.

Its all-reduce in shared memory takes a minute of two cores to build, and inference alone calls it, no training.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class NothingToCompile:
    """Lets `deepspeed.ops` load as it is, and then say that none of its operations can be built here."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "deepspeed.ops":
            return None
        spec = PathFinder.find_spec(name, path)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            load = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                vars(module)["__compatible_ops__"] = {}

            loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, NothingToCompile())  # type: ignore[arg-type]
