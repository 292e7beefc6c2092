"""Forward passes in the middle of a training run that leave nothing behind."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SMALL = 1 << 16  # elements: buffers up to this size are copied, so that a write in place can be undone


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, in which everything is afterwards as it was, also after an exception.

    Restored: every module's training flag (modules may differ from one another), random states (Python, numpy,
    torch on the CPU and on the model's devices), buffers, and the state of rotary embeddings that adapt to the
    sequence length (dynamic NTK, LongRoPE), which a long probe would otherwise carry into the next training step.
    Compiled models run eagerly meanwhile: neither their graphs nor their recompilation count change. Gradient
    checkpointing is inert in evaluation mode. Parameters are not touched.
    """
    with ExitStack() as stack:
        stack.enter_context(random_states({p.device for p in model.parameters()}))
        stack.enter_context(_training_flags(model))
        stack.enter_context(_buffers(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _training_flags(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False  # not .eval(): some modules override it to do more than set flags
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def random_states(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Put back the random states of Python, numpy, torch on the CPU, and torch on the accelerators among `devices`."""
    numpy: Any = sys.modules.get("numpy")
    found = {d for d in devices if d.type not in ("cpu", "meta")}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and any(d.type == accelerator.type for d in found):
        found.add(torch.device(accelerator.type, torch.accelerator.current_device_index()))
    python, cpu = random.getstate(), torch.get_rng_state()
    legacy = numpy.random.get_state() if numpy is not None else None
    others = [(d, torch.get_device_module(d).get_rng_state(d)) for d in found]
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            numpy.random.set_state(legacy)
        for device, state in others:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    kept: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor]]] = []
    attributes: list[tuple[nn.Module, dict[str, Any]]] = []
    for module in model.modules():
        buffers = dict(module._buffers)
        copies = {k: b.detach().clone() for k, b in buffers.items() if b is not None and b.numel() <= _SMALL}
        kept.append((module, buffers, copies))
        if any("inv_freq" in name for name in buffers):
            plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | None | Tensor)}
            attributes.append((module, plain))
    try:
        yield
    finally:
        for module, buffers, copies in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, copy in copies.items():
                if not _same(buffers[name], copy):
                    buffers[name].copy_(copy)  # type: ignore[union-attr]
        for module, plain in attributes:
            vars(module).update(plain)


def _same(buffer: Tensor | None, copy: Tensor) -> bool:
    return buffer is None or bool(torch.equal(buffer, copy))
