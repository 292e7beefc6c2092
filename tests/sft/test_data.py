"""Rows: what columns mean, how data sets mix, and token counts equal to those TRL trains on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTTrainer

import qkguard.demo
from qkguard.errors import QKGuardError
from qkguard.sft.data import DataArguments, Source, convert, form_of, load, look, token_lengths
from qkguard.sft.preflight import cut_warning
from tests.support.training import arguments

DEMO = Path(qkguard.demo.__file__).parent / "model"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
THINK = "<think>\n{solution}\n</think>\n\n{answer}"
USER, ASSISTANT = {"role": "user", "content": "1 + 2 = "}, {"role": "assistant", "content": "3 . so 3"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "mapping", "chat", "wanted"),
    [
        ({"messages": [USER, ASSISTANT], "n": 1}, {}, True, {"messages": [USER, ASSISTANT]}),
        (
            {"conversations": [{"from": "human", "value": "1 + 2 = "}, {"from": "gpt", "value": "3 . so 3"}]},
            {"messages_column": "conversations"},
            True,
            {"messages": [USER, ASSISTANT]},
        ),
        ({"prompt": "a", "completion": "b", "messages_": 0}, {}, True, {"prompt": "a", "completion": "b"}),
        (
            {"q": "a", "r": "b", "messages": []},
            {"prompt_column": "q", "completion_column": "r"},  # what is mapped by hand wins over what is there
            True,
            {"prompt": "a", "completion": "b"},
        ),
        ({"problem": "p", "solution": "s"}, {}, False, {"prompt": "p\n", "completion": "s"}),
        ({"problem": "p", "solution": "s", "answer": "a"}, {}, False, {"prompt": "p\n", "completion": "s\n\na"}),
        (
            {"problem": "p", "solution": ["s", "other"], "answer": None},
            {"completion_template": THINK},
            True,
            {
                "prompt": [{"role": "user", "content": "p"}],
                "completion": [{"role": "assistant", "content": "<think>\ns\n</think>\n\n"}],
            },
        ),
        (  # GSM8K: the answer column holds the worked solution
            {"question": "p", "answer": "s"},
            {"problem_column": "question", "solution_column": "answer"},
            False,
            {"prompt": "p\n", "completion": "s"},
        ),
    ],
)
def test_columns_become_trls_forms(row: dict, mapping: dict, chat: bool, wanted: dict) -> None:
    source = Source(path="x", **mapping)
    assert convert(row, source, form_of(source, list(row)), chat=chat, as_messages=False) == wanted


def test_missing_columns_are_named_with_those_found() -> None:
    with pytest.raises(QKGuardError, match=r"x has the columns a, b; expected messages, prompt and completion, or"):
        form_of(Source(path="x"), ["a", "b"])
    with pytest.raises(QKGuardError, match=r"x has the columns prompt, completion, and no 'q' \(prompt_column\)"):
        form_of(Source(path="x", prompt_column="q"), ["prompt", "completion"])
    with pytest.raises(QKGuardError, match="'robot'; known are human"):
        convert({"messages": [{"from": "robot", "value": ""}]}, Source(path="x"), "messages", chat=1, as_messages=0)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_local_files_are_read(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": str(i), "completion": "c"} for i in range(600)]
    data = DataArguments(dataset_name=write(tmp_path / f"rows{suffix}", rows))
    assert load(data, chat=False, seed=0).to_list() == rows
    seen = look(data, chat=False)
    assert seen.total == 600 and seen.form == "prompt_completion" and 200 <= len(seen.rows) <= 256
    assert int(seen.rows[-1]["prompt"]) > 550  # from everywhere, not the first ones
    few = DataArguments(dataset_name=data.dataset_name, max_samples=7)
    assert len(load(few, chat=False, seed=0)) == look(few, chat=False).total == 7


def test_rows_to_evaluate_on_are_others(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "c"}]) for name in ("train", "test")]
    data = DataArguments(dataset_name=paths[0], dataset_test_split=paths[1])
    assert load(data, chat=False, seed=0)["prompt"][0] == "train"
    assert load(data, chat=False, seed=0, split=paths[1])["prompt"][0] == "test"
    with pytest.raises(QKGuardError, match=r"train\.jsonl is a file of rows and has no split 'test'"):
        load(data, chat=False, seed=0, split="test")


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    Dataset.from_list([{"prompt": "a", "completion": "b"}]).save_to_disk(tmp_path / "saved")
    assert len(load(DataArguments(dataset_name=str(tmp_path / "saved")), chat=False, seed=0)) == 1


def test_weights_are_shares_of_the_mixture(tmp_path: Path) -> None:
    sizes, entries = {"a": 3000, "b": 3000}, []
    for name, weight in (("a", 3), ("b", 1)):
        file = write(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": str(i)} for i in range(sizes[name])])
        entries.append({"path": file, "weight": weight})
    weighted = DataArguments(datasets=entries)
    mixed = load(weighted, chat=False, seed=0)
    counts = Counter(mixed["prompt"])
    assert counts["a"] == pytest.approx(3 * counts["b"], rel=0.1) and max(counts.values()) <= 3000
    assert len(set(zip(mixed["prompt"], mixed["completion"], strict=True))) == len(mixed)  # none taken twice
    assert look(weighted, chat=False).total == pytest.approx(len(mixed), rel=0.05) == 4000
    whole = DataArguments(datasets=json.dumps([{"path": e["path"]} for e in entries]))  # as typed on a command line
    assert Counter(load(whole, chat=False, seed=0)["prompt"]) == sizes
    assert look(whole, chat=False).total == 6000


def test_problems_mix_with_messages_and_prompts_do_not(tmp_path: Path) -> None:
    chats = {"path": write(tmp_path / "chats.jsonl", [{"messages": [USER, ASSISTANT]}] * 3)}
    problems = {"path": write(tmp_path / "problems.jsonl", [{"question": "1 + 2 = ", "solution": "3 . so 3"}] * 3)}
    problems["problem_column"] = "question"
    prompts = {"path": write(tmp_path / "prompts.jsonl", [{"prompt": "a", "completion": "b"}] * 3)}
    mixed = load(DataArguments(datasets=[chats, problems]), chat=True, seed=0)
    assert mixed.column_names == ["messages"] and mixed[0] == mixed[5] == {"messages": [USER, ASSISTANT]}
    for read in (look, lambda data, chat: load(data, chat=chat, seed=0)):
        with pytest.raises(QKGuardError, match=r"chats\.jsonl has messages and .*prompts\.jsonl prompts"):
            read(DataArguments(datasets=[chats, prompts]), chat=True)


@pytest.mark.parametrize(
    ("datasets", "said"),
    [
        ([{"path": "a", "weight": 1}, {"path": "b"}], "weights are"),
        ([{"path": "a", "weight": 0}], "weight=0: expected a number > 0"),
        ([{"path": "a", "wieght": 1}], r"datasets: Unknown setting wieght=1\. Did you mean weight\?"),
        ([{"weight": 1}], "expected a list of"),
        ('[{"path": "a"}', "is not JSON"),
        ('{"path": "a"}', "expected a list of"),
    ],
)
def test_wrong_mixtures_are_refused(datasets: list | str, said: str) -> None:
    with pytest.raises(QKGuardError, match=said):
        DataArguments(datasets=datasets).sources()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "1 + 2 = ", "completion": "3 . so 3"},
        {"prompt": [USER], "completion": [ASSISTANT]},
    ],
)
def test_token_counts_are_those_trained_on(row: dict, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = TEMPLATE
    options: dict[str, Any] = {"model": str(DEMO), "processing_class": tokenizer}
    trainer = SFTTrainer(args=arguments(tmp_path), train_dataset=Dataset.from_list([row] * 3), **options)
    trained = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    counted = token_lengths([row] * 3, tokenizer)
    assert counted == trained and min(counted) > 5


def test_cut_samples_are_counted() -> None:
    def said(**options: Any) -> list[str]:
        settings = {"max_length": 10, "packing": False, "packing_strategy": "bfd"} | options
        return cut_warning(list(range(1, 21)), type("Training", (), settings))

    assert "cuts 50% of the samples (10 of 20" in said()[0] and "the longest 20)" in said()[0]
    assert said(packing=True)  # best-fit packing cuts them too, the other strategies split
    assert said(max_length=20) == said(max_length=None) == said(packing=True, packing_strategy="wrapped") == []
