"""`diagnose` on whole models: rows as training reads them, prose beside them, heads, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qkguard.demo
from qkguard.checkpoint.manifest import dump
from qkguard.diagnosis.measure import TextRow
from qkguard.errors import QKGuardError
from qkguard.offline.diagnose import NO_FORECAST, compare_heads, diagnose
from qkguard.offline.diagnose_page import html_page, layer_table, sentences
from qkguard.offline.diagnosed_rows import spread, text_windows, training_rows
from qkguard.probe.retrieval import LayerScore
from tests.support.models import tiny_model
from tests.support.probing import CHATML, bpe_tokenizer

DEMO = Path(qkguard.demo.__file__).parent / "model"
ROWS = [
    {"prompt": f"Question: m = {i}; c = m - 1. What is c?\nThink:", "completion": " c = 2.\nAnswer: 2"}
    for i in range(9)
]
PROSE = "The old farmer walked to the market. The rain was cold, and the road was empty. " * 40


def test_rows_are_trls() -> None:
    """Ids and loss masks against TRL's own preparation."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = bpe_tokenizer(CHATML)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    chat = {"messages": [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}] * 2}
    for row, options in (
        (ROWS[0], {}),
        (ROWS[0], {"completion_only_loss": False}),
        ({"prompt": chat["messages"][:1], "completion": chat["messages"][1:2]}, {}),
        (chat, {}),
        ({"text": "one two three"}, {}),
        (ROWS[0], {"max_length": len(tokenizer(ROWS[0]["prompt"])["input_ids"]) + 3}),
    ):
        given = {"max_length": 64} | options
        config = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **given)
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        (found,), _ = training_rows(tokenizer, [row], given["max_length"], given.get("completion_only_loss", True))
        assert list(found.ids) == batch["input_ids"][0].tolist()
        assert found.labels[1:] == batch["labels"][0].tolist()[1:]  # nothing predicts the first token


def test_rows_that_are_cut_empty_are_told_of() -> None:
    tokenizer = bpe_tokenizer()
    long = {"prompt": "word " * 60, "completion": "end"}
    rows, warnings = training_rows(tokenizer, [ROWS[0], long], 40)
    assert len(rows) == 1 and warnings == ["max_length=40 leaves nothing to predict in 1 row of 2"]
    with pytest.raises(QKGuardError, match="first 40 tokens of every row"):
        training_rows(tokenizer, [long], 40)


@pytest.mark.parametrize(
    "packed",
    [
        {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [2, 2]},
        {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]},
    ],
)
def test_packed_rows_are_refused(packed: dict[str, Any]) -> None:
    with pytest.raises(QKGuardError, match="Row 1 is packed"):
        training_rows(None, [packed], 10)
    plain = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}
    (row,), _ = training_rows(None, [plain], 10, completion_only=False)
    assert row == TextRow((5, 6, 7, 8), (False, True, False, True))


def test_spread_takes_from_everywhere() -> None:
    assert spread([{"n": i} for i in range(10)], 4) == [{"n": 0}, {"n": 3}, {"n": 6}, {"n": 9}]
    assert spread([{"n": 1}], 4) == [{"n": 1}]


def test_prose_comes_in_the_datas_lengths() -> None:
    tokenizer = bpe_tokenizer(closing=True)
    rows, warnings = text_windows(tokenizer, PROSE, [50, 20, 90], "prose.txt")
    assert [len(row.ids) for row in rows] == [50, 20, 90] and warnings == []
    assert all(row.ids[0] == tokenizer.bos_token_id and row.tokens == len(row.ids) - 1 for row in rows)
    rows, warnings = text_windows(tokenizer, "A few words.", [50, 60], "prose.txt")
    assert len(rows) == 1 and "enough for 1 row of 2" in warnings[0]
    with pytest.raises(QKGuardError, match="expected text"):
        text_windows(tokenizer, "", [50], "prose.txt")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "prose.txt").write_text(PROSE)
    return tmp_path / "data.jsonl"


def test_a_diagnosis_and_its_page(data: Path) -> None:
    found = diagnose(DEMO, data, against=data.parent / "prose.txt", rows=6, far=8)
    assert found.data.rows == 6 and found.prose is not None and found.prose.tokens == found.data.tokens
    assert found.settings["dtype"] == "torch.float32" and 0 < found.data.far_share.value < 1
    assert [layer.layer for layer in found.data.layers] == [2, 5]
    values = json.loads(dump(found.to_json()))
    assert values["data"]["w_grad"]["low"] <= values["data"]["w_grad"]["value"] <= values["data"]["w_grad"]["high"]
    assert values["forecast"] is None and values["why_no_forecast"] == NO_FORECAST
    assert values["data_less_prose"]["w_grad"]["value"] == pytest.approx(
        values["data"]["w_grad"]["value"] - values["prose"]["w_grad"]["value"]
    )
    assert len(values["data"]["curves"]["gradient"]) == len(values["data"]["curves"]["similarity"]) + 1
    assert found.retrieval is not None and found.retrieval.recall > 0.5
    assert 0 <= found.retrieval.overlap <= 1 and found.retrieval.heads[0]["score"] > 0.3
    page = html_page(found)
    assert NO_FORECAST in page and page.count("data:image/png;base64,") == 2 and "Heads that find needles" in page
    assert "prose: W_grad" in page and "http" not in page
    assert len(sentences(found)) == 5 and layer_table(found).rows[-1][0] == "all"


def test_a_loaded_model_and_rows(data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    found = diagnose(model, ROWS, tokenizer=tokenizer, far=8, heads=False)
    folder = diagnose(DEMO, data, far=8, heads=False)
    assert found.data.to_json() == folder.data.to_json() and found.retrieval is None
    whole = diagnose(model, ROWS, tokenizer=tokenizer, far=8, heads=False, completion_only=False)
    assert whole.data.scored > found.data.scored and whole.data.w_grad != found.data.w_grad
    assert whole.data.w_corr == found.data.w_corr  # the text is the same
    with pytest.raises(QKGuardError, match="give tokenizer="):
        diagnose(model, ROWS)


def test_a_model_that_finds_no_needles_has_no_overlap(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=600)
    found = diagnose(model, ROWS, tokenizer=tokenizer, rows=3, far=8)
    assert found.retrieval is None and any("no overlap with retrieving heads" in text for text in found.warnings)
    short = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=100)
    found = diagnose(short, ROWS, tokenizer=tokenizer, rows=3, far=500)
    assert any("no room for contexts" in text for text in found.warnings)
    assert "no row is longer than 500 tokens, so no key is far; give a smaller far" in found.warnings


def test_overlap_of_distributions() -> None:
    class Layer:
        layer = 3

    class Found:
        layers = (Layer(),)
        all_heads = (np.array([3.0, 1.0, 0.0, 0.0]),)
        far_heads = (np.array([0.0, 0.0, 1.0, 1.0]),)

    found = compare_heads(Found(), [LayerScore(3, (0.3, 0.1, 0.0, -0.2))], 1.0)  # type: ignore[arg-type]
    assert found is not None
    assert (found.overlap, found.overlap_far, found.even) == pytest.approx((1.0, 0.0, 0.5))
    assert found.heads[0] == {"layer": 3, "head": 0, "score": 0.3, "gradient": 0.75}
    for other in (LayerScore(4, (0.3, 0.1, 0.0, 0.0)), LayerScore(3, (0.3,))):
        assert compare_heads(Found(), [other], 1.0) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("setting", "value"), [("rows", 0), ("max_length", 1), ("far", -1)])
def test_settings_out_of_range_are_refused(setting: str, value: int) -> None:
    with pytest.raises(QKGuardError, match=rf"Invalid {setting}={value}"):
        diagnose(DEMO, ROWS, **{setting: value})


def test_random_states_stay() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    diagnose(DEMO, ROWS, rows=2, far=8)
    assert torch.equal(torch.get_rng_state(), before)
