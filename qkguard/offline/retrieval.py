"""Retrieval layers of finished checkpoints: measured in the base by a sweep, or taken from the run that chose them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkguard.checkpoint.files import read_json
from qkguard.choice.candidates import Candidate
from qkguard.errors import QKGuardError
from qkguard.layout.rows import RETRIEVAL, RowSelection
from qkguard.layout.selection import select
from qkguard.offline.task_rows import find_run
from qkguard.probe.retrieval import RetrievalChoice, choose_layers
from qkguard.probe.statistics import at_floor
from qkguard.probe.words import floor_clause
from qkguard.report.run import RETRIEVAL_LAYERS

if TYPE_CHECKING:
    from torch import nn

    from qkguard.probe.results import ProbeResult


def choice_of_run(tuned: str | os.PathLike[str]) -> RetrievalChoice | None:
    """What the guarded run around a checkpoint chose before its first step; None where there is no such choice."""
    run = find_run(Path(tuned))
    data = None if run is None else read_json(run / RETRIEVAL_LAYERS)
    return None if data is None else RetrievalChoice.from_json(data)


def are_wanted(candidates: Sequence[Candidate]) -> bool:
    """Whether one of the candidates restores retrieval layers."""
    return any(candidate.layers == RETRIEVAL for candidate in candidates)


def choose_in_base(base: nn.Module, probe: ProbeResult, rows: RowSelection, spec: Any = None) -> RetrievalChoice:
    """The choice among the selected layers of a loaded base, by a probe of it with `questions`."""
    from qkguard.layout import find_attention  # imports torch, and the model's code from transformers

    found = probe.total
    if at_floor(found.hits, found.count):
        return RetrievalChoice(None, floor_clause(found.hits, found.count))
    try:
        specs = find_attention(base, spec=spec)
    except QKGuardError as error:  # its class may be another than the tuned checkpoint's
        return RetrievalChoice(None, f"the base's layers are not known: {error}")
    return choose_layers(probe.retrieval, [chosen for chosen, _ in select(specs, rows)])


def with_layers(candidates: Sequence[Candidate], choice: RetrievalChoice | None) -> tuple[list[Candidate], list[str]]:
    """The candidates with layer numbers, and warnings: those that no layers can be named for are left out."""
    out, warnings = [], []
    for candidate in candidates:
        if candidate.layers != RETRIEVAL:
            out.append(candidate)
        elif choice is not None and choice.layers is not None:
            out.append(replace(candidate, layers=choice.layers))
        else:
            why = "the base was not probed" if choice is None else choice.why
            warnings.append(f"{candidate.name} is left out: {why}")
    return out, warnings
