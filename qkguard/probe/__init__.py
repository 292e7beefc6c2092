"""Recall probes: needle-in-a-haystack tasks, scored by one forward pass per sample.

Pure: no configuration, no pages, no files of runs. May import `distributed` and the rooms below it. Public:
`prober.probe`, `prober.Prober`, `settings.ProbeSettings`, `results.ProbeResult`. A needle goes from `tasks` (text) to
`samples` (tokens), `scoring` (forward passes) and `results`; `Prober` leads it through.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkguard.probe.prober import Prober, probe
    from qkguard.probe.prompt import AnswerFormat
    from qkguard.probe.results import AttentionMass, Drop, ProbeResult
    from qkguard.probe.settings import ProbeSettings

_HOMES = {
    "AnswerFormat": "prompt",
    "AttentionMass": "results",
    "Drop": "results",
    "ProbeResult": "results",
    "ProbeSettings": "settings",
    "Prober": "prober",
    "probe": "prober",
}

__all__ = ["AnswerFormat", "AttentionMass", "Drop", "ProbeResult", "ProbeSettings", "Prober", "probe"]


def __getattr__(name: str) -> Any:
    """Loaded when first used: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
