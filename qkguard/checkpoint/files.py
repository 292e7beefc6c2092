"""Whole files: copied, linked, written durably; and which files travel with a checkpoint's weights."""

from __future__ import annotations

import errno
import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qkguard.checkpoint.copying import CREATE, copy_bytes

TRAINING = [
    "optimizer*",
    "scheduler*",
    "scaler.pt",
    "rng_state*",
    "random_states*",
    "trainer_state.json",
    "training_args.*",
    "latest",
    "zero_to_fp32.py",
    "*_results.json",
    "events.out.*",
    "*.distcp",
    "*.log",
    "*.lock",
]
WEIGHTS = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx",
    "*.npz",
    "adapter_config.json",
]
OWN = ["README.md", "qkguard.json"]
FOREIGN_FOLDERS = [
    "_*",
    ".*",
    "checkpoint-*",
    "global_step*",
    "pytorch_model_fsdp*",
    "optimizer_*",
    "qk_restored",
    "runs",
    "logs",
    "wandb",
    "trackio",
    "mlruns",
    "original",
    "onnx",
]
TEXT = {".py", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe", ".yaml", ".yml"}


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes and make them durable; the mode follows the umask, not the source."""
    with open(source, "rb") as src, os.fdopen(os.open(target, CREATE, 0o666), "r+b") as dst:
        copy_bytes(src.fileno(), dst.fileno())
        os.fsync(dst.fileno())


def copy_named(source: Path, target: Path) -> None:
    """`copy_file` into a folder that may not exist yet."""
    target.parent.mkdir(parents=True, exist_ok=True)
    copy_file(source, target)


def link_or_copy(source: Path, target: Path) -> bool:
    """Hard-link a file, or copy it where that fails; True where it was linked.

    A link is the source's own file under another name, mode bits included: they are the user's and stay as they are.
    """
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        copy_file(source, target)
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:  # some network file systems do not know it for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write a small file and make it durable."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_json(file: Path) -> Any:
    """What a JSON file holds; None if there is no such file."""
    return json.loads(file.read_text()) if file.exists() else None


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write and fsync a JSON file through a temporary name, so that it is there whole or not at all."""
    partial = path.with_name(f"_{path.name}.partial")
    with open(partial, "w") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def auxiliary_files(raw: Path) -> tuple[list[str], list[str]]:
    """(files to copy, files left out) of a checkpoint folder, as paths relative to it.

    What travels with the weights: tokenizer, configs, chat templates, model code, licences; never training state. At
    the top everything but weights and training state is taken; from subfolders (templates, packages of model code)
    only text files. Folders of other checkpoints and of loggers are not entered.
    """
    taken: list[str] = []
    left: list[str] = []
    for folder, subfolders, files in os.walk(raw):
        here = Path(folder)
        subfolders[:] = sorted(d for d in subfolders if not _foreign(here / d))
        for name in sorted(files):
            path = (here / name).relative_to(raw)
            if name.startswith(".") or _matches(name, OWN):
                continue
            fits = not _matches(name, TRAINING + WEIGHTS) and (here == raw or path.suffix in TEXT)
            (taken if fits else left).append(path.as_posix())
    return taken, left


def copy_auxiliary(raw: Path, target: Path) -> list[str]:
    """Copy what travels with the weights of a checkpoint folder; returns the names."""
    names = auxiliary_files(raw)[0]
    for name in names:
        copy_named(raw / name, target / name)
    return names


def _foreign(folder: Path) -> bool:
    holds_a_model = any((folder / name).exists() for name in ("config.json", "adapter_config.json", "qkguard.json"))
    return folder.is_symlink() or holds_a_model or _matches(folder.name, FOREIGN_FOLDERS)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
