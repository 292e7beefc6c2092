"""What travels with the weights: tokenizer, configs, chat templates, model code, licences; never training state."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

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


def auxiliary_files(raw: Path) -> tuple[list[str], list[str]]:
    """(files to copy, files left out) of a checkpoint folder, as paths relative to it.

    At the top everything but weights and training state is taken; from subfolders (templates, packages of model code)
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


def _foreign(folder: Path) -> bool:
    holds_a_model = any((folder / name).exists() for name in ("config.json", "adapter_config.json", "qkguard.json"))
    return folder.is_symlink() or holds_a_model or _matches(folder.name, FOREIGN_FOLDERS)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
