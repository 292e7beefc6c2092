"""Teacher forcing, generation and RULER's match on real tasks: the demo's hybrid with damaged attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qkguard.demo
from qkguard.errors import QKGuardError
from qkguard.probe.answer_formats import BEFORE, BETWEEN
from qkguard.probe.generation import answer_prompts, generate, generated, read_prompts, ruler_match
from qkguard.probe.prober import Prober
from qkguard.probe.prompt import AnswerFormat
from qkguard.probe.settings import ProbeSettings
from qkguard.probe.tasks import TASKS, example
from tests.support.probing import damage_until_some_are_wrong
from tests.support.smollm2 import load_smollm2

DEMO = Path(qkguard.demo.__file__).parent / "model"


def load(folder: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def says_the_answer(prober: Prober, model: nn.Module, new_tokens: int) -> list[tuple[bool, str]]:
    """By transformers' `generate`: whether its first tokens are the answer in one of the formats, and all it says."""
    out = []
    encoder = prober.maker.encoder
    for key in prober.sample_keys:
        sample = prober.maker.make(key)
        ids = sample.prompt[None].long()
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        said = said[0, ids.shape[1] :].tolist()
        formats = [AnswerFormat(b, *j) for b in BEFORE for j in BETWEEN] + [prober.maker.formats[key.task]]
        answers = [encoder.answer_ids(sample.prefix, form.render(sample.answers)) for form in formats]
        out.append((any(said[: len(a)] == a for a in answers), encoder.decode(said)))
    return out


def check_against_generation(prober: Prober, model: nn.Module, new_tokens: int) -> None:
    result = prober.run(model)
    truth = says_the_answer(prober, model, new_tokens)
    assert list(result.correct) == [right for right, _ in truth]
    scores = [
        ruler_match(text, prober.maker.make(c).answers) for c, (_, text) in zip(prober.sample_keys, truth, strict=True)
    ]
    assert all(score == 1 for score, right in zip(scores, result.correct, strict=True) if right)
    told = generated(model, prober, result, new_tokens=new_tokens)
    assert told["contradicted"] == 0
    assert told["found_otherwise"] == sum(s == 1 and not r for s, r in zip(scores, result.correct, strict=True))
    assert told["scores"] == scores and told["recall"] == sum(scores) / len(scores)


def test_a_damaged_hybrid_is_judged_as_generation_judges_it() -> None:
    model, tokenizer = load(DEMO)
    prober = Prober(
        tokenizer, ProbeSettings(lengths=[300, 400], depths=3, samples=2, tasks=["mk1", "mk2"], attention=False)
    )
    prober.find_formats(model)
    damage_until_some_are_wrong(model, prober, 0.5)
    check_against_generation(prober, model, 12)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["plain", "chat"])
def test_a_damaged_pretrained_model_is_judged_as_generation_judges_it(mode: str) -> None:
    model, tokenizer = load_smollm2()
    prober = Prober(
        tokenizer,
        ProbeSettings(lengths=[400], depths=2, samples=2, tasks=["s2", "s3", "mk1"], mode=mode, attention=False),
    )
    prober.find_formats(model)
    damage_until_some_are_wrong(model, prober, 0.25)
    check_against_generation(prober, model, 40)


def test_an_undamaged_hybrid_recalls() -> None:
    model, tokenizer = load(DEMO)
    prober = Prober(tokenizer, ProbeSettings(lengths=[300, 400], depths=3, samples=2, tasks=["mk1", "mk2"]))
    result = prober.run(model)
    assert result.recall > 0.9 and result.answer_logprob > -0.2
    assert result.attention is not None and result.attention.strongest() > 0.5
    damage_until_some_are_wrong(model, prober, 0.5)
    harmed = prober.run(model)
    assert harmed.drop_since(result).is_alarming(0.1)
    assert harmed.attention.strongest() < result.attention.strongest()


def harness_match(said: str, outputs: list[str]) -> float:
    """string_match_all over one prediction, as in RULER's and lm-evaluation-harness's evaluation code."""
    said = "".join("\n" if ord(c) < 32 else c for c in said.strip()).strip()
    return sum(1.0 if r.lower() in said.lower() else 0.0 for r in outputs) / len(outputs)


@pytest.mark.parametrize(
    ("said", "outputs"),
    [
        (": 1234567.", ["1234567"]),
        (" 123456", ["1234567"]),
        ("\x00 AB-cd\x01", ["ab-CD"]),
        ("1111111, and 3333333", ["1111111", "2222222", "3333333", "4444444"]),
        ("", ["1"]),
        ("12\n34567", ["1234567"]),
    ],
)
def test_rulers_match(said: str, outputs: list[str]) -> None:
    assert ruler_match(said, outputs) == harness_match(said, outputs)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    model, tokenizer = load(DEMO)
    encoder = Prober(tokenizer, ProbeSettings(lengths=[300], tasks=["s1"])).maker.encoder
    rows = []
    for i, name in enumerate(["single_1", "multikey_1", "single_2"]):
        from random import Random

        text, answers = example(TASKS[name], Random(i), 12)
        question, prefix = text.split("provided text? ")
        rows.append(
            {"input": f"{question}provided text?", "gen_prefix": prefix, "outputs": list(answers), "max_length": 512}
        )
    rows.append({"input": rows[0]["input"] + " " + rows[0]["gen_prefix"], "outputs": ["0000000"]})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = answer_prompts(model, encoder, read_prompts(tmp_path / "p.jsonl"), new_tokens=9)
    assert [row["score"] for row in found] == [1.0, 1.0, 1.0, 0.0]
    assert found[0]["said"] == found[3]["said"] and found[0]["length"] == 512


def test_generation_is_the_same_in_batches() -> None:
    model, tokenizer = load(DEMO)
    maker = Prober(tokenizer, ProbeSettings(lengths=[300, 310], depths=2, samples=2, tasks=["s1"])).maker
    prompts = [
        maker.make(c).prompt.tolist()
        for c in Prober(tokenizer, ProbeSettings(lengths=[300, 310], depths=2, tasks=["s1"])).sample_keys
    ]
    together = generate(model, maker.encoder, prompts, 9)
    assert together == [generate(model, maker.encoder, [p], 9)[0] for p in prompts]
    assert len(set(together)) == len(prompts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON lines"),
        ('{"input": "x"}', "expected JSON lines"),
        ("", "no prompts"),
        (None, "give a JSON-lines file"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(QKGuardError, match=message):
        read_prompts(tmp_path / "p.jsonl")
