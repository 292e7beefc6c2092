"""`qk-pro`: routing as before SFT, and as much of the tuned W_Q as that leaves room for (arXiv 2606.11052).

The problem is min |W_Q - W_Q_post| + |W_K - W_K_post| subject to W_Q^T W_K = W_Q_pre^T W_K_pre. The paper's linearised
solution sets W_K = W_K_pre and corrects W_Q with a ridge, here in the space of each key head, where a ridge of 0 keeps
the routing exactly. Where positions are rotated in or q/k norms scale the heads, the routing matrix is not a constant
of the layer, and it is kept approximately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qkguard.layout.heads import find_heads
from qkguard.layout.spec import AttentionSpec, ParamMap
from qkguard.restore.plain import Restored, restore


def correct_queries(q_pre: Tensor, q_post: Tensor, k_pre: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """W_Q = W_Q_post + G (G + lambda I)^-1 (W_Q_pre - W_Q_post) with G = W_K_pre W_K_pre^T of each key head.

    ridge -> 0 gives W_Q_pre (where W_K_pre has full row rank), ridge -> infinity W_Q_post.

    Args:
        q_pre, q_post: (heads, d_k, n) float64; query head h reads key head `h // (heads // kv_heads)`.
        k_pre: (kv_heads, d_k, n) float64.
        ridge: lambda in units of the mean eigenvalue of each head's G.

    Returns:
        The new queries (heads, d_k, n), and lambda in absolute terms (kv_heads,).
    """
    values, vectors = torch.linalg.eigh(k_pre @ k_pre.mT)
    values = values.clamp_min(0)  # G has no negative eigenvalues; rounding makes small ones
    absolute = ridge * values.mean(-1)
    total = values + absolute[:, None]
    share = torch.where(total > 0, values / total, 0.0)  # G (G + lambda I)^-1 in G's own axes; 0 for 0 / 0
    factor = (vectors * share[:, None, :]) @ vectors.mT
    group = len(q_pre) // len(k_pre)
    return q_post + factor.repeat_interleave(group, 0) @ (q_pre - q_post), absolute


def qk_pro(
    spec: AttentionSpec,
    maps: Sequence[ParamMap],
    pre: Mapping[str, Tensor],
    post: Mapping[str, Tensor],
    *,
    ridge: float = 10.0,
) -> Restored:
    """W_K (and its bias) becomes `pre`, W_Q lies between `pre` and `post` (`correct_queries`).

    Biases: with a query bias, both maps are affine and a bias is one more column, for the input that is always 1
    (zeros where the keys have none). With a key bias alone, the queries have no such column to correct: the key bias
    stays out of G and becomes `pre` like W_K.

    Args:
        spec, maps: the layer and its selected parameters, queries and keys alike.
        pre, post: compact tensors by parameter name, of any float dtype.
        ridge: lambda in units of the mean eigenvalue: 0 is `restore`, large values restore keys only.

    Returns:
        Rows of any float dtype. A layer without W_Q and W_K head by head (`find_heads`: MLA's factored projections,
        keys borrowed from another layer) falls back to `restore`; q/k norm gains, where selected, always become `pre`.
    """
    restored, _ = restore(spec, maps, pre, post)
    heads = find_heads(spec, maps)
    if isinstance(heads, str):
        return Restored(restored, {"fallback": f"restore: {heads}"})
    with_bias = heads.q.bias is not None
    q_pre, q_post = heads.q.read(pre, with_bias), heads.q.read(post, with_bias)
    q, absolute = correct_queries(q_pre, q_post, heads.k.read(pre, with_bias), ridge)
    report = {"ridge": ridge, "ridge_absolute": absolute.tolist()}
    return Restored(restored | heads.q.write(q, pre), report)
