"""The loss of rows: masks in several places, rows dealt out to ranks, logits in pieces."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from qkguard.choice import task
from qkguard.choice.task import TaskRow, encode_rows, score_rows
from qkguard.errors import QKGuardError
from qkguard.probe.passes import IGNORED
from tests.support.models import tiny_model


def masked_rows(count: int = 9) -> list[dict[str, list[int]]]:
    """Rows of different lengths with labels as a chat has them: turns that count between turns that do not."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        ids = torch.randint(3, 256, (14 + 3 * number,), generator=random).tolist()
        labels = [IGNORED] * 4 + ids[4:8] + [IGNORED] * 3 + ids[11:-1] + [IGNORED]
        rows.append({"input_ids": ids, "labels": labels if number % 3 else [IGNORED, *ids[1:]]})
    return rows


def loss_of(model: Any, row: dict[str, list[int]]) -> tuple[float, int]:
    """transformers' own loss of one row, summed, and its tokens."""
    ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        mean = model(input_ids=ids, labels=labels, use_cache=False).loss
    tokens = int((labels[:, 1:] != IGNORED).sum())
    return float(mean) * tokens, tokens


@pytest.mark.parametrize("name", ["llama", "minimax"])
def test_rows_masked_in_several_places_have_the_loss_that_transformers_gives(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(task, "LOSS_TOKENS", 5)  # several pieces a row
    model, rows = tiny_model(name).eval(), masked_rows()
    encoded, dropped = encode_rows(None, rows, 100)
    assert dropped == 0 and any(row.unscored for row in encoded)
    found = score_rows(model, encoded, 80)
    for row, nll, tokens in zip(rows, found.nll, found.tokens, strict=True):
        wanted, count = loss_of(model, row)
        assert tokens == count and nll == pytest.approx(wanted, rel=1e-5)
    unmasked, _ = encode_rows(None, [row | {"labels": row["input_ids"]} for row in rows], 100)
    other = score_rows(model, unmasked, 80)
    assert other.tokens[1] > found.tokens[1] and other.nll[1] > found.nll[1] + 10, "the mask does not count"


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_score_their_shares_and_run_equally_many_passes(world: int) -> None:
    model = tiny_model("llama").eval()
    rows, _ = encode_rows(None, masked_rows(), 100)
    alone = score_rows(model, rows, 60)
    shares: dict[int, list[Tensor]] = defaultdict(list)
    passes: dict[int, int] = defaultdict(int)

    def sent(rank: int) -> Any:
        def keep(vector: Tensor) -> Tensor:
            shares[rank].append(vector.clone())
            return vector

        return keep

    for rank in range(world):
        hook = model.register_forward_pre_hook(counting(passes, rank))
        score_rows(model, rows, 60, rank=rank, world=world, all_reduce=sent(rank))
        hook.remove()
    assert len(set(passes.values())) == 1 and passes[0] < 5, passes
    summed = sum(found[0] for found in shares.values())
    assert isinstance(summed, Tensor) and summed.view(2, -1)[0].tolist() == list(alone.nll), "the same batches: equal"
    without_first = sum(shares[rank][0] for rank in range(1, world))
    assert isinstance(without_first, Tensor) and without_first.view(2, -1)[0].tolist() != list(alone.nll)


def counting(passes: dict[int, int], rank: int) -> Any:
    def count(module: Any, args: Any) -> None:
        passes[rank] += 1

    return count


def test_rows_that_are_tokenised_already() -> None:
    ids = [5, 6, 7, 8, 9]
    (row,), _ = encode_rows(None, [{"input_ids": ids, "labels": [IGNORED, 6, IGNORED, 8, IGNORED]}], 10)
    assert row == TaskRow((5, 6, 7, 8), 1, None, (2,)) and row.tokens == 2 and row.targets == [6, IGNORED, 8]
    with pytest.raises(QKGuardError, match="all of its labels are -100"):
        encode_rows(None, [{"input_ids": ids, "labels": [5, *[IGNORED] * 4]}], 10)
