"""A probe against transformers' `generate` on the same samples, SmolLM2-135M (real weights), one process.

    python -m pytest -m benchmark -s tests/benchmarks/bench_probe.py
    python -m tests.benchmarks.bench_probe [LENGTH] [SAMPLES] [--device cuda] [--dtype bfloat16]
    python -m tests.benchmarks.bench_probe [LENGTH] [SAMPLES] --haystack-per length [--tasks single_2]

On an accelerator where there is one. Target: at most a third of generating what RULER lets a model say (128 tokens),
attention mass included. SmolLM2-Instruct stops right after its answer; a base model does not, so generation is also
timed without an end. Also printed: what attention mass adds, generating just the answer's tokens, and finding the
answer format, which a run does once.

With a haystack per length: a default probe, of three tasks, five depths and two samples, what they share read once
beside whole passes and generation. Target on one CPU thread at 512 tokens: at most half of a generation that ends.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qkguard.probe import Prober, ProbeSettings
from qkguard.probe.generation import NEW_TOKENS, generated
from qkguard.probe.settings import DEFAULT_TASKS
from tests.support.smollm2 import load_smollm2


def default_device() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def seconds_of(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Wall time until the device has done it, and what it gave; the least of three where a pass takes milliseconds."""
    took = []
    for _ in range(1 if device == "cpu" else 3):
        if device != "cpu":
            torch.accelerator.synchronize()
        began = time.perf_counter()
        out = work()
        if device != "cpu":
            torch.accelerator.synchronize()
        took.append(time.perf_counter() - began)
    return min(took), out


def measure(length: int = 512, samples: int = 6, device: str = "", dtype: str = "") -> dict[str, float]:
    """Seconds of each, all on the same samples. Without `device` an accelerator if there is one, in bfloat16."""
    model, tokenizer, device, dtype = _load(device, dtype)
    print(f"{length} tokens, {samples} samples, {dtype} on {_name(device)}")
    prober = Prober(tokenizer, ProbeSettings(lengths=[length], depths=samples, samples=1, tasks=["single_2"]))
    prober.prepare()
    out: dict[str, float] = {}
    generated(model, prober, prober.run(model), new_tokens=2)  # first passes are slow
    out["answer format"], _ = seconds_of(lambda: prober.find_formats(model), device)
    out["probe"], result = seconds_of(lambda: prober.run(model), device)
    prober.attention = False
    out["without attention mass"], _ = seconds_of(lambda: prober.run(model), device)
    answer = max(prober.maker.make(key).answer_size for key in prober.sample_keys)
    for name, tokens, least in (
        (f"generate, at most {NEW_TOKENS} tokens", NEW_TOKENS, 0),
        (f"generate, {NEW_TOKENS} tokens without an end", NEW_TOKENS, NEW_TOKENS),
        ("generate, the answer's tokens", answer, answer),
    ):
        model.generation_config.min_new_tokens = least
        out[name], told = seconds_of(lambda n=tokens: generated(model, prober, result, new_tokens=n), device)
        if dtype == "float32":  # rounding tells the passes of half-precision models apart
            assert told["contradicted"] == 0
    return out


def measure_shared(
    length: int = 512, samples: int = 2, tasks: str = "", device: str = "", dtype: str = ""
) -> dict[str, float]:
    """Seconds of each, on the samples of a default probe with a haystack per length."""
    model, tokenizer, device, dtype = _load(device, dtype)
    asked = tasks.split(",") if tasks else DEFAULT_TASKS
    prober = Prober(tokenizer, ProbeSettings([length], samples=samples, tasks=asked, haystack_per="length"))
    prober.prepare()
    tokens = length * len(prober.sample_keys)
    print(f"{length} tokens, {len(prober.sample_keys)} samples, {dtype} on {_name(device)}")
    out: dict[str, float] = {}
    out["the first, some samples whole too"], _ = seconds_of(lambda: prober.run(model), device)
    assert prober.sharing is not None and not prober.sharing.refused
    read: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    out["probe"], shared = seconds_of(lambda: prober.run(model), device)
    hook.remove()
    prober.attention = False
    out["without attention mass"], _ = seconds_of(lambda: prober.run(model), device)
    prober.attention, prober.sharing = True, None
    out["whole passes"], whole = seconds_of(lambda: prober.run(model), device)
    out[f"generate, at most {NEW_TOKENS} tokens"], _ = seconds_of(lambda: generated(model, prober, whole), device)
    pairs = list(zip(shared.correct, whole.correct, strict=True))
    apart = max(abs(a - b) for a, b in zip(shared.logprob, whole.logprob, strict=True))
    repeats = 1 if device == "cpu" else 3  # as in `seconds_of`
    print(f"{sum(read) / repeats / tokens:.2f} of {tokens} tokens are read")
    print(f"{sum(a != b for a, b in pairs)} verdicts differ from whole passes, log-probabilities by up to {apart:.1e}")
    return out


def report(seconds: dict[str, float]) -> None:
    for name, value in seconds.items():
        print(f"{name:36} {value:8.3f} s   {value / seconds['probe']:6.2f} x the probe")
    for name in (n for n in seconds if str(NEW_TOKENS) in n):
        print(f"the probe takes {seconds['probe'] / seconds[name]:.2f} of: {name}")


def _load(device: str, dtype: str) -> tuple[Any, Any, str, str]:
    """Model, tokenizer, device and dtype."""
    device = device or default_device()
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    model, tokenizer = load_smollm2(getattr(torch, dtype))
    return model.to(device).eval(), tokenizer, device, dtype


def _name(device: str) -> str:
    return (
        torch.cuda.get_device_name() if device.startswith("cuda") else f"{device}, {torch.get_num_threads()} threads"
    )


@pytest.mark.benchmark
def test_probe_against_generate() -> None:
    seconds = measure()
    report(seconds)
    assert all(value > 0 for value in seconds.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("length", type=int, nargs="?", default=512)
    parser.add_argument("samples", type=int, nargs="?", help="default: 6 depths, or 2 at every task and depth")
    parser.add_argument("--device", default="")
    parser.add_argument("--dtype", default="", choices=["", "float32", "bfloat16", "float16"])
    parser.add_argument("--haystack-per", default="sample", choices=["sample", "length"])
    parser.add_argument("--tasks", help="with a haystack per length; by default a probe's")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    work = measure_shared if given.pop("haystack_per") == "length" else measure
    report(work(**given))
