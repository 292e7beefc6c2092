"""How positions enter the queries: which channels are rotated together."""

from __future__ import annotations

import torch
from torch import Tensor


def pairing(query: Tensor, heads: dict[str, Tensor], outputs: dict[str, Tensor]) -> tuple[str | None, int, int]:
    """("half" | "interleaved" | "none", rotated channels, the first of them) of the first query head.

    (None, 0, 0) where it is neither.

    A rotation makes each channel of the query from two rows of the projection; which two tells the pairing. For
    DeepSeek's interleaved rotation the rows are what is interleaved, whatever order the channels end up in.

    Args:
        query: (1, heads, tokens, channels), with its graph, normalisation statistics held fixed.
        heads: per parameter, the query head that each row feeds.
        outputs: what came out of the module that owns each parameter.
    """
    for name, head in heads.items():
        output = outputs.get(name)
        rows = (head == 0).nonzero().flatten()
        if output is None or len(rows) != query.shape[-1] or output.shape[-1] != len(head):
            continue
        made_of = _made_of(query, output, rows)
        return _classify(made_of)
    return None, 0, 0


def _made_of(query: Tensor, output: Tensor, rows: Tensor) -> list[list[int]]:
    """For every channel of the first query head, the projection's rows that it is made of (as places in `rows`).

    Each token but the first, which may sit at angle zero, is asked about another channel in the same backward pass.
    """
    channels, last = query.shape[-1], query.shape[2] - 1
    made_of = []
    for start in range(0, channels, last):
        asked = range(start, min(start + last, channels))
        back = torch.zeros_like(query)
        for token, channel in enumerate(asked, 1):
            back[0, 0, token, channel] = 1
        (grad,) = torch.autograd.grad(query, output, back, retain_graph=True)
        by_token = grad.reshape(-1, query.shape[2], grad.shape[-1])[..., rows].any(0)
        made_of += [by_token[token].nonzero().flatten().tolist() for token, _ in enumerate(asked, 1)]
    return made_of


def _classify(made_of: list[list[int]]) -> tuple[str | None, int, int]:
    """Per channel the rows that it is made of -> pairing, number of rotated channels, the first of them."""
    if any(len(rows) not in (1, 2) for rows in made_of):
        return None, 0, 0
    pairs = sorted({tuple(rows) for rows in made_of if len(rows) == 2})
    if not pairs:
        return "none", 0, 0
    if sorted(row for pair in pairs for row in pair) != list(range(pairs[0][0], pairs[0][0] + 2 * len(pairs))):
        return None, 0, 0
    if all(b - a == len(pairs) for a, b in pairs):
        return "half", 2 * len(pairs), pairs[0][0]
    return ("interleaved", 2 * len(pairs), pairs[0][0]) if all(b - a == 1 for a, b in pairs) else (None, 0, 0)
