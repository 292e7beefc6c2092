"""Which query and key weights of a live PEFT model carry adapters, and the factors these are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from qkguard.adapters.files import check_config
from qkguard.distributed import collectives, sharding
from qkguard.errors import QKGuardError
from qkguard.layout.selection import Selection
from qkguard.layout.spec import ParamMap

QUANTISED = ("Params4bit", "Int8Params")  # bitsandbytes


@dataclass(frozen=True)
class Factors:
    """One active adapter of one weight, in float64 on the CPU: the weight moves by `b @ a`, before DoRA's norms.

    `a` is (rank, inputs), `b` (outputs, rank) with the scaling in it, `magnitude` (outputs,) for DoRA, else None.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


@dataclass(frozen=True)
class AdaptedWeight:
    """A query or key weight, the PEFT layer around it (None without adapters), and the base module that owns it."""

    pmap: ParamMap
    layer: Any
    owner: Any

    @property
    def quantised(self) -> bool:
        return not self.owner.weight.is_floating_point()

    @property
    def adapters(self) -> list[str]:
        """Active adapters on it, in PEFT's order.

        `lora_A`, `lora_variant` and `scaling`, here and below, are undocumented attributes of PEFT's LoRA layers (read
        in 0.21): `get_delta_weight` gives only their dense product, which the drift formulas avoid.
        """
        if self.layer is None or self.layer.disable_adapters:
            return []
        return [name for name in self.layer.active_adapters if name in self.layer.lora_A]

    @property
    def dora(self) -> bool:
        return any(name in self.layer.lora_variant for name in self.adapters)

    @property
    def inputs(self) -> int:
        return self.pmap.shape[1 - self.pmap.dim]

    def base(self, param: Any) -> Any:
        """The base weight that the forward pass works with; a 4/8-bit one dequantised for the moment."""
        return param if param.is_floating_point() else _dequantised(self.owner)

    def params(self) -> list[Any]:
        """The adapters' parameters, in the order of `factors`."""
        out = []
        for name in self.adapters:
            out += [self.layer.lora_A[name].weight, self.layer.lora_B[name].weight]
            if name in self.layer.lora_variant:
                out.append(self.layer.lora_magnitude_vector[name].weight)
        return out

    def factors(self, full: list[Tensor]) -> list[Factors]:
        """Factors from the full tensors of `params`."""
        out, tensors = [], iter(full)
        for name in self.adapters:
            a, b = next(tensors), next(tensors)
            magnitude = next(tensors).reshape(-1) if name in self.layer.lora_variant else None
            out.append(Factors(a, b * self.layer.scaling[name], magnitude))
        return out


def adapted_weights(model: Any, selection: Selection, *, merging: bool = False) -> list[AdaptedWeight]:
    """Every query and key weight of the selection with its PEFT layer; with `merging` the adapters must be mergeable.

    On every rank by itself: it looks at names and types, not at values.

    Raises:
        QKGuardError: queries or keys are trained beside or instead of LoRA (modules_to_save, unfrozen base weights,
            trained biases), or by another PEFT method.
    """
    for name, config in model.peft_config.items():
        check_config(config.to_dict(), f"the adapter {name!r}", merging=merging)
    live = dict(model.named_parameters())
    sharding.check_supported(model, [p.name for _, params in selection for p in params])
    out = []
    for _, params in selection:
        for pmap in params:
            param = live[pmap.name]
            if param.requires_grad:
                raise QKGuardError(
                    f"{pmap.name} is trained whole (modules_to_save, or unfrozen) in a model with adapters. Leave "
                    "queries and keys to LoRA, or train without PEFT."
                )
            if not param.is_floating_point() and (type(param).__name__ not in QUANTISED or sharding.is_sharded(param)):
                raise QKGuardError(
                    f"{pmap.name} is held as {type(param).__name__} of {param.dtype}, which cannot be read. Expected "
                    "a base in 16 or 32 bits, or in bitsandbytes' 4 or 8 without ZeRO-3. Without the guard, `qkguard "
                    "merge` still works afterwards."
                )
            if pmap.kind != "weight":
                continue
            path, found, _ = pmap.name.rpartition(".base_layer.weight")
            layer: Any = model.get_submodule(path) if found else None
            for name in getattr(layer, "lora_variant", {}):
                if not layer.use_dora.get(name):
                    variant = type(layer.lora_variant[name]).__name__
                    raise QKGuardError(f"{path} uses {variant}: expected LoRA or DoRA.")
            out.append(AdaptedWeight(pmap, layer, model.get_submodule(pmap.name.rpartition(".")[0])))
    return out


def _dequantised(module: Any) -> Tensor:
    """The weight of a bitsandbytes layer in its full shape, with nothing of the layer's state changed."""
    weight = module.weight
    if type(weight).__name__ == "Int8Params":  # PEFT's function moves the scales, which training still needs
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.detach().float() * scale.float()[:, None] / 127
    # An undocumented helper of PEFT's (read in 0.21): the dequantisation that its own merge relies on
    return dequantize_module_weight(module).detach()


def replicate(params: list[Any]) -> list[Tensor]:
    """Full tensors of small parameters in float64 on the CPU of every rank; ALL ranks must call this.

    One all-reduce, and only where the parameters are sharded.
    """
    if not any(map(sharding.is_sharded, params)):
        return [p.detach().double().cpu() for p in params]
    sizes = [sharding.full_numel(p) for p in params]
    joined = torch.zeros(sum(sizes), dtype=torch.float64)
    for param, part in zip(params, joined.split(sizes), strict=True):
        start, stop = sharding.shard_span(param)
        part[start:stop] = sharding.read(param, (start, stop)).double().cpu()
    parts = collectives.all_reduce_sum(joined).split(sizes)  # every element is one rank's value plus zeros: exact
    return [part.view(sharding.full_shape(p)) for part, p in zip(parts, params, strict=True)]
