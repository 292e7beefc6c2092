"""One layer through one method: its options, its rows in the dtype they will be kept in, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qkguard.arrays import Array, as_array, as_tensor, has_nonfinite
from qkguard.drift import head_weights, projection_drift, routing_drift
from qkguard.errors import QKGuardError
from qkguard.layout.spec import AttentionSpec, ParamMap
from qkguard.restore.plain import Restored
from qkguard.restore.registry import Method, layer_options


def restore_layer(
    method: Method,
    options: Mapping[str, Any],
    spec: AttentionSpec,
    maps: Sequence[ParamMap],
    pre: Mapping[str, Array],
    post: Mapping[str, Array],
    *,
    gains: Mapping[str, Array] | None = None,
    device: str = "cpu",
    compare: bool = True,
) -> Restored:
    """New rows of one layer in the dtypes of `post`, and the layer's entry in the manifest.

    Args:
        method, options: as from `check_options`.
        spec, maps: the layer and its selected parameters.
        pre, post: compact numpy arrays or CPU tensors by parameter name; `restore` does without `post`.
        gains: for methods that rotate, the compact gains of q/k norms that are not selected.
        device: where the float64 arithmetic runs.
        compare: measure the new weights against those before and after SFT, for the manifest; it takes about as long
            as the method itself.

    Returns:
        Rows of the kind that `post` is; `restore` hands back those of `pre` themselves. The report has what the method
        says ("group", "ridge_absolute", "fallback", ...), "distance" (relative Frobenius distance of the new weights
        from those before and after SFT) and "routing_error" (`routing_drift` of the new weights from before SFT, over
        heads).

    Raises:
        QKGuardError: NaN or Inf in `post`, for methods that mix it in.
    """
    if not method.computes:
        return method.function(spec, maps, pre, post)
    as_arrays = any(isinstance(rows, np.ndarray) for rows in post.values())
    pre, post = _tensors(pre), _tensors(post)
    broken = [name for name, rows in post.items() if has_nonfinite(as_array(rows.detach().contiguous()))]
    if broken:
        raise QKGuardError(
            f"{broken[0]} holds NaN or Inf after SFT, which {method.name} would mix in; find out why, or use method "
            "restore, which takes nothing from it"
        )
    mine = layer_options(method, options, spec.layer)
    if method.needs_gains(mine):
        mine["gains"] = _tensors(gains or {}, device)
    new = method.function(spec, maps, _tensors(pre, device), _tensors(post, device), **mine)
    rows = {name: found.to(post[name].dtype).cpu() for name, found in new.rows.items()}
    report = new.report | (_distances(spec, maps, pre, post, rows) if compare else {})
    return Restored({name: as_array(found) for name, found in rows.items()} if as_arrays else rows, report)


def _tensors(rows: Mapping[str, Array], device: str = "cpu") -> dict[str, Any]:
    """The same as torch tensors, whose linear algebra the methods need; this is where torch is imported."""
    return {name: as_tensor(found).to(device) for name, found in rows.items()}


def check_device(device: str) -> str:
    """The device itself; QKGuardError where float64 arithmetic does not run on it."""
    if device == "cpu":
        return device
    import torch

    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise QKGuardError(
            f"Device {device!r} does no float64 arithmetic here ({reason}); expected cpu or cuda"
        ) from None
    return device


def _distances(
    spec: AttentionSpec,
    maps: Sequence[ParamMap],
    pre: Mapping[str, Array],
    post: Mapping[str, Array],
    new: dict[str, Array],
) -> dict[str, Any]:
    before = {name: found.to(new[name].dtype) for name, found in pre.items()}
    from_before, from_tuned = projection_drift(maps, before, new), projection_drift(maps, post, new)
    distance = {}
    for where, drift in (("before", from_before), ("tuned", from_tuned)):
        distance.update({f"{role}_from_{where}": drift[f"{role}_rel"] for role in "qk" if f"{role}_rel" in drift})
    out: dict[str, Any] = {"distance": distance}
    now, then = head_weights(spec, maps, new), head_weights(spec, maps, before)
    if now and then:
        errors = routing_drift(now[0], then[0], now[1], then[1]).tolist()
        out["routing_error"] = {"mean": sum(errors) / len(errors), "max": max(errors)}
    return out
