"""What wrappers put into parameter names, and names without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from qkguard.errors import QKGuardError

# Wrappers that add a level to parameter names and change nothing: torch.compile, activation checkpointing, FSDP1,
# Lightning Fabric.
TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
PREFIXES = ("module.", "base_model.model.")  # DDP and DeepSpeed's engine, PEFT
ADAPTER_PARTS = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "modules_to_save"}
)


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers put in: torch.compile, DDP, checkpointing, FSDP1, PEFT."""
    name = ".".join(part for part in name.split(".") if part not in TRANSPARENT and part != "base_layer")
    while True:  # wrappers nest
        shorter = name
        for prefix in PREFIXES:
            shorter = shorter.removeprefix(prefix)
        if shorter == name:
            return name
        name = shorter


def wrapped_names(keys: Iterable[str]) -> dict[str, str]:
    """Names on disk that a wrapper left its mark in -> the names that `from_pretrained` loads them by.

    Raises:
        QKGuardError: two tensors would get one name, or there are an adapter's tensors among them, which
            `from_pretrained` would leave out.
    """
    keys = list(keys)
    adapted = [key for key in keys if ADAPTER_PARTS.intersection(key.split("."))]
    if adapted:
        raise QKGuardError(
            f"The checkpoint holds {len(adapted)} tensors of a PEFT adapter among its own, first {adapted[0]}: "
            "from_pretrained would leave them out. Merge the adapter first (merge_and_unload), and save that model."
        )
    renamed = {key: bare_name(key) for key in keys if bare_name(key) != key}
    counts = Counter(renamed.get(key, key) for key in keys)
    for key, name in renamed.items():
        if counts[name] > 1:
            raise QKGuardError(
                f"The checkpoint holds {name} under {counts[name]} names, one of them {key}. Save the model again, "
                "without the wrapper."
            )
    return renamed
