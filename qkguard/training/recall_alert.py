"""The alert on a fall of recall: looked for at every probe of the raw weights, told once, acted on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import TrainerControl

from qkguard.distributed import ranks
from qkguard.probe.alerts import EVERYWHERE, LEAST, Fall, Place, Spending, find_falls, name_of, untested
from qkguard.probe.results import ProbeResult

if TYPE_CHECKING:  # pydantic doubles the time that `from qkguard import QKGuardCallback` takes
    from qkguard.training.config import QKGuardConfig

logger = logging.getLogger(__name__)


class RecallAlert:
    """Looks for falls of recall in one `train()`; all ranks see the same.

    Args:
        config: `recall_alert` and `on_alert`.
        progress: of the training where it begins, 0 unless it is resumed: what was free before was spent before.
    """

    def __init__(self, config: QKGuardConfig, progress: float) -> None:
        self.config = config
        self.spending = Spending(progress / 2)
        self.told: set[Place] = set()

    def look(self, result: ProbeResult, baseline: ProbeResult, progress: float, *, last: bool) -> list[Fall]:
        """Falls since the baseline that noise does not explain, at this look's share of the error."""
        level = self.spending.look(progress, last=last)
        return find_falls(result, baseline, self.config.recall_alert, level)

    def act(self, falls: Sequence[Fall], step: int, control: TrainerControl) -> None:
        """Warn, once of every place, and save or stop where `on_alert` says so."""
        new = {fall.place for fall in falls} - self.told
        self.told |= new
        if not new:
            return
        text = (
            f"{describe(falls, step)} Restored checkpoints have the queries and keys from before SFT; probes at saves "
            "and at the end measure what that brings."
        )
        if ranks.rank() == 0:
            logger.warning("%s", text)
            _wandb_alert(text)
        if self.config.on_alert == "save":
            control.should_save = True
        elif self.config.on_alert == "stop":
            control.should_training_stop = True


def describe(falls: Sequence[Fall], step: int) -> str:
    """Falls in a sentence, the largest first."""
    first, others = falls[0], falls[1:]
    text = (
        f"Recall{first.where} fell from {first.drop.before:.2f} to {first.drop.now:.2f} by step {step} (95% interval "
        f"of the drop: {first.drop.low:.2f} to {first.drop.high:.2f})"
    )
    for fall in others:
        text += f"; {fall.where.strip() or 'overall'} from {fall.drop.before:.2f} to {fall.drop.now:.2f}"
    return f"{text}."


def say_where_impossible(baseline: ProbeResult) -> None:
    """Log where no alert can follow for want of samples."""
    few = untested(baseline.sample_keys)
    if not few or ranks.rank() != 0:
        return
    where = "" if EVERYWHERE in few else ",".join(name_of(place) for place in few)
    logger.warning(
        "No alert on recall is possible%s: there are fewer than %d samples. Set a larger probe_samples or "
        "probe_depths.",
        *(where, LEAST),
    )


def _wandb_alert(text: str) -> None:
    """Tell the open W&B run, if there is one; never in the way of training."""
    wandb = sys.modules.get("wandb")
    if wandb is None or getattr(wandb, "run", None) is None:
        return
    try:
        wandb.run.alert(title="qkguard: recall fell", text=text, level="WARN")
    except Exception as error:
        logger.error("The alert was not sent to W&B (%s).", error)
