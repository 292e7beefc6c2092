"""`layers="retrieval"`: which layers a run restores, settled once, before its first step."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qkguard.checkpoint.files import read_json, write_json
from qkguard.distributed import ranks
from qkguard.layout.selection import Selection
from qkguard.probe.retrieval import RetrievalChoice, choose_layers
from qkguard.probe.words import floor_clause
from qkguard.report.run import RETRIEVAL_LAYERS
from qkguard.training.attempt import attempt
from qkguard.training.recall_monitor import RecallMonitor

if TYPE_CHECKING:
    from qkguard.training.adapter_weights import AdapterWeights
    from qkguard.training.full_weights import FullWeights

logger = logging.getLogger(__name__)

WHAT = "choosing the retrieval layers"


def settle_layers(
    weights: FullWeights | AdapterWeights, monitor: RecallMonitor, folder: Path, *, untrained: bool, strict: bool
) -> RetrievalChoice:
    """Choose the layers, keep the choice in the run folder, and have `weights` restore them alone; ALL ranks.

    Rank 0 chooses, all get its choice. Where none can be made, all layers are restored, and the log says why.

    Args:
        untrained: whether no step has been taken: the choice is made from the monitor's baseline. Else it is read from
            the run folder, because the model's weights have moved.
    """
    choice = RetrievalChoice(None, "choosing them failed")
    with attempt(WHAT, strict=strict, advice="All layers are restored."):
        choice = _settled(weights, monitor, folder, untrained)
    if ranks.rank() == 0:
        logger.log(logging.WARNING if choice.layers is None else logging.INFO, "%s", choice.words)
    return choice


def _settled(
    weights: FullWeights | AdapterWeights, monitor: RecallMonitor, folder: Path, untrained: bool
) -> RetrievalChoice:
    """ALL ranks must call this."""
    file = folder / RETRIEVAL_LAYERS
    choose = partial(_from_baseline, monitor, weights.selection) if untrained else partial(_from_file, file)
    choice: RetrievalChoice = ranks.on_rank_zero(WHAT, choose)
    if choice.layers is not None:
        why = ranks.agree(WHAT, partial(weights.restrict, choice.layers))
        choice = replace(choice, layers=None, why=why) if why else choice
    if untrained:
        ranks.on_rank_zero("keeping the retrieval layers", partial(write_json, file, choice.to_json()))
    return choice


def _from_baseline(monitor: RecallMonitor, selection: Selection) -> RetrievalChoice:
    """Rank 0's choice, from the probe before the first step."""
    if monitor.prober is None:
        return RetrievalChoice(None, "recall is not probed before training")
    if monitor.baseline is None:
        return RetrievalChoice(None, "the probe before training failed")
    if monitor.at_floor:
        found = monitor.baseline.total
        return RetrievalChoice(None, floor_clause(found.hits, found.count, "before training the model"))
    return choose_layers(monitor.baseline.retrieval, [spec for spec, _ in selection])


def _from_file(file: Path) -> RetrievalChoice:
    """Rank 0's reading of the choice that this run has made before."""
    data = read_json(file)
    if data is None:
        return RetrievalChoice(None, f"the run folder has no {file.name} from before training")
    return RetrievalChoice.from_json(data)
