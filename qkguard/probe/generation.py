"""RULER's own way: let the model generate, look for the values in what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkguard.errors import QKGuardError
from qkguard.probe.passes import input_device, undisturbed
from qkguard.probe.prober import Prober
from qkguard.probe.prompt import Encoder
from qkguard.probe.results import ProbeResult
from qkguard.probe.settings import Progress

NEW_TOKENS = 128  # what RULER lets a model say


@dataclass(frozen=True)
class Prompt:
    """A question from elsewhere (RULER's or lm-evaluation-harness's files), with the values that must be named."""

    text: str
    prefix: str
    answers: tuple[str, ...]
    length: int
    name: str = ""


def ruler_match(said: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in a generated text, as RULER's `string_match_all` counts it, case ignored."""
    text = re.sub(r"[\x00-\x1f]", "\n", said.strip()).strip().lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def generate(model: nn.Module, encoder: Encoder, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
    """Greedy continuations by the model's own `generate`; prompts of one length go together, unpadded."""
    said = [""] * len(prompts)
    same: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        same.setdefault(len(prompt), []).append(i)
    for length, members in same.items():
        ids = torch.tensor([list(prompts[i]) for i in members], device=input_device(model))
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
        for i, row in zip(members, out[:, length:].tolist(), strict=True):
            said[i] = encoder.decode(row)
    return said


def generated(
    model: nn.Module,
    prober: Prober,
    result: ProbeResult,
    new_tokens: int = NEW_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """RULER's metric on the probe's samples, and how it compares with the verdicts of `result`.

    `found_otherwise`: samples right by RULER's match though not by teacher forcing (other words before the answer);
    `contradicted`: the other way round, which a whole model in float32 never shows.
    """
    samples = [prober.maker.make(key) for key in prober.sample_keys]
    scores: list[float] = []
    size = max(1, prober.batch_tokens // max(key.length for key in prober.sample_keys))
    with undisturbed(model):
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            said = generate(model, prober.maker.encoder, [s.prompt.tolist() for s in batch], new_tokens)
            scores += [ruler_match(text, sample.answers) for text, sample in zip(said, batch, strict=True)]
            if progress is not None:
                progress(len(scores), len(samples))
    full = [score == 1 for score in scores]
    pairs = list(zip(full, result.correct, strict=True))
    return {
        "recall": sum(scores) / len(scores),
        "new_tokens": new_tokens,
        "found_otherwise": sum(match and not verdict for match, verdict in pairs),
        "contradicted": sum(verdict and not match for match, verdict in pairs),
        "scores": scores,
    }


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a JSON-lines file with `input`, `outputs` and, where given apart, `gen_prefix` or `answer_prefix`.

    Raises:
        QKGuardError: no such file, or lines without these fields.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines]
        prompts = [
            Prompt(
                row["input"],
                (row.get("gen_prefix") or row.get("answer_prefix") or "").strip(),
                tuple([row["outputs"]] if isinstance(row["outputs"], str) else row["outputs"]),
                int(row.get("max_length") or row.get("length") or 0),
                str(row.get("task", "")),
            )
            for row in rows
        ]
    except OSError as error:
        raise QKGuardError(f"{path}: {error.strerror}; give a JSON-lines file of prompts.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise QKGuardError(
            f"{path}: expected JSON lines with input and outputs, as RULER writes them; found {error}."
        ) from error
    if not prompts or not all(p.answers for p in prompts):
        raise QKGuardError(f"{path}: no prompts, or prompts without outputs.")
    return prompts


def answer_prompts(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    new_tokens: int = NEW_TOKENS,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Generate on prompts from a file; one row per prompt with what was said and RULER's score."""
    rows = []
    template = encoder.template
    with undisturbed(model):
        for done, prompt in enumerate(prompts):
            text = prompt.text
            if prompt.prefix or template.mode == "chat":
                text = template.prompt(prompt.text, prompt.prefix)
            (said,) = generate(model, encoder, [encoder.encode(text)], new_tokens)
            rows.append(
                {
                    "task": prompt.name,
                    "length": prompt.length,
                    "score": ruler_match(said, prompt.answers),
                    "said": said,
                }
            )
            if progress is not None:
                progress(done + 1, len(prompts))
    return rows
