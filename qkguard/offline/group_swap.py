"""Groups of weights put into a loaded model from the base, and back from the tuned files, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.arrays import as_tensor, same_bits, sha256_of
from qkguard.checkpoint.scaled import read_whole, scale_names
from qkguard.checkpoint.weights import WeightFolder
from qkguard.choice.attribution import Attribution, attribute, states_to_measure
from qkguard.choice.groups import Part, find_groups, weights_of
from qkguard.choice.task import TaskResult
from qkguard.choice.verdict import Measurement
from qkguard.errors import QKGuardError
from qkguard.layout.conversions import Conversions, Loading
from qkguard.layout.spec import AttentionSpec
from qkguard.offline.pair import Folders
from qkguard.probe.results import ProbeResult
from qkguard.probe.settings import Progress

Measure = Callable[[nn.Module, str], tuple[ProbeResult, TaskResult | None]]
"""Recall and task quality of a model as it is now; the second argument labels the progress bar."""


class GroupSwap:
    """A model loaded from the tuned folder whose groups of weights can be the base's or the tuned ones.

        with GroupSwap(model, folders, specs) as swap:
            swap.take_from_base({"qk"})  # the base's queries and keys, everything else tuned
            ...

    What the files hold goes through transformers' own conversions (`layout.conversions`), so a parameter made of many
    tensors (experts) is loaded as `from_pretrained` does. Beside the model, one parameter with its tensors is in
    memory, and for a moment the next. Leaving the block puts the tuned weights back, also after an exception, and
    checks their bits.

    Args:
        model: the tuned checkpoint, loaded whole and unquantised.
        folders: both checkpoints.
        specs: the model's attention layers.
        include_norms, shared: as in `RowSelection`, for `find_groups`.
        progress: called with (loads done, loads in all) while both checkpoints are read and compared.

    Attributes:
        groups: those of `find_groups`.
        changed: the short names of those in which the two checkpoints differ.
        warnings: sentences on what of the base has no place in the model, or the other way round.

    Raises:
        QKGuardError: weights that are offloaded or quantised, or that the base has in another shape.
    """

    def __init__(
        self,
        model: nn.Module,
        folders: Folders,
        specs: Sequence[AttentionSpec],
        *,
        include_norms: bool = False,
        shared: str = "keep",
        progress: Progress | None = None,
    ) -> None:
        self.live = weights_of(model)
        for name, tensor in self.live.items():
            if tensor.is_meta:
                raise QKGuardError(
                    f"{name} is offloaded to disk, so it cannot be swapped. Use a larger device, or cpu."
                )
            if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
                raise QKGuardError(
                    f"{name} is quantised ({tensor.dtype}), so it cannot be swapped. Save it unquantised."
                )
        self.groups = find_groups(model, specs, include_norms=include_norms, shared=shared)
        self.warnings: list[str] = []
        conversions = Conversions(model)
        self._embeddings = embedding_names(model)
        self._tuned = _Side(folders.tuned, conversions, self.live)
        self._base = _Side(folders.base, conversions, self.live)
        self._kept: dict[str, Tensor] = {}  # what the tuned files do not give bit for bit
        self._digests: dict[str, str] = {}
        self._from_base: set[str] = set()
        self.changed = self._compare(progress)

    def take_from_base(self, keys: Iterable[str]) -> None:
        """Let these groups (of `changed`) be the base's, and all others the tuned ones."""
        wanted = self.changed & set(keys)
        back, out = self._from_base - wanted, wanted - self._from_base
        self._from_base |= out  # before a write may fail half-way
        self._put(self._base, out)
        self._put(self._tuned, back)
        self._from_base -= back

    def __enter__(self) -> GroupSwap:
        return self

    def __exit__(self, *error: object) -> None:
        """Put the tuned weights back.

        Raises:
            QKGuardError: the weights are not the bits they were.
        """
        self.take_from_base(())
        for name, digest in self._digests.items():
            if _digest(self.live[name]) != digest:
                raise QKGuardError(f"{name} did not return to its own bits. Report this, and load the model again.")

    def _compare(self, progress: Progress | None) -> set[str]:
        """Read both checkpoints once: in which groups do they differ? What the tuned files do not give is kept."""
        loads = len(self._tuned.loadings) + len(self._base.loadings)
        for done, (name, tensor) in enumerate(self._tuned.all(), 1):
            if not same_bits(self.live[name], tensor.to(self.live[name])):
                self._kept[name] = self.live[name].to("cpu", copy=True)
            if progress:
                progress(min(done, loads), loads)
        parts = self._parts(group.key for group in self.groups)
        changed: set[str] = set()
        found: set[str] = set()
        for done, (name, tensor) in enumerate(self._base.all(), len(self._tuned.loadings) + 1):
            found.add(name)
            live, new = self.live[name], self._fitted(name, tensor)
            differ = {key for key, part in parts[name] if not same_bits(part.take(live), part.take(new))}
            changed |= differ
            if differ:
                self._digests[name] = _digest(live)
            if progress:
                progress(min(done, loads), loads)
        self._note_missing([name for name in self._tuned.names if name not in found])
        return changed

    def _note_missing(self, missing: Sequence[str]) -> None:
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            self.warnings.append(
                f"the base has no {missing[0]}{more}: what only the tuned checkpoint has stays as it is in every group"
            )
        if self._base.beside:
            self.warnings.append(
                f"the base has a {self._base.beside[0]} of its own, which the tuned model ties to another weight: it "
                "is left out"
            )

    def _fitted(self, name: str, new: Tensor) -> Tensor:
        """A base's tensor in the shape and dtype of the model's; where the vocabulary differs, its rows in common."""
        live = self.live[name]
        if new.shape == live.shape:
            return new.to(live)
        if name not in self._embeddings or new.shape[1:] != live.shape[1:]:
            raise QKGuardError(
                f"{name} has shape {list(new.shape)} in the base and {list(live.shape)} in the tuned model, so its "
                "group cannot be swapped. Give the checkpoint that the tuned model started from."
            )
        rows = min(len(new), len(live))
        said = (
            f"{name} has {len(new)} rows in the base and {len(live)} in the tuned model: the first {rows} are swapped"
        )
        if said not in self.warnings:
            self.warnings.append(said)
        whole = live.clone()
        whole[:rows] = new[:rows].to(live)
        return whole

    def _put(self, side: _Side, keys: set[str]) -> None:
        """Write the parts of some groups from one side."""
        parts = self._parts(keys)
        with torch.no_grad():
            for name, tensor in side.some(parts):
                new = self._kept.get(name) if side is self._tuned else None
                new = self._fitted(name, tensor) if new is None else new
                for _, part in parts[name]:
                    part.put(self.live[name], new.to(self.live[name]))

    def _parts(self, keys: Iterable[str]) -> dict[str, list[tuple[str, Part]]]:
        """Tensor -> (group, part) of the groups."""
        wanted = set(keys)
        parts: dict[str, list[tuple[str, Part]]] = {}
        for group in self.groups:
            for part in group.parts if group.key in wanted else ():
                parts.setdefault(part.name, []).append((group.key, part))
        return parts


class _Side:
    """One checkpoint as tensors of the model, by their names in `live`."""

    def __init__(self, weights: WeightFolder, conversions: Conversions, live: Mapping[str, Tensor]) -> None:
        self.weights, self.conversions = weights, conversions
        storage = scale_names(weights)
        self.loadings = list(conversions.loadings(key for key in weights.where if key not in storage))
        own = {loading.target for loading in self.loadings}
        self._first = _first_names(conversions.model)
        # A tied tensor that is stored under several names counts under the model's own name for it
        twice = [one for one in self.loadings if self._first_name(one.target) in own - {one.target}]
        self.loadings = [one for one in self.loadings if one not in twice]
        self.beside = [one.target for one in twice if not self._same(one)]
        self.live = live
        self._makes: dict[str, list[str]] = {}
        self._copies = self._tied_here(own)

    @property
    def names(self) -> list[str]:
        """The model's tensors that the checkpoint gives; known once all were read."""
        return [name for names in self._makes.values() for name in names]

    def all(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model that the checkpoint gives."""
        for loading in self.loadings:
            made = self._load(loading)
            self._makes[loading.target] = list(made)
            yield from made.items()

    def some(self, names: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Those of these names, after `all`."""
        for loading in self.loadings:
            if any(name in names for name in self._makes[loading.target]):
                yield from ((name, tensor) for name, tensor in self._load(loading).items() if name in names)

    def _load(self, loading: Loading) -> dict[str, Tensor]:
        made = self.conversions.load(loading, self._read)
        named = {self._first_name(name): tensor for name, tensor in made.items()}
        named |= {copy: named[name] for name, copy in self._copies.items() if name in named}
        return {name: tensor for name, tensor in named.items() if name in self.live}

    def _first_name(self, name: str) -> str:
        return self._first.get(name, name)

    def _tied_here(self, own: set[str]) -> dict[str, str]:
        """Input -> output embedding, where the model has two and the checkpoint, which ties them, one."""
        names = embedding_names(self.conversions.model)
        if len(names) < 2 or names[0] not in own or names[1] in own:
            return {}
        return {names[0]: names[1]}

    def _read(self, key: str) -> Tensor:
        return as_tensor(read_whole(self.weights, key))

    def _same(self, loading: Loading) -> bool:
        """Whether a tied tensor's second copy is the first's bytes."""
        first = next(one for one in self.loadings if one.target == self._first_name(loading.target))
        return self.weights.same_bytes(loading.sources[0].key, first.sources[0].key)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name in `state_dict()` -> the one that `weights_of` has for it."""
    by_id: dict[int, str] = {}
    return {name: by_id.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def embedding_names(model: Any) -> list[str]:
    """The weights that have a row for every token: the input embedding's, and the output's where it is another one."""
    held = [
        getattr(module, "weight", None) for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    ids = [id(weight) for weight in held if weight is not None]
    found = {id(param): name for name, param in model.named_parameters()}
    return [found[number] for number in dict.fromkeys(ids) if number in found]


def _digest(tensor: Tensor) -> str:
    return sha256_of(tensor.cpu())


def measure_groups(
    model: nn.Module, swap: GroupSwap, measure: Measure, base: Measurement, raw: Measurement, seed: int
) -> Attribution:
    """Recall and task quality with each group from the base, and with all but each; the model is afterwards as it was.

    Args:
        model: the one that `swap` was made for.
        measure: as `base` and `raw`, the whole checkpoints, were measured.
        seed: of the bootstrap.
    """
    states = states_to_measure(swap.changed)
    found: dict[frozenset[str], Any] = {}
    with swap:
        for number, state in enumerate(states, 1):
            swap.take_from_base(state)
            found[state] = measure(model, f"{number}/{len(states)} groups of weights")
    return attribute(swap.groups, swap.changed, found, base, raw, seed)
