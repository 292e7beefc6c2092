"""The weights of a checkpoint folder: which files, which tensor where, and a few rows at a time.

`open_weights` looks at a folder the way `from_pretrained` does (one `model.safetensors`, else the index) and refuses
everything it could only guess about. Nothing but headers is read until rows are asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from qkguard.checkpoint.safetensors_io import Header, TensorEntry, read_header, read_rows
from qkguard.errors import QKGuardError
from qkguard.layout.spec import ParamMap

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SINGLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TEMPORARY = "_qkguard-tmp-"
"""How every folder in the making is named; nothing with this name is ever read."""


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

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor; QKGuardError where it is quantised."""
        return self.entry(name).torch_dtype

    def read(self, name: str, param: ParamMap) -> Tensor:
        """The selected rows of a tensor as a compact CPU tensor, in the dtype stored."""
        with opened(self.folder / self.where[name]) as fd:
            return read_rows(fd, self.entry(name), param)


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY):
    """A file descriptor that is closed again."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def open_weights(folder: Path) -> WeightFolder:
    """The weights of a folder, headers checked, every tensor of the index found.

    Args:
        folder: a checkpoint as `save_pretrained` or `Trainer` writes it.

    Raises:
        QKGuardError: no such folder, no full weights in it, a missing, truncated or corrupt file, an index that
            points outside the folder, or pickles.
    """
    if not folder.is_dir():
        raise QKGuardError(f"no such folder: {folder}")
    if folder.name.startswith(TEMPORARY):
        raise QKGuardError(f"{folder} was left half-written by a killed process; delete it")
    if entrance := safetensors_entrance(folder):
        return _open_safetensors(folder, entrance)
    if (folder / PICKLE_SINGLE).is_file() or (folder / PICKLE_INDEX).is_file():
        raise QKGuardError(
            f"{folder} holds its weights as pickles (pytorch_model*.bin), which qkguard does not read: loading them "
            "can run code. Convert them once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise QKGuardError(_why_no_weights(folder))


def safetensors_entrance(folder: Path) -> str | None:
    """The file that `from_pretrained` starts from: one file of weights, or the index of several; None without any."""
    try:
        chosen = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        chosen = None
    if chosen is not None:
        check_inside(chosen, folder / "config.json")
        if not (folder / chosen).is_file():
            raise QKGuardError(f"{folder} lacks {chosen}, which its config names as transformers_weights")
        return chosen if chosen.endswith((".safetensors", ".safetensors.index.json")) else None
    return next((name for name in (SINGLE, INDEX) if (folder / name).is_file()), None)


def _open_safetensors(folder: Path, entrance: str) -> WeightFolder:
    if not entrance.endswith(".json"):
        header = read_header(folder / entrance)
        return WeightFolder(folder, None, {entrance: header}, dict.fromkeys(header.tensors, entrance))
    where = read_index(folder / entrance)
    files = {name: read_header(folder / name) for name in sorted(set(where.values()))}
    if lost := [name for name, file in where.items() if name not in files[file].tensors]:
        raise QKGuardError(
            f"{folder / where[lost[0]]} lacks {lost[0]}, which {entrance} promises ({len(lost)} such tensors); "
            "shards of two checkpoints were mixed or one was cut short: save or download it again"
        )
    return WeightFolder(folder, entrance, files, where)


def check_inside(file: str, named_in: Path) -> None:
    """Refuse a file name that leads out of its folder.

    Lexically, not resolved: the files of a hub snapshot are links into the cache's blobs folder.
    """
    parts = PurePosixPath(file).parts
    if not parts or PurePosixPath(file).is_absolute() or ".." in parts or "\\" in file or "\0" in file:
        raise QKGuardError(f"{named_in} points outside its folder ({file!r}); do not use this checkpoint")


def read_index(path: Path) -> dict[str, str]:
    """The tensor -> file map of a sharded checkpoint; file names must stay inside the index's folder."""
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not where or not all(isinstance(file, str) for file in where.values()):
            raise ValueError("weight_map is not a map from tensor names to file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QKGuardError(f"{path} is not a readable weight index ({error}); download or save it again") from None
    for file in set(where.values()):
        check_inside(file, path)
    if missing := sorted({file for file in where.values() if not (path.parent / file).is_file()}):
        raise QKGuardError(
            f"{path.parent} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more files" if len(missing) > 1 else "")
            + f" named in {path.name}; download or copy the checkpoint again"
        )
    return where


def _why_no_weights(folder: Path) -> str:
    names = {entry.name for entry in folder.iterdir()}
    if "adapter_config.json" in names:
        return (
            f"{folder} is a PEFT adapter, not a full checkpoint; "
            f"`qkguard merge --base BASE --adapter {folder} --out OUT` writes the full model with the base's queries "
            "and keys"
        )
    if any(n.startswith(("global_step", "pytorch_model_fsdp")) or n.endswith(".distcp") for n in names):
        return (
            f"{folder} holds only sharded training state; consolidate it first "
            "(DeepSpeed: zero_to_fp32.py in that folder, FSDP: accelerate merge-weights)"
        )
    if any(n.endswith(".gguf") for n in names):
        return f"{folder} holds GGUF weights, which are quantised; expected {SINGLE} or {INDEX}"
    return f"{folder} holds no weights; expected {SINGLE} or {INDEX}"


def resolve_folder(name: str | os.PathLike[str]) -> Path:
    """A local folder as it is; a hub id through huggingface_hub's cache (weights, configs, tokenizer and code).

    Raises:
        QKGuardError: neither a folder here nor a model the hub or its cache can give.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise QKGuardError(f"{path} is a file; expected the folder of a checkpoint")
    text = str(name)
    if text.count("/") > 1 or text.startswith((".", "/", "~", "_")) or text.endswith("/") or " " in text:
        raise QKGuardError(f"no such folder: {path}")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (OSError, HFValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QKGuardError(
            f"{text} is neither a folder here nor a model on the hub that can be read: {reason}"
        ) from None
