"""How far a text resembles itself: the autocorrelation of its token embeddings."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHANNELS = 256  # transformed at a time: memory stays flat in the embedding's size


def self_similarity(vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Autocorrelation of a row's token vectors, less what the same tokens in random order have.

    With x centred on the row's mean, rho(d) is the mean of <x_t, x_(t+d)> over t, divided by the mean of |x_t|^2. For
    tokens in random order its expected value is -1 / (n - 1) at every distance, exactly; that much is added, so that
    shuffled text has 0. Summed over all pairs of a row the result is 0: what is alike near by is less so far away.

    Args:
        vectors: (tokens, size), usually the input embeddings: they say what the text is, not what a model makes of it.

    Returns:
        (values, pairs): float64 (tokens - 1,) for the distances from 1 on, and how many pairs each is the mean of.
        Values are 0 for a row of equal tokens, which has no variance to share.
    """
    x = vectors.detach().double().cpu()
    count = len(x)
    x = x - x.mean(0)
    power = float(x.square().sum()) / count
    pairs = np.arange(count - 1, 0, -1, dtype=float)
    if count < 2 or power <= 0:
        return np.zeros(max(0, count - 1)), pairs
    products = torch.zeros(count, dtype=torch.float64)
    for part in x.split(_CHANNELS, 1):
        spectrum = torch.fft.rfft(part, 2 * count, dim=0).abs().square().sum(1)
        products += torch.fft.irfft(spectrum, 2 * count)[:count]
    return products[1:].numpy() / pairs / power + 1 / (count - 1), pairs
