"""What `from_pretrained` would do with a checkpoint's tensors, asked of it on the meta device: no weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from qkguard.errors import QKGuardError, first_line


class Loading(NamedTuple):
    """What would come of loading.

    Attributes:
        parameters: how many parameters and persistent buffers the model has; tied ones count under each name.
        missing: those that no tensor is loaded into, and that would be random; tied ones are not among them.
        misfits: parameters whose tensor has another shape, with both shapes.
        unused: tensors that find no parameter.
    """

    parameters: int
    missing: list[str]
    misfits: list[str]
    unused: list[str]


def ask_loading(
    shapes: Mapping[str, tuple[int, ...]], config: Any, *, trust_remote_code: bool = False
) -> Loading | None:
    """Load tensors of these names and shapes on the meta device; None for models whose code is not imported.

    Args:
        shapes: name on disk -> shape.
        config: whatever `find_attention` accepts.

    Raises:
        QKGuardError: the model's class cannot be built, or loading fails.
    """
    import torch  # here, because answers are remembered (`cache`) and what reads them needs no torch

    from qkguard.layout.architecture import find_architecture, plain_torch

    model_class, own_config = find_architecture(config, trust_remote_code=trust_remote_code)
    if model_class is None:
        return None
    loader: Any = model_class
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        with plain_torch(), _without_bars():
            model, info = loader.from_pretrained(
                None,
                config=own_config,
                state_dict=state,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,  # counted below
                output_loading_info=True,
            )
    except Exception as error:  # whatever the model's own code does
        raise QKGuardError(f"Loading these tensors with from_pretrained fails: {first_line(error)}") from error
    misfits = [f"{name} ({list(found)} for {list(wanted)})" for name, found, wanted in info["mismatched_keys"]]
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    return Loading(len(model.state_dict()), missing, sorted(misfits), unused)


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
