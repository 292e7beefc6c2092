"""Copies begun before it is known which files change: while a model's code is imported, which takes seconds."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from qkguard.checkpoint.copying import Copies, can_clone
from qkguard.checkpoint.staging import Staging
from qkguard.checkpoint.weights import WeightFolder
from qkguard.checkpoint.write import readable_errors

MOST_FILES = 128  # each stays open, twice, until it is patched


class HeadStart:
    """Copies of all weight files, begun before it is known which of them change; leaving the block discards them.

    Attributes:
        staging, copies: for `prepare` and `write_files`; None until `begin`.
    """

    def __init__(self, weights: WeightFolder, out: Path) -> None:
        self.weights, self.out = weights, out
        self.staging: Staging | None = None
        self.copies: Copies | None = None
        self._stack = ExitStack()

    def begin(self) -> None:
        """Start copying, unless it has begun, or there is no space for files that may turn out not to be needed."""
        if self.staging is not None:
            return
        files = sorted(self.weights.files, key=self._largest_first)
        with readable_errors(self.out):
            self.staging = self._stack.enter_context(Staging(self.out))
            folder = self.staging.folder
            need = sum(header.size for header in self.weights.files.values())
            if need > shutil.disk_usage(folder).free and not can_clone(self.weights.folder / files[0], folder):
                self._stack.close()
                self.staging = None
                return
            self.copies = self._stack.enter_context(Copies(self.weights.folder, folder, at_once=True))
            for name in files[:MOST_FILES]:
                self.copies.start(name)

    def _largest_first(self, name: str) -> tuple[int, str]:
        return -self.weights.files[name].size, name

    def __enter__(self) -> HeadStart:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
