"""Whole files: copied, linked, written durably; and which files travel with a checkpoint's weights."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qkguard.errors import QKGuardError

FICLONE = 0x40049409  # ioctl: share all extents with another file (btrfs, xfs, bcachefs, overlay on them)
COPY_BYTES = 64 << 20
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL

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


def can_clone(source: Path, folder: Path) -> bool:
    """Whether copies of a file in a folder share its extents, and so take no space until they change."""
    with open(source, "rb") as src, tempfile.TemporaryFile(dir=folder) as dst:
        try:
            fcntl.ioctl(dst.fileno(), FICLONE, src.fileno())
        except OSError:
            return False
    return True


def _nobody(count: int) -> None:
    """Where nobody follows a copy."""


def copy_bytes(src: int, dst: int, copied: Callable[[int], None] | None = None) -> None:
    """Copy all bytes between two open files: shared extents, else inside the kernel, else through a buffer.

    `copied` is called with the number of bytes copied since the last call.
    """
    tell = copied or _nobody
    size, done = os.fstat(src).st_size, 0
    try:
        fcntl.ioctl(dst, FICLONE, src)
        tell(size)
        return
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
    try:
        while done < size:
            count = os.copy_file_range(src, dst, min(COPY_BYTES, size - done), done, done)
            if count == 0:
                break
            done += count
            tell(count)
    except AttributeError:  # macOS
        pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
    # Across file systems and on some network ones the kernel declines, at once or half-way.
    while done < size:
        view = memoryview(os.pread(src, min(COPY_BYTES >> 3, size - done), done))
        if not view:
            raise QKGuardError("A file became shorter while it was copied. Let its writer finish and try again.")
        while view:
            count = os.pwrite(dst, view, done)
            view, done = view[count:], done + count
            tell(count)


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
