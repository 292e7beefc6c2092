"""A PEFT adapter folder: its config and tensors, checked before anybody relies on them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qkguard.arrays import cast, double, single
from qkguard.checkpoint.safetensors_io import Header, opened, read_header, read_tensor
from qkguard.checkpoint.weights import refuse_temporary, resolve_folder
from qkguard.errors import QKGuardError

ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""How the names of an adapter's tensors begin, before the name that the base model has for the module."""

# Settings of LoraConfig that change what the adapter means in a way that is not reproduced here. The methods of
# initialisation subtract from the base weights at start, so the adapter belongs to a base that is on no disk.
_UNSUPPORTED = (
    *("layer_replication", "megatron_config", "alora_invocation_tokens", "arrow_config"),
    *("use_bdlora", "velora_config", "monteclora_config", "kasa_config", "use_qalora"),
)
_UNMERGEABLE = ("target_parameters", "ensure_weight_tying")  # experts that are fused in memory alone; tied adapters
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk; tensors are read when asked for, by the names of PEFT's file format."""

    folder: Path
    config: Mapping[str, Any]
    header: Header

    @property
    def base(self) -> str | None:
        """The base model its config names."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.header.tensors.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """All tensors, as numpy arrays."""
        with opened(self.folder / ADAPTER_TENSORS) as fd:
            return {name: read_tensor(fd, entry) for name, entry in self.header.tensors.items()}


def open_adapter(name: str | os.PathLike[str], *, merging: bool = True) -> Adapter:
    """Open a LoRA adapter: a folder as PEFT writes it, or a hub id; without `merging` more settings are accepted.

    Raises:
        QKGuardError: not an adapter, not LoRA, a setting that cannot be reproduced, or tensors that are empty or cut
            into pieces (written under ZeRO-3 without gathering).
    """
    folder = resolve_folder(name)
    refuse_temporary(folder)
    config = read_adapter_config(folder)
    if not (folder / ADAPTER_TENSORS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise QKGuardError(
                f"{folder} holds its adapter as a pickle (adapter_model.bin). Load and save it with PEFT."
            )
        raise QKGuardError(f"{folder} has no {ADAPTER_TENSORS}. Save the adapter again.")
    adapter = Adapter(folder, config, read_header(folder / ADAPTER_TENSORS))
    check_config(config, str(folder), merging=merging)
    check_tensors(adapter.shapes, str(folder))
    return adapter


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        config["peft_type"]
    except FileNotFoundError:
        raise QKGuardError(f"{folder} is not a PEFT adapter: it has no {ADAPTER_CONFIG}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QKGuardError(
            f"{folder / ADAPTER_CONFIG} is not a readable adapter config ({error}). Save it again."
        ) from None
    return config


def check_config(config: Mapping[str, Any], where: str, *, merging: bool) -> None:
    """Refuse, by name, what is not reproduced here; some settings stand in the way of merging alone."""
    kind = str(getattr(config["peft_type"], "value", config["peft_type"]))
    if kind != "LORA":
        raise QKGuardError(f"{where} is a {kind} adapter: only LoRA (with rsLoRA and DoRA) is supported.")
    for name in _UNSUPPORTED + (_UNMERGEABLE if merging else ()):
        if config.get(name):
            what = "cannot be merged here. Merge it with PEFT." if name in _UNMERGEABLE else "is not supported."
            raise QKGuardError(f"{where} uses {name}={config[name]!r}, which {what}")
    if config.get("bias", "none") != "none":
        raise QKGuardError(f"{where} trains the base's biases (bias={config['bias']!r}), which is not supported.")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise QKGuardError(
            f"{where} was started with init_lora_weights={start!r}, which changes the base weights. Convert it to a "
            "plain LoRA adapter first (path_initial_model_for_weight_conversion in PEFT's save_pretrained)."
        )


def check_tensors(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse empty tensors and flattened LoRA factors: parameters that were not gathered before they were saved."""
    if not shapes:
        raise QKGuardError(f"{where} holds no tensors: the adapter was not gathered when it was saved.")
    broken = [
        name
        for name, shape in shapes.items()
        if 0 in shape
        or (".lora_" in name and "magnitude" not in name and not name.endswith("bias") and len(shape) < 2)
    ]
    if broken:
        raise QKGuardError(
            f"{where}: {len(broken)} of {len(shapes)} tensors are empty or were cut into pieces, first {broken[0]} "
            f"{list(shapes[broken[0]])}: the parameters were not gathered before saving (ZeRO-3, FSDP). Save the "
            "adapter again from gathered parameters."
        )


def loadable_name(key: str) -> str:
    """A name that transformers' `load_adapter` reads like PEFT; under PEFT's own it loses DoRA's magnitudes."""
    return f"{key}.weight" if key.endswith(".lora_magnitude_vector") else key


def scale_rows(rows: np.ndarray, ranges: Iterable[Sequence[int]], factor: float) -> np.ndarray:
    """A copy with ranges of its rows multiplied, rounded once as torch does it; 0 also clears NaN and -0."""
    scaled = rows.copy()
    wide = double if rows.dtype == np.float64 else single
    for lo, hi in ranges:
        some = wide(rows[lo:hi])
        scaled[lo:hi] = cast(some * some.dtype.type(factor), rows.dtype) if factor else 0
    return scaled
