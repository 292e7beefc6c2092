"""`procrustes`: the pre-SFT queries and keys, rotated towards the tuned ones without changing what they attend to.

A rotation that queries and keys of a head share leaves their dot products as they are if it commutes with everything
between projection and dot product. Which rotations do is a matter of the layer: all where nothing lies between, one
angle per frequency under rotary positions, fewer or none where q/k norms scale channels unequally.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkguard.layout.heads import LayerHeads, find_heads, short_name
from qkguard.layout.spec import AttentionSpec, ParamMap
from qkguard.restore.plain import Restored, restore


@dataclass(frozen=True)
class Rotations:
    """The rotations of a head that leave attention scores unchanged at all distances.

    `free` are channels that may be mixed at will, `pairs` channels that rotary positions turn together, each pair
    by an angle of its own. `name` is "orthogonal", "phases" or "identity"; `why` says what decided it.
    """

    name: str
    free: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    why: str = ""


def allowed_rotations(spec: AttentionSpec, gains: Mapping[str, Tensor]) -> Rotations:
    """Which rotations a layer allows.

    Args:
        spec: its geometry.
        gains: gains of its q/k norms as they will be, compact, by parameter name.

    Returns:
        No positions and no norms: all ("orthogonal"). Rotary positions: an angle for each frequency, and all rotations
        of the channels without positions ("phases"). Norms: the same if every gain is equal on the channels that are
        mixed; only norms with one gain vector per role count, which in transformers are those that do not subtract
        the mean. None ("identity") otherwise, where the kind of positions is not known, and where layers share keys.
    """
    if spec.rotary is None:
        return Rotations("identity", why="how positions enter is not known")
    if spec.shares_keys:
        return Rotations("identity", why="other layers may read the same keys")
    rotations = _rotary_rotations(spec)
    unfit = _uneven_gains(spec, gains, rotations)
    return Rotations("identity", why=unfit) if unfit else rotations


def _rotary_rotations(spec: AttentionSpec) -> Rotations:
    """Which rotations commute with a layer's rotary positions."""
    channels = tuple(range(spec.head_dim))
    if spec.rotary == "none" or spec.rotary_dim == 0:
        return Rotations("orthogonal", free=channels, why="no positions between projection and dot product")
    first, count = spec.rotary_start, spec.rotary_dim // 2
    if spec.rotary == "half":
        pairs = tuple((first + i, first + i + count) for i in range(count))
    else:
        pairs = tuple((first + 2 * i, first + 2 * i + 1) for i in range(count))
    free = channels[:first] + channels[first + spec.rotary_dim :]
    why = f"rotary positions on {spec.rotary_dim} of {spec.head_dim} channels ({spec.rotary})"
    return Rotations("phases", free=free, pairs=pairs, why=why)


def _uneven_gains(spec: AttentionSpec, gains: Mapping[str, Tensor], rotations: Rotations) -> str | None:
    """Why the q/k norms do not commute with these rotations; None where they do or there are none."""
    norms = [p for p in spec.params if p.kind == "norm"]
    for role in "qk":
        mine = [p for p in norms if any(role in block.role for block in p.blocks)]
        if len(mine) > 1 or any(len(p.shape) != 1 for p in mine):
            return f"the norms {', '.join(map(short_name, mine))} have more than one gain vector per role"
    for param in norms:
        if param.name not in gains:
            return f"the gains of {short_name(param)} are not at hand"
        gain = gains[param.name].double()
        if gain.numel() % spec.head_dim:
            return f"{short_name(param)} has {gain.numel()} gains for heads of {spec.head_dim}"
        by_head = gain.view(-1, spec.head_dim)
        for together in (rotations.free, *rotations.pairs):
            mixed = by_head[:, list(together)]
            if not bool((mixed == mixed[:, :1]).all()):
                return f"the gains of {short_name(param)} differ between channels that a rotation would mix"
    return None


def closest_rotation(pre: Tensor, post: Tensor, rotations: Rotations) -> Tensor:
    """The allowed rotation O of each head that minimises |O pre - post|_F.

    Among all orthogonal ones: U V^T from the singular value decomposition of post pre^T (orthogonal Procrustes;
    Schoenemann 1966). For a pair of channels as a complex number: the phase of sum(conj(pre) post).

    Args:
        pre, post: (kv_heads, d_k, m) float64, the rows of a key head beside those of its query heads.

    Returns:
        (kv_heads, d_k, d_k) float64.
    """
    out = torch.eye(pre.shape[1], dtype=pre.dtype, device=pre.device).repeat(len(pre), 1, 1)
    if rotations.free:
        free = torch.tensor(rotations.free, device=pre.device)
        u, _, vh = torch.linalg.svd(post[:, free] @ pre[:, free].mT)
        out[:, free[:, None], free] = u @ vh
    if rotations.pairs:
        a, b = torch.tensor(rotations.pairs, device=pre.device).T
        real = (pre[:, a] * post[:, a] + pre[:, b] * post[:, b]).sum(-1)
        imaginary = (pre[:, a] * post[:, b] - pre[:, b] * post[:, a]).sum(-1)
        phase = torch.atan2(imaginary, real)  # 0 where both are 0: no rotation
        out[:, a, a] = out[:, b, b] = phase.cos()
        out[:, a, b], out[:, b, a] = -phase.sin(), phase.sin()
    return out


def rotate_towards(
    heads: LayerHeads, pre: Mapping[str, Tensor], post: Mapping[str, Tensor], rotations: Rotations
) -> tuple[Tensor, Tensor]:
    """O W_Q_pre (heads, d_k, n) and O W_K_pre (kv_heads, d_k, n) with the O of `closest_rotation`, in float64."""
    (q_pre, k_pre), (q_post, k_post) = heads.read(pre), heads.read(post)
    rotation = closest_rotation(_side_by_side(q_pre, k_pre), _side_by_side(q_post, k_post), rotations)
    return rotation.repeat_interleave(len(q_pre) // len(k_pre), 0) @ q_pre, rotation @ k_pre


def procrustes(
    spec: AttentionSpec,
    maps: Sequence[ParamMap],
    pre: Mapping[str, Tensor],
    post: Mapping[str, Tensor],
    *,
    gains: Mapping[str, Tensor] | None = None,
) -> Restored:
    """O W_Q_pre and O W_K_pre (and their biases): the nearest to `post` among rotations that change no score.

    In effect `restore`, to rounding; its use is as the alignment of `interpolate`.

    Args:
        spec, maps: the layer and its selected parameters, queries and keys alike.
        pre, post: compact tensors by parameter name, of any float dtype.
        gains: gains of the layer's q/k norms that are not selected (`allowed_rotations`).

    Returns:
        float64 rows. Where no rotation is allowed (`allowed_rotations`), or a layer has no W_Q and W_K head by head
        (`find_heads`), it falls back to `restore` (the identity). Norm gains, where selected, become `pre`.
    """
    restored, _ = restore(spec, maps, pre, post)
    heads = find_heads(spec, maps)
    if isinstance(heads, str):
        return Restored(restored, {"group": "identity", "fallback": f"restore: {heads}"})
    norms = {param.name: pre[param.name] for param in maps if param.kind == "norm"}
    rotations = allowed_rotations(spec, {**(gains or {}), **norms})
    if rotations.name == "identity":
        return Restored(restored, {"group": "identity", "fallback": f"restore: {rotations.why}"})
    q, k = rotate_towards(heads, pre, post, rotations)
    return Restored(restored | heads.write(q, k, pre), {"group": rotations.name, "because": rotations.why})


def _side_by_side(q: Tensor, k: Tensor) -> Tensor:
    """(kv_heads, d_k, (group + 1) n): a key head's rows beside those of the queries that read it."""
    kv, d, n = k.shape
    return torch.cat([q.view(kv, -1, d, n).transpose(1, 2).reshape(kv, d, -1), k], -1)
