"""Rows of a trainer's data loaders, as its collator masks them: what the loss at the end is measured on."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.offline.task_rows import ROWS, Tokenised, own_labels, sampled
from qkguard.probe.passes import IGNORED, random_states

ROW_TOKENS = 4096
"""Longer rows are cut: the loss of their first tokens is as good a measure, and their logits would take memory."""

LEAST_ROWS = 8  # of fewer the interval of a loss says too little

Collate = Callable[[list[Any]], Mapping[str, Any]]


def rows_of(loader: Any, at_most: int = ROWS) -> list[Tokenised]:
    """Up to so many rows from everywhere in a loader's data set, masked as training masks them; one process.

    Packed sequences are taken apart. Neither the loader nor a random state moves. No rows of streams, of data sets of
    one's own (`sampled`), and of rows with more than tokens in them, such as pictures.
    """
    collate = _own_copy(getattr(loader, "collate_fn", None))
    found: list[Tokenised] = []
    with random_states():
        for row in sampled(getattr(loader, "dataset", None), at_most):
            found += _sequences(row, collate)
    return found[:: max(1, -(-len(found) // at_most))]


def fewer_rows(rows: Sequence[Tokenised], tokens: int) -> list[Tokenised]:
    """As many rows, from everywhere among them, as have about so many tokens together, and at least `LEAST_ROWS`; all
    where they have no more.
    """
    total = sum(len(row["input_ids"]) for row in rows)
    if total <= tokens:
        return list(rows)
    kept = min(len(rows), max(LEAST_ROWS, len(rows) * tokens // total))
    return [rows[i * len(rows) // kept] for i in range(kept)]


def _own_copy(collate: Any) -> Collate | None:
    """A collator that may be called without the trainer's noticing; None where there is no such thing.

    Those of transformers and TRL, and functions, remember nothing between two calls but random states; others are
    copied, without the models that they may hold. A bound method would be copied with what it is bound to.
    """
    if collate is None or isinstance(collate, types.MethodType):
        return None
    if isinstance(collate, types.FunctionType) or type(collate).__module__.split(".")[0] in ("transformers", "trl"):
        return collate
    shared = [value for value in getattr(collate, "__dict__", {}).values() if isinstance(value, nn.Module)]
    try:
        return deepcopy(collate, {id(module): module for module in shared})
    except Exception:  # whatever a collator of one's own may hold
        return None


def _sequences(row: dict[str, Any], collate: Collate | None) -> Iterator[Tokenised]:
    """The sequences of one row that have something to predict."""
    ids, labels, starts = _collated(row, collate) or _as_stored(row)
    for begin, following in pairwise([*starts, len(ids)]):
        end = min(following, begin + ROW_TOKENS)
        if any(label != IGNORED for label in labels[begin + 1 : end]):
            yield {"input_ids": ids[begin:end], "labels": labels[begin:end]}


def _as_stored(row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Token ids, labels, and where sequences begin, of a row as its data set has it; empty where it has no ids."""
    if "input_ids" not in row or "seq_lengths" in row:
        return [], [], []
    return list(row["input_ids"]), own_labels(row), [0]


def _collated(row: dict[str, Any], collate: Collate | None) -> tuple[list[int], list[int], list[int]] | None:
    """The same as the trainer would feed it to the model; None where it cannot be made from this row alone."""
    if collate is None:
        return None
    try:
        batch = collate([row])
        ids, labels = (torch.as_tensor(batch[key])[0] for key in ("input_ids", "labels"))
    except Exception:  # whatever a collator of one's own may raise
        return None
    if any(isinstance(value, Tensor) and value.is_floating_point() for value in batch.values()):
        return [], [], []  # pictures, sounds: tokens alone are not what the model reads
    positions = batch.get("position_ids")
    begins = [0] if positions is None else (torch.as_tensor(positions)[0] == 0).nonzero().flatten().tolist()
    mask = batch.get("attention_mask")
    if mask is not None and torch.as_tensor(mask).shape == batch["input_ids"].shape:
        kept = torch.as_tensor(mask)[0].bool()
        if positions is None or len(begins) == 1:  # padding, on whichever side
            ids, labels, begins = ids[kept], labels[kept], [0]
    return ids.tolist(), labels.tolist(), begins
