"""What a probe asks of a model, and which context lengths fit it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qkguard.errors import QKGuardError
from qkguard.probe.answer_formats import SLACK

DEFAULT_TASKS = ("single_2", "multikey_1", "multikey_2")
"""One needle in prose, and two tasks with many keys: a single needle is still found where several already fail. The
paper's table has S1, S2 and S3."""

SHORT = (512, 1024, 2048)
"""Lengths that are cheap and where recall moves first."""

HAYSTACK_PER = ("sample", "length")

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class ProbeSettings:
    """Which samples a probe asks, and how it runs them. Equal settings and tokenizers give equal samples."""

    lengths: Sequence[int] = SHORT
    """Context lengths in tokens; prompt and answer together have exactly these."""
    depths: int | Sequence[float] = 5
    """A number of evenly spread needle depths, or depths from 0 (start) to 1 (end)."""
    samples: int = 2
    """Samples for every task, length and depth."""
    tasks: Sequence[str] = DEFAULT_TASKS
    """RULER's names (`tasks.TASKS`), or short ones such as "S2"."""
    haystack: Any = None
    """Text for the prose tasks: None (generated), a text, a file, rows of text, or a `haystack.Prose`."""
    seed: int = 0
    """Of the samples."""
    mode: str = "auto"
    """"chat" (the tokenizer's chat template), "plain", or "auto": chat where there is a template."""
    attention: bool = True
    """Whether attention mass and distance are measured in the same passes."""
    questions: bool = False
    """Whether the question's rows are measured too, for the scores of retrieval heads; it costs more than the answer's
    alone."""
    local_window: int = 128
    """How many most recent tokens count as local attention."""
    batch_tokens: int = 16384
    """Tokens in one forward pass, where more than one sample fits."""
    chunk: int | None = None
    """Read longer contexts through the model's cache in pieces of this many tokens."""
    haystack_per: str = "sample"
    """"sample": every sample has a haystack of its own. "length": those of one task and length share one, and where a
    text has several needles, up to four samples ask for one each. What they have in common is read once; as samples
    they are less independent than intervals and alerts take them to be."""


def default_lengths(model: Any, max_length: int | None = None) -> list[int]:
    """512, 1024, 2048, and 2 and 4 times the training's `max_length`, as far as they fit the model (or its config).

    A probe inside the training length alone may rise while recall beyond it collapses. Empty where none fits.
    """
    limit = _limit(model)
    return [n for n in _wanted_lengths(max_length) if limit is None or n <= limit]


def lengths_left_out(model: Any, max_length: int | None = None) -> str | None:
    """A clause on the lengths that `default_lengths` leaves out; None where it leaves out none."""
    limit = _limit(model)
    lost = [str(n) for n in _wanted_lengths(max_length) if limit is not None and n > limit]
    if not lost:
        return None
    does = "length {} does" if len(lost) == 1 else "lengths {} do"
    return (
        f"the default {does.format(', '.join(lost))} not fit the model's {limit} positions (max_position_embeddings)"
    )


def _wanted_lengths(max_length: int | None) -> list[int]:
    return sorted({*SHORT, *(factor * max_length for factor in (2, 4) if max_length)})


def _limit(model: Any) -> int | None:
    limits = [soft_limit(model), hard_limit(model) if isinstance(model, nn.Module) else None]
    return min((n for n in limits if n is not None), default=None)


def check_lengths(model: nn.Module, lengths: Sequence[int]) -> list[str]:
    """Refuse lengths that a model cannot take at all; warn of those beyond what its configuration says.

    Raises:
        QKGuardError: learned position embeddings end before the longest context.
    """
    hard, soft = hard_limit(model), soft_limit(model)
    if hard is not None and hard < max(lengths):
        raise QKGuardError(
            f"The model has learned positions up to {hard + SLACK}, so contexts of {max(lengths)} tokens cannot be "
            f"probed; give lengths up to {hard}."
        )
    if soft is not None and soft < max(lengths):
        return [f"lengths above {soft} tokens are beyond the model's max_position_embeddings"]
    return []


def hard_limit(model: nn.Module) -> int | None:
    """The longest context that learned position embeddings leave room for; None without any."""
    tables = [
        module.num_embeddings - SLACK  # the answer in another format may take a few tokens more
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and name.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings")
    ]
    return min(tables, default=None)


def soft_limit(model: Any) -> int | None:
    """What the configuration of a model, or a configuration, says is the longest context; None where it is silent."""
    config: Any = getattr(model, "config", model)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
