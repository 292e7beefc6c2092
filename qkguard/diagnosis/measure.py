"""A model's diagnosis on rows of text: decay lengths, far shares, and their intervals over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qkguard.diagnosis.curves import Curves, Estimate, correlation_length, estimate
from qkguard.diagnosis.logit_gradients import LayerGradients, LogitGradients
from qkguard.diagnosis.self_similarity import self_similarity
from qkguard.errors import QKGuardError
from qkguard.probe.passes import IGNORED, undisturbed
from qkguard.probe.settings import Progress


@dataclass(frozen=True)
class TextRow:
    """One row of text as token ids, and which of them (bool, as many) the loss is of; the first never is."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]

    @property
    def labels(self) -> list[int]:
        """Token ids, `IGNORED` where nothing is to be predicted."""
        return [
            token if wanted and i else IGNORED
            for i, (token, wanted) in enumerate(zip(self.ids, self.scored, strict=True))
        ]

    @property
    def tokens(self) -> int:
        """How many tokens the loss is of."""
        return sum(self.scored[1:])


@dataclass(frozen=True)
class LayerMeasured:
    """One softmax layer: its W_grad, and the share of far keys in the gradients of its W_Q and of its W_K."""

    layer: int
    w_grad: Estimate
    far_share_q: Estimate
    far_share_k: Estimate

    def to_json(self) -> dict[str, Any]:
        """Numbers and lists."""
        names = ("w_grad", "far_share_q", "far_share_k")
        return {"layer": self.layer} | {name: getattr(self, name).to_json() for name in names}


@dataclass(frozen=True)
class Measured:
    """What a text asks of a model.

    Attributes:
        name: what the text is called.
        rows, tokens, scored: how much of it was read; `scored` tokens are those the loss is of.
        w_corr: tokens over which the text resembles itself (`Curves.correlation_length`); 0 where rows agree on no
            more than the same tokens in random order would, NaN for a single row.
        w_grad: tokens over which the gradient on attention logits falls off.
        far_share: of far keys in the gradient of W_Q and W_K: norm of the far part over the sum of both parts' norms.
        layers: the softmax layers, in order.
        similarity: float64 (distances,) excess self-similarity, from distance 1 on.
        gradient: float64 (distances,) root mean square of the gradient by distance, from 0 on; its largest value is 1.
        far_heads, all_heads: float64, per layer (heads,): norm of the gradient of each head's W_Q, from far keys and
            from all, mean over rows; empty for layers whose W_Q is not made head by head.
    """

    name: str
    rows: int
    tokens: int
    scored: int
    w_corr: Estimate
    w_grad: Estimate
    far_share: Estimate
    layers: tuple[LayerMeasured, ...]
    similarity: np.ndarray = field(repr=False)
    gradient: np.ndarray = field(repr=False)
    far_heads: tuple[np.ndarray, ...] = field(repr=False)
    all_heads: tuple[np.ndarray, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts."""
        return {
            "name": self.name,
            "rows": self.rows,
            "tokens": self.tokens,
            "scored_tokens": self.scored,
            **{name: getattr(self, name).to_json() for name in ("w_corr", "w_grad", "far_share")},
            "layers": [
                layer.to_json() | {"heads": {"far": _rounded(far), "all": _rounded(every)}}
                for layer, far, every in zip(self.layers, self.far_heads, self.all_heads, strict=True)
            ],
            "curves": {"similarity": _rounded(self.similarity), "gradient": _rounded(self.gradient)},
        }


def measure(
    model: nn.Module,
    rows: Sequence[TextRow],
    name: str = "data",
    *,
    far: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measured:
    """Self-similarity and attention gradients of rows of text, one forward and backward pass a row.

    Weights, their gradients, buffers, training flags and random states are afterwards as before.

    Args:
        model: a causal language model, in one process; it may be spread over several devices.
        rows: the text, one row after the other: no padding, and no packed rows. The loss of a row is that of its
            scored tokens, summed, over the mean number of scored tokens of all rows: every token counts the same.
        name: what to call the text.
        far: keys more than this many tokens back are far.
        seed: of the intervals.
        progress: called with (rows done, rows in all).

    Raises:
        QKGuardError: no rows, rows with nothing to score, or a model whose attention cannot be followed.
    """
    rows = [row for row in rows if row.tokens]
    if not rows:
        raise QKGuardError(f"{name}: no row has a token to predict; there is nothing to measure.")
    meter = LogitGradients(model, far)
    scale = len(rows) / sum(row.tokens for row in rows)
    similarity, gradients = [], []
    with undisturbed(model):
        for done, row in enumerate(rows, 1):
            ids = torch.tensor(row.ids)
            similarity.append(self_similarity(_embedded(model, ids)))
            gradients.append(meter(ids, torch.tensor(row.labels), scale))
            if progress is not None:
                progress(done, len(rows))
    return _add_up(name, rows, similarity, gradients, seed)


def _embedded(model: nn.Module, ids: Tensor) -> Tensor:
    """(tokens, size) input embeddings: of the text alone, before any layer mixes positions."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return embedding(ids.to(next(embedding.parameters()).device))


def _add_up(
    name: str,
    rows: Sequence[TextRow],
    similarity: Sequence[tuple[np.ndarray, np.ndarray]],
    gradients: Sequence[Sequence[LayerGradients]],
    seed: int,
) -> Measured:
    count = len(rows)
    corr = Curves.of(similarity)
    by_layer = list(zip(*gradients, strict=True))  # layer -> rows
    curves = [Curves.of([(found.by_distance, found.pairs) for found in layer]) for layer in by_layer]
    together = Curves(_joint(curves), np.sum([curve.pairs for curve in curves], 0))
    layers = []
    for layer, curve in zip(by_layer, curves, strict=True):
        shares = [_FarShare([getattr(found, role) for found in layer]) for role in "qk"]
        w_grad = estimate(curve.decay_length, count, seed)
        layers.append(LayerMeasured(layer[0].layer, w_grad, *(estimate(share, count, seed) for share in shares)))
    everything = [np.concatenate([part for found in row for part in (found.q, found.k)]) for row in gradients]
    gradient = together.mean()[0]
    return Measured(
        name,
        count,
        sum(len(row.ids) for row in rows),
        sum(row.tokens for row in rows),
        correlation_length(corr, seed),
        estimate(together.decay_length, count, seed),
        estimate(_FarShare(everything), count, seed),
        tuple(layers),
        corr.mean()[0],
        gradient / max(float(gradient.max()), 1e-300),
        tuple(partial(_heads, column=0)(layer) for layer in by_layer),
        tuple(partial(_heads, column=2)(layer) for layer in by_layer),
    )


def _joint(curves: Sequence[Curves]) -> np.ndarray:
    """(rows, distances) mean over those layers that look so far."""
    total = np.sum([curve.values * curve.pairs for curve in curves], 0)
    pairs = np.sum([curve.pairs for curve in curves], 0)
    return np.divide(total, pairs, out=np.zeros_like(total), where=pairs > 0)


class _FarShare:
    """far / (far + near) of gradient norms, rows of text weighted; `norms` are (heads, 3) of every row."""

    def __init__(self, norms: Sequence[np.ndarray]) -> None:
        self.far, self.near = (np.array([np.sqrt((n[:, part] ** 2).sum()) for n in norms]) for part in (0, 1))

    def __call__(self, weights: np.ndarray) -> float:
        far, near = float(weights @ self.far), float(weights @ self.near)
        return far / (far + near) if far + near > 0 else 0.0


def _heads(layer: Sequence[LayerGradients], column: int) -> np.ndarray:
    """(heads,) mean over rows of text; empty where no weight belongs to a single head."""
    found = np.mean([row.q[:-1, column] for row in layer], 0)
    return found if np.any([row.q[:-1, 2] > 0 for row in layer]) else found[:0]


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
