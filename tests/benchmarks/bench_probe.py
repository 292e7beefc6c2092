"""A probe against transformers' `generate` on the same samples, SmolLM2-135M (real weights), float32, one process.

On a GPU where there is one.

    python -m pytest -m benchmark -s tests/benchmarks/bench_probe.py
    python tests/benchmarks/bench_probe.py [LENGTH] [SAMPLES]

Target: at most a third of generating what RULER lets a model say (128 tokens), attention mass included. This model
often ends its answer long before; a base model does not, and so there is a line without an early end. Also printed:
the cost of attention mass alone, against generating just the answer's tokens, and of finding the answer form once.
"""

from __future__ import annotations

import sys
import time

import pytest
import torch

from qkguard.probe import Prober
from qkguard.probe.generation import generated
from tests.smollm2 import load_smollm2


def measure(length: int = 512, samples: int = 6) -> dict[str, float]:
    """Seconds of each, all on the same samples; ratios to the probe with attention mass."""
    model, tokenizer = load_smollm2()
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    prober = Prober(tokenizer, lengths=[length], depths=samples, samples=1, tasks=["single_2"])
    prober.prepare()
    began = time.perf_counter()
    prober.find_forms(model)
    out = {"answer form": time.perf_counter() - began}
    prober.run(model)  # first passes are slow
    result = prober.run(model)
    out["probe"] = result.seconds
    prober.attention = False
    out["without attention mass"] = prober.run(model).seconds
    answer = max(prober.maker.make(cell).answer_size for cell in prober.cells)
    runs = {
        "generate, at most 128 tokens": (128, 0),
        "generate, 128 tokens": (128, 128),
        "generate, the answer's tokens": (answer, 0),
    }
    for name, (tokens, at_least) in runs.items():
        model.generation_config.min_new_tokens = at_least
        began = time.perf_counter()
        told = generated(model, prober, result, new_tokens=tokens)
        out[name] = time.perf_counter() - began
        assert told["contradicted"] == 0
    return out


def report(seconds: dict[str, float]) -> None:
    for name, value in seconds.items():
        print(f"{name:32} {value:7.2f} s   {value / seconds['probe']:5.2f} x the probe")


@pytest.mark.benchmark
def test_probe_against_generate() -> None:
    seconds = measure()
    report(seconds)
    assert all(value > 0 for value in seconds.values())


if __name__ == "__main__":
    report(measure(*map(int, sys.argv[1:])))
