"""The demo: its text, its packaged model, what it shows, and the whole run in a few steps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qkguard import QKGuardError
from qkguard.choice.task import encode_rows
from qkguard.demo import MODEL, DemoSettings, run_demo
from qkguard.demo.arithmetic import problems
from qkguard.demo.scores import Scores, answer_of
from qkguard.demo.show import reading, table
from qkguard.offline.task_rows import read_rows
from qkguard.probe import Prober, ProbeSettings, probe

SMALL = DemoSettings(
    steps=4, batch=4, learning_rate=1e-2, lengths=(256,), depths=2, samples=1, tasks=("single_2",), problems=4
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


# -- text -------------------------------------------------------------------------------------------------------------


def solve(prompt: str) -> int:
    """The answer of a problem, worked out from its text alone."""
    given, asked = re.fullmatch(r"Question: (.*)\. What is (\w)\?\nThink:", prompt).groups()  # type: ignore[union-attr]
    values: dict[str, int] = {}
    for line in given.split("; "):
        name, right = line.split(" = ")
        first, *rest = right.split(" ")
        total = values[first] if first in values else int(first)
        if rest:
            total += int(rest[1]) * (1 if rest[0] == "+" else -1)
        values[name] = total % 10
    return values[asked]


def is_sound(completion: str) -> bool:
    """Whether every line of a chain of thought is right by itself and takes up the value before it."""
    steps, answer = re.fullmatch(r" (.*)\.\nAnswer: (\d)", completion).groups()  # type: ignore[union-attr]
    last: int | None = None
    for line in steps.split("; "):
        numbers = [int(n) for n in re.findall(r"\d", line)]
        if last is not None:
            sign = 1 if "+" in line else -1
            if numbers[0] != last or (numbers[0] + sign * numbers[1]) % 10 != numbers[2]:
                return False
        last = numbers[-1]
    return last == int(answer)


def test_arithmetic_is_right_and_seeded() -> None:
    chains = list(islice(problems(3), 200))
    assert all(solve(c.prompt) == c.values[-1] == answer_of(c.prompt + c.completion) for c in chains)
    assert all(is_sound(c.completion) for c in chains)
    assert {len(c.names) for c in chains} == {4, 5, 6, 7}
    assert chains == list(islice(problems(3), 200)) != list(islice(problems(4), 200))
    wrong = replace(chains[0], values=(*chains[0].values[:-1], (chains[0].values[-1] + 1) % 10))
    assert solve(wrong.prompt) != wrong.values[-1] and not is_sound(wrong.completion)


def test_an_answer_is_read_from_text() -> None:
    assert answer_of("m = 3; c = 3 - 1 = 2. answer: 2 </s>") == 2
    assert answer_of("m = 3; c = 3 - 1 = 2.") is None
    assert answer_of("Answer: 12") is None


# -- the packaged model -----------------------------------------------------------------------------------------------


def test_the_model_is_a_small_stock_hybrid(model: Any) -> None:
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 12_000_000
    assert {v.dtype for v in load_file(MODEL / "model.safetensors").values()} == {torch.float16}
    assert type(model).__module__.startswith("transformers.") and model.dtype == torch.float32
    assert {"full_attention", "linear_attention"} == set(model.config.layer_types)


def test_softmax_layers_see_no_positions(model: Any) -> None:
    ids = torch.randint(4, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here = model(ids).logits
        there = model(ids, position_ids=torch.arange(4000, 4040)[None]).logits
        moved = model(ids.roll(1, 1)).logits
    assert (here - there).abs().max() < 1e-3 < (here - moved).abs().max()


def test_the_tokenizer_knows_every_word_the_probe_says(tokenizer: Any) -> None:
    maker = Prober(tokenizer, ProbeSettings(lengths=(600,), tasks=("s1", "s2", "mk1", "mk2"), depths=2)).maker
    pieces = [
        piece
        for task in ("single_1", "single_2", "multikey_1", "multikey_2")
        for piece in tokenizer.convert_ids_to_tokens(maker.make(_key(task)).ids.tolist())
    ]
    assert not [p for p in pieces if p == "<unk>" or p.startswith("##")]
    chain = next(problems(0))
    text = chain.prompt + chain.completion
    assert not [p for p in tokenizer.tokenize(text) if p == "<unk>" or p.startswith("##")]
    assert [p for p in tokenizer.tokenize("zebra") if p.startswith("##")]  # the check can fail


def test_text_comes_back_from_tokens(tokenizer: Any) -> None:
    text = "one of the special magic numbers for silent-harbor is: 1234567. m = 3; c = m - 1. what is c?"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer(text).input_ids[0] == tokenizer.bos_token_id


def test_the_model_finds_needles_and_needs_its_keys_for_it(model: Any, tokenizer: Any) -> None:
    settings: dict[str, Any] = {"lengths": (400,), "depths": 4, "samples": 2, "tasks": ("s1", "s2", "mk1")}
    assert probe(model, tokenizer, attention=False, **settings).recall >= 0.9
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "k_proj" in name:
                parameter.copy_(parameter.flip(0))
    assert probe(model, tokenizer, attention=False, **settings).recall <= 0.1


# -- what is shown ----------------------------------------------------------------------------------------------------


def scores(recall: float, cot: float) -> Scores:
    return Scores({256: recall, 2048: recall}, cot, 0.5, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "raw", "restored", "words"),
    [
        (
            (1.0, 0.0),
            (0.6, 1.0),
            (0.9, 1.0),
            "brought recall back to 0.90, 75% of what was lost, with CoT accuracy at",
        ),
        ((1.0, 0.0), (0.6, 1.0), (0.9, 0.5), "and left CoT accuracy at 0.50"),
        ((1.0, 0.0), (1.0, 1.0), (1.0, 1.0), "cost no recall here (1.00 to 1.00). Restoring queries and keys left"),
        ((1.0, 0.0), (0.6, 1.0), (0.5, 1.0), "lowered recall to 0.50"),
        ((1.0, 0.0), (0.6, 1.0), (0.61, 1.0), "left recall at 0.61"),
    ],
)
def test_the_reading_says_what_was_measured(
    before: tuple[float, float], raw: tuple[float, float], restored: tuple[float, float], words: str
) -> None:
    found = {"before": scores(*before), "raw": scores(*raw), "qk_restored": scores(*restored)}
    assert words in reading(found)
    columns, rows = table(found)
    assert columns == ["", "before SFT", "after SFT (raw)", "QK-restored"]
    assert rows[1] == ["needle recall, 2,048 tokens", *(f"{r:.2f}" for r, _ in (before, raw, restored))]


# -- the run ----------------------------------------------------------------------------------------------------------


def test_the_whole_demo_in_a_few_steps(tmp_path: Path, tokenizer: Any) -> None:
    out = tmp_path / "demo"
    said: list[str] = []
    first = run_demo(out, SMALL, say=said.append)
    assert len(said) == 3
    base, raw, restored = (load_file(f / "model.safetensors") for f in (MODEL, first.raw, first.restored))
    changed = {name for name in raw if not torch.equal(raw[name], restored[name])}
    assert changed == {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (2, 5) for x in "qk"}
    assert all(torch.equal(restored[name], base[name].float()) for name in changed)
    assert first.picture.read_bytes().startswith(b"\x89PNG") and first.picture.stat().st_size > 20_000
    report = json.loads((out / "demo.json").read_text())
    assert report["scores"]["raw"]["recall"] == {"256": first.scores["raw"].recall[256]}
    assert report["losses"] == [list(pair) for pair in first.losses] and len(first.losses) == SMALL.steps
    assert first.drift["qkguard/drift/layer_5/routing_rel"] > 0

    rows = read_rows(first.heldout)
    assert [row["prompt"] for row in rows] == [chain.prompt for chain in islice(problems(SMALL.seed), SMALL.problems)]
    encoded, _ = encode_rows(tokenizer, rows, max_length=256)
    assert all(row.answer == (row.start, len(row.ids)) for row in encoded), "the answer is the whole chain"

    again = run_demo(out, SMALL)  # replaces the first, and repeats it
    assert again.losses == first.losses
    assert all(torch.equal(raw[name], value) for name, value in load_file(again.raw / "model.safetensors").items())
    other = run_demo(out, replace(SMALL, seed=1))
    assert other.losses != first.losses


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(QKGuardError, match="something other than a demo"):
        run_demo(tmp_path, SMALL)
    with pytest.raises(QKGuardError, match="is a file"):
        run_demo(tmp_path / "thesis.txt", SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def _key(task: str) -> Any:
    from qkguard.probe.samples import SampleKey

    return SampleKey(600, task, 0.5, 0)
