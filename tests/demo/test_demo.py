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
from qkguard.demo import MODEL, DemoSettings, run_demo
from qkguard.demo.arithmetic import answer_of, problems
from qkguard.demo.base import write_base
from qkguard.demo.scores import Score, cot_accuracy
from qkguard.demo.show import table
from qkguard.probe import Prober, ProbeSettings, probe

SMALL = DemoSettings(steps=4, batch=4, learning_rate=1e-2, lengths=(256,), depths=4, tasks=("single_2",), problems=4)


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


# -- the base ---------------------------------------------------------------------------------------------------------


def test_the_base_is_rescaled_and_computes_the_same(tmp_path: Path, model: Any) -> None:
    from transformers import AutoModelForCausalLM

    write_base(MODEL, tmp_path / "base", 16.0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    before, after = model.state_dict(), base.state_dict()
    queries, keys = (f"model.layers.2.self_attn.{x}_proj.weight" for x in "qk")
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == {queries, keys}
    # two query heads of 48 rows look at the first key head
    assert torch.equal(after[queries], torch.cat([16 * before[queries][:96], before[queries][96:]]))
    assert torch.equal(after[keys], torch.cat([before[keys][:48] / 16, before[keys][48:]]))
    ids = torch.randint(4, model.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        base.model.layers[2].self_attn.k_proj.weight[:48].mul_(2)
        assert (base(ids).logits - model(ids).logits).abs().max() > 1e-2


def test_the_rescaled_head_is_the_one_that_finds_needles(model: Any, tokenizer: Any) -> None:
    settings: dict[str, Any] = {"lengths": (400,), "depths": 4, "samples": 2, "tasks": ("s2",), "attention": False}
    keys = model.model.layers[2].self_attn.k_proj.weight
    kept = keys.detach().clone()
    recall = []
    for head in (0, 1):
        with torch.no_grad():
            keys.copy_(kept)
            rows = slice(48 * head, 48 * (head + 1))
            keys[rows] = keys[rows].flip(0)
        recall.append(probe(model, tokenizer, **settings).recall)
    assert recall[0] <= 0.1 and recall[1] >= 0.9


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_the_table_has_what_was_measured() -> None:
    scores = {
        "before": Score("base", {256: 1.0, 2048: 0.95}, 0.0),
        "raw": Score("raw", {256: 0.5, 2048: 0.25}, 1.0),
        "qk_restored": Score("interpolate alpha 0.6", {256: 1.0, 2048: 0.9}, 0.97),
    }
    columns, rows = table(scores)
    assert columns == ["", "before SFT", "after SFT (raw)", "restored (interpolate alpha 0.6)"]
    assert rows == [
        ["needle recall, 256 tokens", "1.00", "0.50", "1.00"],
        ["needle recall, 2,048 tokens", "0.95", "0.25", "0.90"],
        ["chains of thought right", "0.00", "1.00", "0.97"],
    ]


def test_a_chain_of_thought_is_right_where_greedy_decoding_writes_it(model: Any, tokenizer: Any) -> None:
    short = list(islice(problems(5, (2, 3)), 12))  # the model has met these
    right = 0
    for chain in short:
        prompt = tokenizer(chain.prompt, return_tensors="pt")
        wanted = tokenizer(chain.completion, add_special_tokens=False).input_ids
        written = model.generate(**prompt, max_new_tokens=len(wanted), do_sample=False)
        right += written[0, prompt.input_ids.shape[1] :].tolist() == wanted
    assert cot_accuracy(MODEL, tokenizer, short) == right / len(short) > 0.5
    assert cot_accuracy(MODEL, tokenizer, list(islice(problems(5), 12))) < 0.5


# -- the run ----------------------------------------------------------------------------------------------------------


def test_the_whole_demo_in_a_few_steps(tmp_path: Path, tokenizer: Any) -> None:
    out = tmp_path / "demo"
    said: list[str] = []
    first = run_demo(out, SMALL, say=said.append)
    assert len(said) == 2
    base, raw, restored = (load_file(first.files[x] / "model.safetensors") for x in ("base", "raw", "restored"))
    moved = {name for name in raw if not torch.equal(raw[name], base[name])}
    queries_and_keys = {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (2, 5) for x in "qk"}
    assert queries_and_keys < moved
    assert {name for name in raw if not torch.equal(raw[name], restored[name])} <= queries_and_keys
    assert first.files["picture"].read_bytes().startswith(b"\x89PNG")
    assert [probe.step for probe in first.run.probes if probe.weights == "raw"] == [0, 1, 2, 3, 4]
    assert "nothing is known" in first.files["page"].read_text()  # the verdict, and how far it reaches
    assert (first.run.folder / "final/RECOMMENDED").read_text().strip() == first.verdict["folder"]
    assert first.scores["qk_restored"].point == "interpolate alpha 0.6"
    mixed = next(iter(queries_and_keys))
    torch.testing.assert_close(restored[mixed], 0.6 * base[mixed] + 0.4 * raw[mixed])

    report = json.loads((out / "demo.json").read_text())
    assert report["scores"]["raw"]["recall"] == {"256": first.run.probe_of("raw").recall}  # type: ignore[union-attr]
    assert report["losses"] == [list(pair) for pair in first.losses] and len(first.losses) == SMALL.steps
    kept = [json.loads(line) for line in (first.run.folder / "heldout.jsonl").read_text().splitlines()]
    asked = [
        tokenizer(chain.prompt).input_ids
        for chain in islice(problems(SMALL.seed, SMALL.problem_lengths), SMALL.problems)
    ]
    assert sorted(row["input_ids"][: len(ids)] for row, ids in zip(kept, asked, strict=True)) == sorted(asked)

    again = run_demo(out, SMALL)  # replaces the first, and repeats it
    assert again.losses == first.losses
    assert all(
        torch.equal(raw[name], value) for name, value in load_file(again.files["raw"] / "model.safetensors").items()
    )
    other = run_demo(out, replace(SMALL, seed=1))
    assert other.losses != first.losses


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(QKGuardError, match="something other than a demo"):
        run_demo(tmp_path, SMALL)
    with pytest.raises(QKGuardError, match="is a file"):
        run_demo(tmp_path / "thesis.txt", SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(QKGuardError, match="finds no GPU here"):
        run_demo(tmp_path / "new", replace(SMALL, gpu=True))
    assert not (tmp_path / "new").exists()


@pytest.mark.gpu
def test_the_demo_on_a_gpu(tmp_path: Path) -> None:
    report = run_demo(tmp_path / "new", replace(SMALL, gpu=True))
    assert report.scores["before"].mean_recall > 0.9 and len(report.losses) == SMALL.steps


def _key(task: str) -> Any:
    from qkguard.probe.samples import SampleKey

    return SampleKey(600, task, 0.5, 0)
