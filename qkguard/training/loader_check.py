"""Are the weights that training starts with those of their own checkpoint? A loader may have left some random.

Queries and keys are compared whole, every other parameter by a few of its elements.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from torch import Tensor

from qkguard.arrays import as_tensor
from qkguard.checkpoint.reference_file import ReferenceFile, differing_from_base
from qkguard.checkpoint.safetensors_io import FLOATS
from qkguard.checkpoint.weights import BaseFolder, WeightFolder, identify, open_weights
from qkguard.distributed import ranks
from qkguard.distributed.samples import ParamSample, sample_params
from qkguard.errors import QKGuardError, WrongReferenceError
from qkguard.layout import ParamMap
from qkguard.layout.names import DiskTensor, single_tensors, tensors_of_params
from qkguard.layout.wrappers import bare_name
from qkguard.report.numbers import plural

DIFFERING_SHARE = 0.25
"""Of a parameter's sample: a random one differs nearly everywhere, a vocabulary with some rows set anew hardly."""
FAR = 0.5
"""Relative distance of a sample from the stored one: of a random parameter it is 1 or more, of one that an adapter was
merged into a few hundredths."""
ANOTHER_MODEL = 0.9
"""Share of the parameters from which on the weights are another revision's, not those of a loader that failed."""


def plan_comparison(model: Any, maps: Sequence[ParamMap], *, live: bool) -> Comparison | str | None:
    """What to compare the starting weights with: the checkpoint they came from, if it is local; ALL ranks.

    A loader that silently leaves weights random (seen with hybrids under ZeRO-3) must not go unnoticed. Everything
    that needs the model happens here; `Comparison.run` reads files alone, and may do so while the model trains.

    Args:
        maps: which rows are queries and keys.
        live: the user does not want the comparison.

    Returns:
        On rank 0 the comparison, or a clause that says why there is none; None on the others.
    """
    if live:
        return "not compared with any checkpoint (base_model: live)"
    samples = sample_params(model)
    return ranks.held_by(0, "opening the base checkpoint", partial(_plan, model, maps, samples))


def loaded_from(model: Any) -> str | None:
    """The folder or hub id that a model's weights were loaded from; ALL ranks must call this.

    Of several revisions in the hub's cache it is the one that has these weights; None where none has.
    """
    name = model_name(model)
    folders, certain = ranks.on_rank_zero("looking for the base checkpoint", partial(local_checkpoints, model))
    if not folders:
        commit = getattr(model.config, "_commit_hash", None)
        return f"{name}@{commit}" if commit else name
    if certain or len(folders) == 1:
        return str(folders[0])
    find = partial(_snapshot_of, model, folders, sample_params(model))
    return ranks.on_rank_zero("finding the revision of the base", find)


def _snapshot_of(model: Any, folders: Sequence[Path], samples: Mapping[str, ParamSample]) -> str | None:
    for local in folders:
        try:
            found = _differences(_open(local, model, ()), None, samples, _output_embedding(model))
        except QKGuardError:
            continue
        if found.equal and not found.share:
            return str(local)
    return None


def model_name(model: Any) -> str | None:
    """What the model was loaded from. transformers has no public name for it (5.17 to 5.23)."""
    return getattr(model.config, "_name_or_path", None) or None


@dataclass
class _Differences:
    """The starting weights beside one checkpoint's.

    Attributes:
        wrong_qk: names of the query and key parameters that differ.
        random, changed: names of other parameters that are far from the stored ones, and of those that are near them.
        new_head: the output embedding, where it differs: it may have been made anew on purpose.
        equal, unmapped: how many are equal; how many the checkpoint does not hold in their own form.
        unread: why queries and keys were not compared.
    """

    folder: Path
    wrong_qk: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    new_head: str | None = None
    equal: int = 0
    unmapped: int = 0
    unread: str | None = None

    @property
    def share(self) -> float:
        """Of the parameters compared, how many differ."""
        differing = len(self.random) + len(self.changed)
        return differing / max(1, differing + self.equal)


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint that the weights may have come from, its headers read.

    Attributes:
        folder, weights: where it is.
        loaded: bare parameter name -> the tensors it is loaded from.
        source: its query and key rows; None where it has none in their own form.
        unread: why it has none.
        maps: which rows these are.
    """

    folder: Path
    weights: WeightFolder
    loaded: Mapping[str, Sequence[DiskTensor]]
    source: BaseFolder | None
    unread: str | None
    maps: Sequence[ParamMap]


@dataclass(frozen=True)
class Comparison:
    """The starting weights, and the checkpoints that they may have come from (one process).

    Attributes:
        name: what the model was loaded from.
        certain: whether they came from the only candidate.
        candidates: those whose files can be read.
        samples: of every parameter, by name.
        head: the name of the output embedding, which may have been made anew on purpose.
    """

    name: str
    certain: bool
    candidates: Sequence[_Candidate]
    samples: Mapping[str, ParamSample]
    head: str | None

    def run(self, reference: Path) -> str:
        """Compare; `reference` is the folder with the starting queries and keys. Reads files, and nothing else.

        Returns:
            A clause that says what was compared.

        Raises:
            WrongReferenceError: weights differ.
        """
        found = [_differences(one, reference, self.samples, self.head) for one in self.candidates]
        best = min(found, key=_differing)
        if not self.certain and best.share >= ANOTHER_MODEL:
            return (
                f"not compared with a checkpoint (transformers does not tell which revision of {self.name} was "
                f"loaded, and {'it is not the one' if len(found) == 1 else 'it is none of those'} in the cache)"
            )
        guarded = len(self.candidates[0].maps)
        _refuse_differences(best, guarded)
        return _what_was_compared(self.name, best, guarded)


def _plan(model: Any, maps: Sequence[ParamMap], samples: Mapping[str, ParamSample]) -> Comparison | str:
    """`plan_comparison` in one process."""
    folders, certain = local_checkpoints(model)
    if not folders:
        return "not compared with a checkpoint (none on this machine)"
    if getattr(model.config, "quantization_config", None) is not None or any(folders[0].glob("*.gguf")):
        return "not compared with the base checkpoint (it is quantised)"
    candidates = []
    for local in folders:
        try:
            candidates.append(_open(local, model, maps))
        except QKGuardError as error:
            unreadable = str(error).rstrip(".")
    if not candidates:
        return f"not compared with the base checkpoint ({unreadable})"
    return Comparison(str(model_name(model)), certain, candidates, samples, _output_embedding(model))


def _differing(found: _Differences) -> int:
    return len(found.wrong_qk) + len(found.random) + len(found.changed)


def local_checkpoints(model: Any) -> tuple[list[Path], bool]:
    """Where the files that a model was loaded from may be on this machine, and whether that is certain.

    A folder is certain, and so is a commit of a hub model where the config names it (transformers 5.17; 5.23 keeps
    none). Else it is one of the snapshots in the hub's cache, or none of them.
    """
    name = model_name(model)
    if not name:
        return [], True
    if os.path.isdir(name):
        return [Path(name)], True
    commit = getattr(model.config, "_commit_hash", None)
    try:
        if commit:
            config = try_to_load_from_cache(name, "config.json", revision=commit)
            return [Path(config).parent] if isinstance(config, str) else [], True
        cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
        return sorted(found.parent for found in cache.glob("*/config.json")), False
    except (ValueError, OSError):  # not a hub id
        return [], True


def _open(local: Path, model: Any, maps: Sequence[ParamMap]) -> _Candidate:
    """Read one folder's headers; QKGuardError where it holds no weights that can be read."""
    weights = open_weights(local)
    shapes = weights.shapes()
    loaded = tensors_of_params(model, shapes)
    try:
        source = BaseFolder(weights, single_tensors(maps, loaded, shapes), model_id=str(local))
        source.check(maps)
    except QKGuardError as error:
        return _Candidate(local, weights, loaded, None, str(error).rstrip("."), maps)
    return _Candidate(local, weights, loaded, source, None, maps)


def _differences(
    candidate: _Candidate, reference: Path | None, samples: Mapping[str, ParamSample], head: str | None
) -> _Differences:
    """Compare with one folder; queries and keys by their samples alone where there is no `reference` to read."""
    found = _Differences(candidate.folder, unread=candidate.unread)
    if candidate.source is not None and reference is not None:
        try:
            found.wrong_qk = differing_from_base(ReferenceFile(reference), candidate.source, candidate.maps)
        except WrongReferenceError:
            raise
        except QKGuardError as error:
            found.unread = str(error).rstrip(".")
    weights, guarded = candidate.weights, {pmap.name for pmap in candidate.maps}
    for name, sample in samples.items():
        keys = _same_tensors(sample, candidate.loaded.get(bare_name(name), ()), weights)
        if not keys:
            found.unmapped += 1
            continue
        distance = min(_distance(sample, as_tensor(weights.read_elements(key, sample.spans))) for key in keys)
        if not distance:
            found.equal += 1
        elif name == head:
            found.new_head = name
        elif name not in guarded or found.unread is not None:
            (found.random if distance > FAR else found.changed).append(name)
    return found


def _output_embedding(model: Any) -> str | None:
    """The name of the output embedding, where it is not the input embedding too."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None or weight is getattr(model.get_input_embeddings(), "weight", None):
        return None
    return next((name for name, param in model.named_parameters() if param is weight), None)


def _same_tensors(sample: ParamSample, tensors: Sequence[DiskTensor], weights: WeightFolder) -> list[str]:
    """The tensors on disk that are this parameter in its own form: not rearranged, resized or quantised."""
    keys = [tensor.key for tensor in tensors if not tensor.rearranged]
    return [key for key in keys if weights.entry(key).shape == sample.shape and weights.entry(key).dtype in FLOATS]


def _distance(sample: ParamSample, stored: Tensor) -> float:
    """How far a sample is from the stored values, relative to these; 0 where nearly all are equal.

    Equal means: once cast to its dtype, directly or through half precision.
    """
    for first in (sample.dtype, torch.bfloat16, torch.float16):
        cast = stored.to(first).to(sample.dtype).double()
        differs = (cast != sample.values) & ~(cast.isnan() & sample.values.isnan())
        if differs.double().mean() <= DIFFERING_SHARE:
            return 0.0
    apart = (sample.values - stored.double()).norm() / stored.double().norm()
    return float(apart) if apart == apart else inf  # NaN where either holds NaN, or both are zero


def _refuse_differences(found: _Differences, guarded: int) -> None:
    what = []
    if found.wrong_qk:
        what.append(f"{len(found.wrong_qk)} of {guarded} query/key parameters")
    if found.random:
        sampled = len(found.random) + len(found.changed) + found.equal
        what.append(f"{len(found.random)} of {sampled} parameters that were sampled")
    if what:
        raise WrongReferenceError(
            f"{' and '.join(what)} differ from their own checkpoint {found.folder}, first "
            f"{(found.wrong_qk or found.random)[0]}: the loader did not fill them, or they were changed after "
            "loading. Load them correctly. If the change is meant, save the model to a folder and load it from there, "
            'or set base_model="live".'
        )


def _what_was_compared(name: str, found: _Differences, guarded: int) -> str:
    notes = []
    if found.unmapped:
        notes.append(
            f"{plural(found.unmapped, 'parameter')} not compared, being on disk in another form or not at all"
        )
    if found.unread is not None:
        notes.append(f"queries and keys not compared: {found.unread}")
    if found.changed:
        changed = plural(len(found.changed), "parameter")
        notes.append(f"{changed} changed a little since loading, first {found.changed[0]}")
    if found.new_head is not None:
        notes.append(f"{found.new_head} differs from it, as a head made anew does")
    about = identify(name, found.folder)
    where = about["id"] + (f"@{about['revision'][:12]}" if "revision" in about else "")
    return f"equal to {where}" + (f" ({'; '.join(notes)})" if notes else "")
