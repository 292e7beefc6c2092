"""What a replay's gradients should not be fooled by: saturation that cuts them off, statistics that tie all rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from qkguard.layout.materialise import map_tensors


class StraightThrough(TorchFunctionMode):
    """Lets gradients pass clipping, rectifying and rounding.

    Rows whose outputs happen to be clipped for every token (OLMo's and DBRX's `clip_qkv`) would else look unused.
    """

    CUT = frozenset({"clamp", "clip", "clamp_min", "clamp_max", "hardtanh", "relu", "round", "floor", "ceil"})

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args else None
        if name.removesuffix("_") not in self.CUT or not isinstance(x, Tensor) or not x.is_floating_point():
            return func(*args, **kwargs)
        if not name.endswith("_"):
            return x + (func(*args, **kwargs) - x).detach()
        return x.copy_(x + (func(x.detach().clone(), *args[1:], **kwargs) - x).detach())


class FixedStatistics(StraightThrough):
    """Also treats means, variances and norms as constants of the graph.

    q/k normalisation ties every row to every other one of its group through the statistics; with them held fixed, a
    row reaches only the channels that it is multiplied into.
    """

    NAMES = frozenset(
        {
            "mean",
            "var",
            "std",
            "rsqrt",
            "sqrt",
            "norm",
            "vector_norm",
            "linalg_norm",
            "linalg_vector_norm",
            "max",
            "amax",
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            return map_tensors(func(*args, **kwargs), lambda tensor: tensor.detach())
        if name in ("rms_norm", "layer_norm"):
            return _fixed_norm(name, *args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)


def _fixed_norm(
    name: str,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    if name == "layer_norm":
        x = x - x.detach().mean(dims, keepdim=True)
    x = x * (x.detach().pow(2).mean(dims, keepdim=True) + (eps or 1e-6)).rsqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
