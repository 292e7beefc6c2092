"""How much of a probe a training can afford: fewer samples first, then fewer lengths. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean
from typing import Any

from qkguard.offline.task_rows import sampled
from qkguard.probe.samples import SampleKey
from qkguard.probe.thinning import Size, size_of, thin

LEAST = 30  # samples: fewer say little of recall (its 95% interval is 35 points wide at one half)
EACH = 8  # of every task and length: below that not even losing all of them is a fall beyond noise
FORWARD_SHARE, CHECKPOINTED_SHARE = 1 / 3, 1 / 4  # of a step's arithmetic per token, without and with checkpointing
MARGIN = 1.5  # a training's length, estimated before its first step, may be off by half
ROWS = 64  # of the data set, whose lengths are looked at


@dataclass(frozen=True)
class Plan:
    """A size, what a pass of it takes in `seconds`, and whether the `passes` fit the budget's share of `training`
    (seconds).
    """

    size: Size
    seconds: float
    passes: int
    training: float
    share: float
    fits: bool

    def tell(self, keys: Sequence[SampleKey]) -> str | None:
        """What is left out of these samples and what the rest costs, in one line; None where all fit."""
        kept = thin(keys, self.size)
        lengths = sorted({key.length for key in kept})
        on = f"{len(kept)} of {len(keys)} samples ({lengths[0]:,}"
        on += f" to {lengths[-1]:,} tokens)" if len(lengths) > 1 else " tokens)"
        costs = f"about {self.seconds:.1f} s each, {self.passes * self.seconds:.1f} s in all"
        long = f"{self.training:.0f} s" if self.training >= 1 else "less than 1 s"
        of = f"probe_budget={self.share:g} of a training of about {long}"
        if not self.fits:
            more = " A larger probe_budget asks more samples, probe_budget=None all." if len(kept) < len(keys) else ""
            return (
                f"The probes before and after training do not fit {of}, and run all the same: {self.passes} passes "
                f"over {on} take {costs}. Set probe_steps=0 for none.{more}"
            )
        if len(kept) < len(keys):
            return (
                f"Probes are cut to {on}, so that the first, the last and those at saves fit {of}: {self.passes} "
                f"passes, {costs}. A larger probe_budget asks more."
            )
        return None


def make_plan(
    keys: Sequence[SampleKey],
    seconds_of: Callable[[Sequence[SampleKey]], float],
    *,
    passes: int,
    at_least: int,
    training: float,
    share: float,
    spent: float,
) -> Plan:
    """The largest size of which `passes` fit the `share` of `training` seconds less those `spent`, else the cheapest
    one with `LEAST` samples.

    A plan that does not fit counts the `at_least` passes that are run all the same.
    """
    allowed = share * training - spent
    cheapest: Plan | None = None
    for size in _sizes(keys):
        seconds = seconds_of(thin(keys, size))
        if passes * seconds <= allowed:
            return Plan(size, seconds, passes, training, share, fits=True)
        if cheapest is None or seconds < cheapest.seconds:
            cheapest = Plan(size, seconds, at_least, training, share, fits=False)
    assert cheapest is not None, "a probe has samples"
    return cheapest


def _sizes(keys: Sequence[SampleKey]) -> Iterator[Size]:
    """All sizes, largest first: fewer samples before fewer lengths, never less than `LEAST` samples in all and `EACH`
    of every task and length, as far as there are so many.
    """
    whole, tasks = size_of(keys), len({key.task for key in keys})
    yield whole
    for lengths in range(whole.lengths, 0, -1):
        least = max(ceil(LEAST / (tasks * lengths)), ceil(EACH / tasks), ceil(EACH / lengths))
        for rounds in range(whole.rounds, least - 1, -1):
            yield Size(lengths, rounds)


# -- costs ---------------------------------------------------------------------------------------------------------


def work(length: int, hidden: int) -> float:
    """What a forward pass over a sequence costs, in units of a token without attention to others.

    A layer's matrices take about 24 hidden^2 operations a token, causal attention 2 length * hidden. Hybrids, whose
    layers are few of them softmax attention, are overestimated at long contexts.
    """
    return length * (1 + length / (12 * hidden))


def work_of(keys: Sequence[SampleKey], hidden: int, world: int) -> float:
    """The work of one rank for these samples, which are divided over `world` ranks."""
    counts = Counter(key.length for key in keys)
    return sum(ceil(count / world) * work(length, hidden) for length, count in counts.items())


def hidden_size(model: Any) -> int:
    """Of a model's configuration; 1024 where it says none, near which small language models begin."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    found = getattr(config, "hidden_size", None)
    return found if isinstance(found, int) and found > 0 else 1024


def row_length(dataset: Any, args: Any) -> int:
    """Tokens of a training row, on average; the training's max_length, or 1024, where rows are not looked at."""
    limit = getattr(args, "max_length", None)
    lengths = [len(row["input_ids"]) for row in sampled(dataset, ROWS) if "input_ids" in row]
    if not lengths:
        return limit or 1024
    return max(1, round(fmean(min(n, limit or n) for n in lengths)))


def work_of_step(args: Any, row: int, hidden: int) -> float:
    """The work of one rank for one optimizer step on rows of `row` tokens."""
    share = CHECKPOINTED_SHARE if args.gradient_checkpointing else FORWARD_SHARE
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return float(rows * work(row, hidden) / share)
