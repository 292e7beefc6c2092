"""What the demo does, as settings: chosen for the effect (recipes/demo/README.md says how)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoSettings:
    """How the base is rescaled, how it is trained, and how finely recall is probed.

    `factor` is that of `base.write_base`; `alpha` that of interpolate, by which the run restores; `tolerance` is the
    verdict's. `lengths` are in tokens, with `depths` x `samples` needles per task and length; `looks` probes are
    spread over the training. The exam has `problems`, of `problem_lengths` lines each. `gpu` trains on one; `wandb`
    sends the run to Weights & Biases.
    """

    factor: float = 14.0
    alpha: float = 0.6
    tolerance: float = 0.005
    steps: int = 80
    batch: int = 32
    learning_rate: float = 1e-3
    seed: int = 0
    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: int = 4
    samples: int = 2
    tasks: tuple[str, ...] = ("single_2", "multikey_1")
    looks: int = 4
    problems: int = 64
    problem_lengths: tuple[int, int] = (4, 5)
    gpu: bool = False
    wandb: bool = False
