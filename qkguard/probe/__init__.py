"""Recall probes: needle-in-a-haystack tasks, scored by one forward pass per sample.

tasks (text) -> samples (tokens) -> scoring and attention (forward passes) -> results; `Prober` leads through them.
"""

from qkguard.probe.prober import Prober, probe
from qkguard.probe.prompt import AnswerForm
from qkguard.probe.results import AttentionMass, Drop, ProbeResult

__all__ = ["AnswerForm", "AttentionMass", "Drop", "ProbeResult", "Prober", "probe"]
