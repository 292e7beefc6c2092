"""`interpolate`: a point on the line between tuned and pre-SFT queries and keys (as WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from qkguard.layout.heads import find_heads
from qkguard.layout.spec import AttentionSpec, ParamMap
from qkguard.restore.plain import Restored, restore
from qkguard.restore.procrustes import allowed_rotations, rotate_towards


def mix(post: Tensor, pre: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) post + alpha pre in float64; the very tensor at either end."""
    if alpha in (0.0, 1.0):  # not 0 * post: it would keep NaN and lose the sign of zeros
        return pre if alpha else post
    return (1 - alpha) * post.double() + alpha * pre.double()


def interpolate(
    spec: AttentionSpec,
    maps: Sequence[ParamMap],
    pre: Mapping[str, Tensor],
    post: Mapping[str, Tensor],
    *,
    alpha: float = 1.0,
    align: bool = False,
    gains: Mapping[str, Tensor] | None = None,
) -> Restored:
    """Every selected row becomes (1 - alpha) post + alpha pre.

    Args:
        spec, maps: the layer and its selected parameters.
        pre, post: compact tensors by parameter name, of any float dtype.
        alpha: 0 is the tuned model, 1 is `restore` (with `align`: `procrustes`, which attends alike).
        align: rotate `pre` towards `post` first (`procrustes`): the average of two equivalent but rotated weights is
            not equivalent to either. Needs queries and keys alike.
        gains: gains of the layer's q/k norms that are not selected; `align` needs them.

    Returns:
        float64 rows. Where `align` finds no rotation that the layer allows, or no W_Q and W_K head by head, it mixes
        unaligned and says so.
    """
    goal, report = restore(spec, maps, pre, post)
    report["alpha"] = alpha
    if align:
        norms = {p.name: mix(post[p.name], pre[p.name], alpha) for p in maps if p.kind == "norm"}
        aligned, said = _aligned(spec, maps, pre, post, {**(gains or {}), **norms})
        goal |= aligned
        report |= said
    return Restored({name: mix(post[name], rows, alpha) for name, rows in goal.items()}, report)


def _aligned(
    spec: AttentionSpec,
    maps: Sequence[ParamMap],
    pre: Mapping[str, Tensor],
    post: Mapping[str, Tensor],
    gains: Mapping[str, Tensor],
) -> Restored:
    """`pre` rotated towards `post`; no rows where nothing may be rotated."""
    heads = find_heads(spec, maps)
    if isinstance(heads, str):
        return Restored({}, {"group": "identity", "fallback": f"unaligned: {heads}"})
    rotations = allowed_rotations(spec, gains)
    if rotations.name == "identity":
        return Restored({}, {"group": "identity", "fallback": f"unaligned: {rotations.why}"})
    q, k = rotate_towards(heads, pre, post, rotations)
    return Restored(heads.write(q, k, pre), {"group": rotations.name, "because": rotations.why})
