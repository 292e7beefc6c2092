"""Rows copied from a trainer's data loader: masked as its collator masks them, and nothing moves."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling as MaskedLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qkguard.training.loader_rows import ROW_TOKENS, fewer_rows, rows_of
from tests.support.tokens import tiny_tokenizer

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]},
    {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
]


def loader(rows: list[dict[str, Any]], collate: Any) -> DataLoader:
    return DataLoader(Dataset.from_list(rows), batch_size=2, shuffle=True, collate_fn=collate)


def streams() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("padding_free", [False, True])
def test_masks_are_the_collators_and_rows_without_targets_are_left_out(padding_free: bool) -> None:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=8)
    assert rows_of(loader(ROWS, collate)) == ROWS[:2]


def test_packed_sequences_are_taken_apart() -> None:
    packed = {"input_ids": [1, 2, 3, 4, 5, 6, 7], "labels": [1, 2, 3, 4, -100, 6, 7], "seq_lengths": [3, 4]}
    found = rows_of(loader([packed], DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)))
    assert found == [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [4, 5, 6, 7], "labels": [-100, -100, 6, 7]},
    ]
    many = [packed] * 20
    assert len(rows_of(loader(many, DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)), 10)) <= 10


def test_long_rows_are_cut() -> None:
    ids = list(range(3, 203)) * 30
    (row,) = rows_of(loader([{"input_ids": ids}], DataCollatorForLanguageModeling(pad_token_id=0)))
    assert row["input_ids"] == ids[:ROW_TOKENS] and row["labels"] == ids[:ROW_TOKENS]
    late = {"input_ids": ids, "labels": [-100] * ROW_TOKENS + ids[ROW_TOKENS:]}
    assert rows_of(loader([late], DataCollatorForLanguageModeling(pad_token_id=0))) == []


def test_random_states_and_the_loaders_order_stay() -> None:
    collate = MaskedLM(tiny_tokenizer(), mlm=False)
    data = loader([{"input_ids": list(range(5, 25))}] * 5, collate)
    before = streams()
    assert len(rows_of(data)) == 5 and streams() == before
    drawing = loader([{"input_ids": list(range(5, 25))}] * 5, draws_random_numbers)
    assert len(rows_of(drawing)) == 5 and streams() == before
    draws_random_numbers([{"input_ids": [1]}])
    assert streams() != before, "the collator drew nothing: the test shows nothing"


def draws_random_numbers(rows: list[Any]) -> dict[str, Any]:
    torch.rand(3), random.random(), np.random.rand()
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


@dataclass
class Counting:
    """A collator of one's own that remembers its calls and holds a model."""

    model: torch.nn.Module
    calls: list[int] = field(default_factory=list)

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        self.calls.append(len(rows))
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids.masked_fill(ids < 10, -100), "first": self.model.weight[:1, :1].long()}

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        return self(rows)


def test_a_collator_with_a_memory_does_not_notice_and_its_model_is_not_copied() -> None:
    collate = Counting(torch.nn.Linear(4, 4))
    collate.model.forward = None  # type: ignore[method-assign]
    (row,) = rows_of(loader([{"input_ids": [8, 9, 10, 11]}], collate))
    assert row["labels"] == [-100, -100, 10, 11] and collate.calls == []
    bound = rows_of(loader([{"input_ids": [8, 9, 10, 11], "completion_mask": [0, 0, 0, 1]}], collate.collate))
    assert bound[0]["labels"] == [-100, -100, -100, 11] and collate.calls == [], "the row's own mask"


def test_what_cannot_be_read_gives_no_rows() -> None:
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    assert rows_of(DataLoader(stream, collate_fn=collate)) == [] == rows_of(None) == rows_of(DataLoader(ROWS))  # type: ignore[arg-type]
    assert rows_of(loader([{"text": "a"}], collate)) == []

    def with_pictures(rows: list[Any]) -> dict[str, Any]:
        return {**collate(rows), "pixel_values": torch.zeros(1, 3)}

    assert rows_of(loader(ROWS, with_pictures)) == []


def test_fewer_rows_are_from_everywhere_and_within_their_tokens():
    rows = [{"input_ids": [n] * 10, "labels": [n] * 10} for n in range(20)]
    assert fewer_rows(rows, 200) == rows
    kept = fewer_rows(rows, 105)
    assert [row["input_ids"][0] for row in kept] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert len(fewer_rows(rows, 3)) == 8 and fewer_rows(rows[:5], 3) == rows[:5], "never too few to say anything"
