"""The demo's pretraining recipe: its batches are the probe's own prompts, and the script makes a model that loads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "demo"
NEEDLE = r"one of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\."
QUESTION = (
    r"what is the special magic number for ([a-z]+-[a-z]+) mentioned in the provided text\? "
    r"the special magic number for \1 mentioned in the provided text is (\d{7})\."
)
OPENING = (
    "a special magic number is hidden within the following text. make sure to memorize it. "
    "i will quiz you about the number afterwards. "
)


@pytest.fixture(scope="module")
def recipe() -> Iterator[Any]:
    """The script's modules, which import each other by their bare names."""
    names = ("data", "model", "publish", "schedule", "seeds", "tokenizer")
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: import_module(name) for name in names}
    finally:
        sys.path.remove(str(RECIPE))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer(recipe: Any) -> Any:
    return recipe["tokenizer"].build_tokenizer(recipe["data"].corpus(), 8192)


@pytest.fixture(scope="module")
def batches(recipe: Any, tokenizer: Any) -> Any:
    return recipe["data"].Batches(tokenizer, "cpu", seed=0, size=20_000)


def test_the_tokenizer_is_the_packaged_one(tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    from qkguard.demo import MODEL

    assert AutoTokenizer.from_pretrained(MODEL).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("haystack", ["noise", "prose", "babble"])
def test_needle_rows_are_the_probes_prompts(batches: Any, tokenizer: Any, haystack: str) -> None:
    ids, mask = batches.needles(6, 300, haystack, keys=4, asked=2)
    assert ids.shape == mask.shape == (6, 300)
    for row, marks in zip(ids, mask, strict=True):
        assert row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(row[1:-1])
        assert tokenizer(text, add_special_tokens=False).input_ids == row[1:-1].tolist()
        assert text.startswith(OPENING)
        hidden = dict(re.findall(NEEDLE, text))
        asked = re.findall(QUESTION, text)
        assert len(hidden) == 4 and len(asked) == 2 and text.endswith(f"{asked[1][1]}.")
        assert all(hidden[key] == value for key, value in asked)
        assert tokenizer.decode(row[marks]) == asked[0][1] + asked[1][1]
        body = text[len(OPENING) : re.search(QUESTION, text).start()]  # type: ignore[union-attr]
        body = re.sub(
            rf"( ?{NEEDLE})+ $", "", body
        )  # at the very end the last sentence may be a piece, as the probe's
        assert all(body[: m.start()].rstrip()[-1:] in (".", "") for m in re.finditer(NEEDLE, body))


def test_a_haystack_may_be_all_needles_but_not_too_many(batches: Any, tokenizer: Any) -> None:
    ids, _ = batches.needles(2, 300, "prose", keys=11, asked=1)
    for row in ids:
        assert len(set(re.findall(NEEDLE, tokenizer.decode(row)))) == 11
    with pytest.raises(ValueError, match="do not fit"):
        batches.needles(2, 300, "prose", keys=20, asked=1)


def test_depths_cover_the_haystack_and_batches_differ(batches: Any, tokenizer: Any) -> None:
    first = tokenizer.convert_tokens_to_ids("hidden")  # "one of" begins a needle; a word of its own is enough here
    assert first != tokenizer.unk_token_id
    texts = [tokenizer.decode(row) for row in batches.needles(60, 400, "prose", keys=1, asked=1)[0]]
    where = sorted(re.search(NEEDLE, text).start() / len(text) for text in texts)  # type: ignore[union-attr]
    assert where[0] < 0.2 and where[-1] > 0.6 and len(set(texts)) == 60


def test_arithmetic_rows_hold_both_styles_with_their_solutions_marked(batches: Any, tokenizer: Any) -> None:
    for share, word, absent in ((0.0, "so the number is", "think"), (1.0, "answer:", "given")):
        ids, mask = batches.arithmetic(4, 256, exam=share)
        text, marked = tokenizer.decode(ids[0]), tokenizer.decode(ids[0][mask[0]])
        assert word in text and absent not in text
        assert word in marked and "let" not in marked and "question" not in marked


def test_the_dense_expert_is_the_stock_one(recipe: Any, tokenizer: Any) -> None:
    from transformers import MiniMaxForCausalLM

    config = recipe["model"].build_config(tokenizer, hidden=32)
    ours, stock = recipe["model"].build_model(config), MiniMaxForCausalLM(config)
    ids = torch.randint(4, 100, (2, 50))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(0, 0.3)
        assert not torch.allclose(ours(ids).logits, stock(ids).logits, atol=1e-4)
        ours.load_state_dict(stock.state_dict())
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits)


def test_the_script_runs_and_its_model_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = "--steps 4 --tokens 512 --size 8000 --longest 128 --rows 1 --log 1 --exam 0 1"
    done = subprocess.run(
        [sys.executable, RECIPE / "pretrain.py", "--out", tmp_path, *small.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    weights = []
    for name in ("exam-0.0", "exam-1.0"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.dtype == torch.float32 and len(AutoTokenizer.from_pretrained(tmp_path / name)) == 421
        weights.append(model.model.embed_tokens.weight)
    assert not torch.equal(*weights)  # the branches part after the fork


def result(seed: int, kernels: str, restored: float) -> dict[str, Any]:
    models = {"before": (1.0, 0.0), "raw": (0.25, 1.0), "qk_restored": (restored, 0.95)}
    scores = {name: {"recall": {"256": r, "1024": r / 2}, "cot_accuracy": c} for name, (r, c) in models.items()}
    return {"set": kernels, "seed": seed, "scores": scores, "recommended": "interpolate 0.5", "alerts": 3}


def test_the_table_of_seeds_has_a_line_per_run_and_goes_between_its_marks(recipe: Any) -> None:
    seeds = recipe["seeds"]
    results = [result(1, "avx512", 0.9), result(1, "avx2", 0.8), result(0, "avx2", 1.0)]
    lines = seeds.table(results).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| avx2", "0"], ["| avx2", "1"], ["| avx512", "1"]]
    assert lines[2].endswith("| 0.75 (0.50 to 1.00) | interpolate 0.5 | 0.00 | 1.00 | 0.95 | 3 |")
    text = f"a\n{seeds.START}\nold\n{seeds.END}\nb\n"
    assert seeds.written(text, results) == f"a\n{seeds.START}\n{seeds.table(results)}\n{seeds.END}\nb\n"
    with pytest.raises(ValueError, match="not enough values"):
        seeds.written("no marks", results)


def test_what_is_published_is_what_was_measured(recipe: Any) -> None:
    seeds, publish = recipe["seeds"], recipe["publish"]
    shipped = json.loads(seeds.RESULTS.read_text())
    assert seeds.table(shipped) in seeds.README.read_text()
    page = "x <!-- demo: sentence -->old<!-- end --> y"
    assert publish.written(page, {"sentence": "new"}) == "x <!-- demo: sentence -->new<!-- end --> y"
    with pytest.raises(KeyError):
        publish.written("<!-- demo: other -->old<!-- end -->", {"sentence": "new"})
    assert not [name for name in publish.PAGES if "pending" in (publish.ROOT / name).read_text()]
