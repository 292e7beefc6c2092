"""transformers' own steps from the tensors on disk to those of a model: what is renamed, and what is cut or joined.

Not public, but what `from_pretrained` itself converts with (transformers 5.17 to 5.23): asked, never imitated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from qkguard.errors import QKGuardError, first_line
from qkguard.layout.wrappers import bare_name


class Source(NamedTuple):
    """A tensor on disk, and the pattern of the conversion that it goes through; None where it is loaded as it is."""

    key: str
    pattern: str | None


@dataclass(frozen=True)
class Loading:
    """Tensors on disk that are loaded together, into the tensor `target` of a model, or into several beside it."""

    target: str
    sources: tuple[Source, ...]


class Conversions:
    """How the tensors of a checkpoint become those of `model`, of a class of transformers; it may be on "meta"."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model: Any = model
        transforms = get_model_conversion_mapping(self.model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._state = self.model.state_dict()

    def target(self, key: str) -> tuple[str, str | None]:
        """The name in the model that a tensor on disk is loaded under, and the pattern of its conversion."""
        from transformers.core_model_loading import rename_source_key

        bare, prefix = bare_name(key), self.model.base_model_prefix
        target, pattern = rename_source_key(bare, self._renamings, self._converters, prefix, self._state)
        if target not in self._state and bare in self._state:
            target, pattern = rename_source_key(bare, [], [], prefix, self._state)
        return target, pattern

    def targets(self, key: str) -> list[str]:
        """The names of all tensors of the model that a tensor on disk has a part in; empty where it has none."""
        target, pattern = self.target(key)
        names = [target]
        if pattern is not None:
            converter = next(c for c in self._converters if pattern in c.source_patterns)
            first, *others = converter.target_patterns
            names += [target.replace(first, other) for other in others]
        return [name for name in names if name in self._state]

    def loadings(self, keys: Iterable[str]) -> Iterator[Loading]:
        """What is loaded together, in the order in which `from_pretrained` reads; keys of no tensor are left out."""
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, list[Source]] = {}
        for key in sorted(keys, key=dot_natural_key):
            target, pattern = self.target(key)
            if target in self._state:
                found.setdefault(target, []).append(Source(key, pattern))
        for target, sources in found.items():
            yield Loading(target, tuple(sources))

    def load(self, loading: Loading, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The model's tensors by name that a loading makes of what `read` gives for its keys.

        Raises:
            QKGuardError: the conversion fails.
        """
        pattern = loading.sources[0].pattern
        if pattern is None:
            return {loading.target: read(loading.sources[0].key)}
        converter = deepcopy(next(c for c in self._converters if pattern in c.source_patterns))
        for source in loading.sources:
            # Read when the conversion asks for it, as where transformers loads without threads
            later: Any = _Later(read, source.key)
            converter.add_tensor(loading.target, source.key, source.pattern or pattern, later)
        try:
            made = converter.convert(loading.target, model=self.model, config=self.model.config)
        except Exception as error:  # whatever the model's own conversion does
            raise QKGuardError(
                f"{loading.target} cannot be loaded as transformers does: {first_line(error)}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class _Later:
    """Reads a tensor when it is called."""

    read: Callable[[str], Tensor]
    key: str

    def __call__(self) -> Tensor:
        return self.read(self.key)
