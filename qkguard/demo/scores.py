"""What the demo says of each of its three models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkguard.demo.arithmetic import Chain


@dataclass(frozen=True)
class Score:
    """What one model came to: `point` is its name in the verdict, `recall` is by context length in tokens,
    `cot_accuracy` the share of the exam's problems whose whole chain of thought is right.
    """

    point: str
    recall: dict[int, float]
    cot_accuracy: float

    @property
    def mean_recall(self) -> float:
        return sum(self.recall.values()) / len(self.recall)

    def to_json(self) -> dict[str, Any]:
        recall = {str(length): share for length, share in self.recall.items()}
        return {"point": self.point, "recall": recall, "cot_accuracy": self.cot_accuracy}


def cot_accuracy(folder: Path, tokenizer: Any, exam: Sequence[Chain], *, gpu: bool = False) -> float:
    """Share of problems whose chain of thought greedy decoding gets right to the last token."""
    import torch
    from transformers import AutoModelForCausalLM

    from qkguard.choice.task import encode_rows, score_rows

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    rows = [{"prompt": chain.prompt, "answer": chain.completion} for chain in exam]
    encoded, _ = encode_rows(tokenizer, rows, max_length=model.config.max_position_embeddings)
    return score_rows(model.to("cuda" if gpu else "cpu").eval(), encoded).accuracy or 0.0
