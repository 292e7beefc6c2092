"""What the demo measures on each of its three models: needle recall by length, and whether sums come out right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from qkguard.demo.arithmetic import Chain
from qkguard.probe import Prober, ProbeResult
from qkguard.probe.settings import Progress


@dataclass(frozen=True)
class Scores:
    """`recall` by context length in tokens, `cot_accuracy` of the final answers: shares of samples from 0 to 1.

    `needle_mass`: attention probability that the answer's positions put on the needle, of the head that puts most
    (mean over lengths).
    """

    recall: dict[int, float]
    cot_accuracy: float
    needle_mass: float
    probe: ProbeResult

    @property
    def mean_recall(self) -> float:
        return sum(self.recall.values()) / len(self.recall)

    def to_json(self) -> dict[str, Any]:
        return {
            "recall": {str(length): share for length, share in self.recall.items()},
            "cot_accuracy": self.cot_accuracy,
            "needle_mass": self.needle_mass,
            "probe": self.probe.to_json(),
        }


def measure(model: nn.Module, tokenizer: Any, prober: Prober, chains: Sequence[Chain], progress: Progress) -> Scores:
    """Scores of a model on the samples of `prober` and the problems of `chains`."""
    result = prober.run(model, progress=progress)
    recall = {length: group.recall for (length,), group in result.by("length").items()}
    mass = result.attention.strongest("needle") if result.attention else float("nan")
    return Scores(recall, cot_accuracy(model, tokenizer, chains), mass, result)


@torch.no_grad()
def cot_accuracy(model: nn.Module, tokenizer: Any, chains: Sequence[Chain]) -> float:
    """Share of problems whose greedily generated chain of thought ends in the right answer.

    Problems with equally many variables have prompts of the same length, so they are generated together unpadded.
    """
    model.eval()
    right = 0
    for _, group in groupby(sorted(chains, key=_size), key=_size):
        batch = list(group)
        prompts = tokenizer([chain.prompt for chain in batch], return_tensors="pt")
        written = max(len(ids) for ids in tokenizer([chain.completion for chain in batch])["input_ids"])
        said = model.generate(  # type: ignore[operator]
            input_ids=prompts["input_ids"].to(model.device),
            attention_mask=prompts["attention_mask"].to(model.device),
            max_new_tokens=written + 8,
            do_sample=False,
        )
        for chain, ids in zip(batch, said[:, prompts["input_ids"].shape[1] :], strict=True):
            right += answer_of(tokenizer.decode(ids, skip_special_tokens=True)) == chain.values[-1]
    return right / len(chains)


def answer_of(text: str) -> int | None:
    """The digit after "Answer:" in a generated chain of thought, None where there is none."""
    found = re.search(r"answer:\s*(\d)\b", text.lower())
    return int(found[1]) if found else None


def _size(chain: Chain) -> int:
    return len(chain.names)
