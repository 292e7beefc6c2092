"""The weights of a checkpoint folder: which files, which tensor where, and a few rows at a time.

`open_weights` looks at a folder the way `from_pretrained` does (one `model.safetensors`, else the index) and refuses
everything it could only guess about. It reads every header once; nothing else is read until rows are asked for.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from qkguard.arrays import bytes_of, has_nonfinite
from qkguard.checkpoint.safetensors_io import (
    FLOATS,
    Header,
    TensorEntry,
    opened,
    read_exactly,
    read_header,
    read_rows,
)
from qkguard.checkpoint.scaled import describe_quantisation, find_scaled
from qkguard.errors import QKGuardError
from qkguard.layout.hub_id import split_revision
from qkguard.layout.spec import ParamMap

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TEMPORARY = "_qkguard-tmp-"
"""How the name of every folder in the making starts; nothing inside one is ever read."""
SCAN_BYTES = 4 << 20  # small enough to stay in the cache between the read and the look for extremes


@dataclass(frozen=True)
class WeightFolder:
    """Tensors of a checkpoint in one or several safetensors files, by their names on disk.

    `index` is the name of the index file, where there is one; `where` maps tensors to files, whose names are relative
    to the folder.
    """

    folder: Path
    index: str | None
    files: Mapping[str, Header]
    where: Mapping[str, str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.entry(name).shape for name in self.where}

    def entry(self, name: str) -> TensorEntry:
        return self.files[self.where[name]].tensors[name]

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor; QKGuardError where it is quantised."""
        return self.entry(name).float_dtype

    def read(self, name: str, param: ParamMap) -> np.ndarray:
        """The selected rows of a tensor as a compact array, in the dtype stored."""
        with opened(self.folder / self.where[name]) as fd:
            return read_rows(fd, self.entry(name), param)

    def read_elements(self, name: str, spans: Iterable[tuple[int, int]]) -> np.ndarray:
        """Some of a tensor's flattened elements, one half-open range after the other, as 1-D in the dtype stored."""
        entry, spans = self.entry(name), list(spans)
        out = np.empty(sum(stop - start for start, stop in spans), dtype=entry.float_dtype)
        view, size, position = bytes_of(out), entry.float_dtype.itemsize, 0
        with opened(self.folder / self.where[name]) as fd:
            for start, stop in spans:
                count = (stop - start) * size
                read_exactly(fd, view[position : position + count], entry.start + start * size, name)
                position += count
        return out

    def same_bytes(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape, dtype and bytes; a few MB are in memory at a time."""
        a, b = self.entry(one), self.entry(other)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        with opened(self.folder / self.where[one]) as left, opened(self.folder / self.where[other]) as right:
            for offset in range(0, a.stop - a.start, SCAN_BYTES):
                chunks = [bytearray(min(SCAN_BYTES, a.stop - a.start - offset)) for _ in range(2)]
                read_exactly(left, memoryview(chunks[0]), a.start + offset, one)
                read_exactly(right, memoryview(chunks[1]), b.start + offset, other)
                if chunks[0] != chunks[1]:
                    return False
        return True

    def check(
        self,
        params: Iterable[ParamMap],
        names: Mapping[str, str],
        whose: str,
        advice: str,
        readable: Callable[[str], object] | None = None,
    ) -> None:
        """Refuse parameters that the folder lacks or holds in another shape or quantised.

        Args:
            params: what will be read.
            names: parameter name -> tensor name (`layout.disk_names`).
            whose, advice: for the message: what the folder is, and what was expected of it.
            readable: refuses a tensor that cannot be read; by default every quantised one (`dtype`).

        Raises:
            QKGuardError: naming the first such parameter.
        """
        for param in params:
            name = names.get(param.name)
            if name is None or name not in self.where:
                raise QKGuardError(f"{whose} {self.folder} has no tensor for {param.name}: {advice}.")
            if self.entry(name).shape != param.shape:
                raise QKGuardError(
                    f"{name} has shape {list(self.entry(name).shape)} in {whose} {self.folder}, expected "
                    f"{list(param.shape)}: {advice}."
                )
            (readable or self.dtype)(name)


def open_weights(folder: Path, headers: Mapping[str, Header] | None = None) -> WeightFolder:
    """The weights of a folder, headers checked, every tensor of the index found.

    Args:
        folder: a checkpoint as `save_pretrained` or `Trainer` writes it.
        headers: those of its files that the caller has read already.

    Raises:
        QKGuardError: no such folder, no full weights in it, a missing, truncated or corrupt file, an index that
            points outside the folder, or pickles.
    """
    index, where = weight_map(folder)
    known = headers or {}
    files = {name: known.get(name) or read_header(folder / name) for name in sorted(set(where.values()))}
    if index is None:
        (file,) = files
        where = dict.fromkeys(files[file].tensors, file)
    elif lost := [name for name, file in where.items() if name not in files[file].tensors]:
        raise QKGuardError(
            f"{folder / where[lost[0]]} lacks {lost[0]}, which {index} promises ({len(lost)} such tensors): shards of "
            "two checkpoints were mixed, or one was cut short. Save or download it again."
        )
    return WeightFolder(folder, index, files, where)


def weight_map(folder: Path) -> tuple[str | None, dict[str, str]]:
    """(name of the index, tensor -> file) without reading a header; a folder of one file has no index and one entry.

    Raises:
        QKGuardError: as `open_weights`, as far as names tell.
    """
    if not folder.is_dir():
        raise QKGuardError(f"There is no such folder: {folder}.")
    refuse_temporary(folder)
    start = starting_file(folder)
    if start is None:
        raise QKGuardError(_why_no_weights(folder))
    if start.endswith(".json"):
        return start, read_index(folder / start)
    return None, {"": start}


def refuse_temporary(folder: Path) -> None:
    """Refuse a folder in the making: its maker still writes it, or was killed."""
    if any(part.startswith(TEMPORARY) for part in (folder.name, folder.parent.name)):
        raise QKGuardError(f"{folder} was left half-written by a killed process. Delete it.")


def starting_file(folder: Path) -> str | None:
    """The file that `from_pretrained` starts from: one file of weights, or the index of several; None without any."""
    try:
        chosen = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        chosen = None
    if chosen is not None:
        check_inside(chosen, folder / "config.json")
        if not (folder / chosen).is_file():
            raise QKGuardError(f"{folder} lacks {chosen}, which its config names as transformers_weights.")
        return chosen if chosen.endswith((".safetensors", ".safetensors.index.json")) else None
    return next((name for name in (SINGLE_FILE, INDEX_FILE) if (folder / name).is_file()), None)


def check_inside(file: str, named_in: Path) -> None:
    """Refuse a file name that leads out of its folder.

    Lexically, not resolved: the files of a hub snapshot are links into the cache's blobs folder.
    """
    parts = PurePosixPath(file).parts
    if not parts or PurePosixPath(file).is_absolute() or ".." in parts or "\\" in file or "\0" in file:
        raise QKGuardError(f"{named_in} points outside its folder ({file!r}). Do not use this checkpoint.")


def read_index(path: Path) -> dict[str, str]:
    """The tensor -> file map of a sharded checkpoint; file names must stay inside the index's folder."""
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not where or not all(isinstance(file, str) for file in where.values()):
            raise ValueError("weight_map is not a map from tensor names to file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QKGuardError(f"{path} is not a readable weight index ({error}). Download or save it again.") from None
    for file in set(where.values()):
        check_inside(file, path)
    if missing := sorted({file for file in where.values() if not (path.parent / file).is_file()}):
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise QKGuardError(
            f"{path.parent} lacks {missing[0]}{more}, named in {path.name}. Download or copy the checkpoint again."
        )
    return where


def _why_no_weights(folder: Path) -> str:
    names = {entry.name for entry in folder.iterdir()}
    if names & set(PICKLES):
        return (
            f"{folder} holds its weights as pickles (pytorch_model*.bin), which qkguard does not read: loading them "
            "can run code. Convert them once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    if "adapter_config.json" in names:
        return (
            f"{folder} is a PEFT adapter, not a full checkpoint. `qkguard merge --base BASE --adapter {folder} --out "
            "OUT` writes the full model with the base's queries and keys."
        )
    if any(n.startswith(("global_step", "pytorch_model_fsdp")) or n.endswith(".distcp") for n in names):
        return (
            f"{folder} holds only sharded training state. Consolidate it first (DeepSpeed: zero_to_fp32.py in that "
            "folder, FSDP: accelerate merge-weights)."
        )
    if any(n.endswith(".gguf") for n in names):
        return f"{folder} holds GGUF weights, which are quantised: expected {SINGLE_FILE} or {INDEX_FILE}."
    return f"{folder} holds no weights: expected {SINGLE_FILE} or {INDEX_FILE}."


def resolve_folder(name: str | os.PathLike[str]) -> Path:
    """A local folder as it is; a hub id through huggingface_hub's cache (weights, configs, tokenizer and code).

    A hub id may name a revision: `org/model@v1.0`.

    Raises:
        QKGuardError: neither a folder here nor a model the hub or its cache can give.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise QKGuardError(f"{path} is a file: expected the folder of a checkpoint.")
    text, revision = split_revision(str(name))
    if text.count("/") > 1 or text.startswith((".", "/", "~", "_")) or text.endswith("/") or " " in text:
        raise QKGuardError(f"There is no such folder: {path}.")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*"]
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QKGuardError(
            f"{name} is neither a folder here nor a model on the hub that can be read: {reason}"
        ) from None


class BaseRows(Protocol):
    """The query and key rows before SFT: a base checkpoint's folder (`BaseFolder`) or a run's reference file."""

    def get(self, param: ParamMap, /) -> np.ndarray:
        """The compact array of one parameter: in the dtype held at step 0 where there was a step 0, else as
        stored. The writer rounds it to the raw file's dtype."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON values for the manifest: at least "id", the base model's hub id or folder."""
        ...


@dataclass(frozen=True)
class BaseFolder:
    """`BaseRows` from a base checkpoint's own files, read a parameter at a time; quantised ones come as float32
    (`scaled`).

    Attributes:
        weights: the base folder, opened by `open_weights`.
        names: parameter name -> tensor name in the base files (`layout.disk_names`).
        model_id: what the user called the base: a hub id or a folder; None is the folder.
    """

    weights: WeightFolder
    names: Mapping[str, str]
    model_id: str | None = None

    def check(self, params: Iterable[ParamMap]) -> None:
        """Fail before anything is copied if one of these parameters cannot be read."""
        advice = "expected the checkpoint that the tuned model started from"
        self.weights.check(params, self.names, "the base", advice, partial(find_scaled, self.weights))

    def get(self, param: ParamMap, /) -> np.ndarray:
        name = self.names[param.name]
        scaled = find_scaled(self.weights, name)
        return self.weights.read(name, param) if scaled is None else scaled.read(param)

    def describe(self) -> dict[str, Any]:
        folder, files = self.weights.folder, self.weights.files
        quantised = describe_quantisation(folder)
        return {
            **identify(self.model_id or str(folder), folder),
            **({"quantised": quantised} if quantised else {}),
            "files": {name: {"size": h.size, "header_sha256": h.sha256} for name, h in files.items()},
        }


def identify(name: str, folder: Path) -> dict[str, str]:
    """The hub id (and revision) of a model, read off the cache's folder names if need be, else its path."""
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$", str(folder))
    if cached:
        return {"id": f"{cached[1]}/{cached[2]}", "revision": cached[3]}
    return {"id": name if not os.path.exists(name) else str(Path(name).resolve())}


class NonfiniteScan:
    """Looks for NaN and Inf in all weights of a folder, on a thread of its own, while the main one copies and patches.

    Use as a context manager: leaving it stops the scan. Quantised and integer tensors are skipped.
    """

    def __init__(self, weights: WeightFolder) -> None:
        self._weights, self._stop = weights, threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._found = self._pool.submit(self._scan)

    def result(self) -> list[str]:
        """Names of the tensors that hold NaN or Inf; waits for the scan to end."""
        return self._found.result()

    def __enter__(self) -> NonfiniteScan:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def _scan(self) -> list[str]:
        found = []
        for file, header in self._weights.files.items():
            with opened(self._weights.folder / file) as fd:
                for entry in header.tensors.values():
                    if entry.dtype in FLOATS and any(has_nonfinite(chunk) for chunk in self._chunks(fd, entry)):
                        found.append(entry.name)
        return found

    def _chunks(self, fd: int, entry: TensorEntry) -> Iterator[np.ndarray]:
        buffer = np.empty(min(SCAN_BYTES, entry.stop - entry.start), dtype=np.uint8)
        for start in range(entry.start, entry.stop, SCAN_BYTES):
            if self._stop.is_set():
                return
            chunk = buffer[: entry.stop - start]
            read_exactly(fd, bytes_of(chunk), start, entry.name)
            yield chunk.view(FLOATS[entry.dtype])
