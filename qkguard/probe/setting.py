"""What a training brings for probes: whether it can have them, and its text to hide needles in."""

from __future__ import annotations

from typing import Any

from qkguard import sharding
from qkguard.config import QKGuardConfig
from qkguard.errors import QKGuardError
from qkguard.probe.haystack import Prose, load_prose

TEXT_ROWS = 400  # training examples that a haystack is made of, at most


def why_not(config: QKGuardConfig, args: Any, model: Any, tokenizer: Any, lengths: list[int]) -> str | None:
    """What keeps probes off in this training, in a clause that says what to do; None where nothing does."""
    if config.probe_steps == "0":
        return "probe_steps is 0"
    if tokenizer is None or not hasattr(getattr(tokenizer, "tokenizer", tokenizer), "decode"):
        return "the trainer has no tokenizer; give it one as processing_class"
    if not lengths:
        return "no default length fits the model's max_position_embeddings; set probe_lengths"
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


def training_prose(dataset: Any, tokenizer: Any) -> Prose:
    """Sentences of the run's own training text: rows of a `datasets.Dataset` taken from everywhere, decoded.

    Other kinds of data sets are left alone: reading them may use up their rows or random numbers.
    """
    if not type(dataset).__module__.startswith("datasets.") or not hasattr(dataset, "__getitem__"):
        return Prose()
    plain = dataset.with_format(None)
    rows = (plain[i] for i in range(0, len(plain), max(1, len(plain) // TEXT_ROWS)))
    decoder = getattr(tokenizer, "tokenizer", tokenizer)

    def decode(tokens: list[int]) -> str:
        return str(decoder.decode(tokens, skip_special_tokens=True))

    try:
        return load_prose(rows, without=decoder.all_special_tokens, decode=decode, origin="training text")
    except QKGuardError:
        return Prose()
