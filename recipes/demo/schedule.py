"""The demo's pretraining schedule: which batch comes next, and how fast is learnt."""

from __future__ import annotations

import math
from random import Random

import torch
from data import HAYSTACKS, Batches
from torch import Tensor

# Lengths of the needle rows by the share of training done: short rows teach retrieval, long ones stretch it.
CURRICULUM = ((0.35, (128, 256)), (0.55, (128, 256, 512)), (0.75, (256, 512, 1024)), (1.0, (256, 512, 1024, 2048)))
ARITHMETIC_ROW = 256


def draw_batch(batches: Batches, rng: Random, done: float, exam: float, args) -> tuple[Tensor, Tensor, float]:
    """Ids, answer mask and the weight of the answers, for a step at the share `done` of training."""
    if rng.random() < args.arithmetic:
        return *batches.arithmetic(max(1, args.tokens // ARITHMETIC_ROW), ARITHMETIC_ROW, exam), 1.0
    length = min(rng.choice(next(lengths for until, lengths in CURRICULUM if done <= until)), args.longest)
    room = length - 2 - len(batches.opening)
    asked = rng.randint(1, max(1, min(4, room // (3 * len(batches.question)))))
    most = (room - asked * len(batches.question)) // len(batches.needle)
    crowded = rng.random() < 0.1  # a haystack made of needles
    keys = most if crowded else rng.randint(min(asked, most), min(6, most))
    ids, mask = batches.needles(max(1, args.tokens // length), length, rng.choice(HAYSTACKS), keys, min(asked, keys))
    return ids, mask, 0.5


def learning_rate(done: float, step: int, peak: float) -> float:
    """Warm-up over 100 steps, constant for the first half, then a cosine down to 2% of the peak."""
    cosine = 1.0 if done < 0.5 else max(0.02, 0.5 * (1 + math.cos(math.pi * (done - 0.5) / 0.5)))
    return peak * min(1.0, (step + 1) / 100) * cosine


def make_optimizer(model, lr: float) -> torch.optim.AdamW:
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=next(model.parameters()).is_cuda)
