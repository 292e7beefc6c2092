"""What a training brings for probes: whether it can have them, and its text to hide needles in."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from qkguard.distributed import ranks, sharding
from qkguard.errors import QKGuardError
from qkguard.offline.task_rows import sampled
from qkguard.probe.haystack import Prose, load_prose
from qkguard.probe.prober import Prober
from qkguard.probe.settings import ProbeSettings, check_lengths, lengths_left_out
from qkguard.training.agreed_probe import TIMEOUT

if TYPE_CHECKING:  # pydantic doubles the time that `from qkguard import QKGuardCallback` takes
    from qkguard.training.config import QKGuardConfig

logger = logging.getLogger(__name__)

TEXT_ROWS = 400  # training examples that a haystack is made of, at most


def why_not(config: QKGuardConfig, args: Any, model: Any, tokenizer: Any, lengths: list[int]) -> str | None:
    """What keeps probes off in this training, in a clause that says what to do; None where nothing does."""
    if config.probe_steps == 0:
        return "probe_steps is 0"
    if tokenizer is None or not hasattr(getattr(tokenizer, "tokenizer", tokenizer), "decode"):
        return "the trainer has no tokenizer; give it one as processing_class"
    if not lengths:
        return f"{lengths_left_out(model, getattr(args, 'max_length', None))}; set probe_lengths"
    if _splits_sequences(args):
        return "sequence or context parallel training splits sequences over ranks; use `qkguard probe` on checkpoints"
    if not sharding.can_settle(model):
        return "this DeepSpeed engine hides its ZeRO-3 state; use `qkguard probe` on checkpoints"
    return None


def _splits_sequences(args: Any) -> bool:
    parallel = getattr(args, "parallelism_config", None)
    sizes = [getattr(parallel, name, None) or 1 for name in ("cp_size", "sp_size")]
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is not None:
        sizes.append(deepspeed.get_value("sequence_parallel_size") or 1)
    return any(size > 1 for size in sizes)


def make_prober(config: QKGuardConfig, model: nn.Module, tokenizer: Any, lengths: list[int], dataset: Any) -> Prober:
    """A prober with its first samples made; ALL ranks must call this."""
    haystack: Any = config.haystack
    if haystack is None:  # rank 0's rows: data sets may differ from rank to rank, the samples must not
        haystack = ranks.on_rank_zero("reading the training text", partial(training_prose, dataset, tokenizer))
    settings = ProbeSettings(
        lengths,
        config.probe_depths,
        config.probe_samples,
        config.probe_tasks,
        haystack,
        haystack_per=config.haystack_per,
    )

    def make() -> Prober:
        for warning in check_lengths(model, lengths):
            if ranks.rank() == 0:
                logger.warning("%s", warning)
        prober = Prober(tokenizer, settings)
        prober.prepare_formats(ranks.rank(), ranks.world_size())
        return prober

    return ranks.agree("making the probe's samples", make, timeout=TIMEOUT)


def training_prose(dataset: Any, tokenizer: Any) -> Prose:
    """Sentences of the run's own training text, decoded; generated ones where its rows are not looked at."""
    decoder = getattr(tokenizer, "tokenizer", tokenizer)

    def decode(tokens: list[int]) -> str:
        return str(decoder.decode(tokens, skip_special_tokens=True))

    rows = sampled(dataset, TEXT_ROWS)
    try:
        return load_prose(rows, without=decoder.all_special_tokens, decode=decode, origin="training text")
    except QKGuardError:  # no rows, or no text in them
        return Prose()
