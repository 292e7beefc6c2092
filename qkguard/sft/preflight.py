"""What can be checked before any weight is loaded: the model's layout, its tokenizer, the rows, packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkguard.errors import QKGuardError, first_line
from qkguard.layout import AttentionSpec, find_attention, select
from qkguard.layout.architecture import load_config
from qkguard.layout.selection import Selection
from qkguard.probe.prober import Prober
from qkguard.probe.settings import ProbeSettings, default_lengths
from qkguard.sft.arguments import Settings
from qkguard.sft.data import Sampled, look, token_lengths
from qkguard.training.packing import check_packing

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tokenization_*.py")


@dataclass
class Preflight:
    """What was found.

    Attributes:
        config: the model's config.
        specs: its softmax-attention layers.
        selection: the query and key rows that the guard will keep.
        probe_lengths: contexts to probe, in tokens; empty where no default fits the model.
        tokenizer: None where the model's folder has none (a bare config.json).
        sampled: some training rows.
        lengths: their tokens, ascending; empty without a tokenizer.
        warnings: one sentence each.
    """

    config: Any
    specs: list[AttentionSpec]
    selection: Selection
    probe_lengths: list[int]
    tokenizer: Any
    sampled: Sampled
    lengths: list[int]
    warnings: list[str]


def preflight(settings: Settings) -> Preflight:
    """Check everything that needs no weights.

    Raises:
        QKGuardError: no softmax attention, packing that mixes samples, rows or columns that are missing, messages
            without a chat template; all in one line.
    """
    config = model_config(settings)
    specs = find_attention(config, spec=settings.guard.spec, trust_remote_code=settings.trusts_remote_code)
    if not specs:
        raise QKGuardError(
            f"{settings.model_name} ({config.model_type}) has no softmax-attention layer, so there are no queries and "
            "keys to guard; train it with `trl sft`"
        )
    selection = select(specs, settings.guard.rows)
    if not selection:
        raise QKGuardError(
            "No query or key rows are selected; check qkguard.layers, qkguard.projections and "
            "qkguard.include_sliding_window"
        )
    warnings = check_packing(config, settings.training)
    tokenizer = training_tokenizer(settings)
    sampled = look(settings.data, chat=has_template(tokenizer))
    if tokenizer is None:
        warnings.append(
            f"{settings.model_name} has no tokenizer: sample lengths are unknown, and no training can start"
        )
    elif needs_template(sampled) and not has_template(tokenizer):
        raise QKGuardError(
            f"The rows are chats and the tokenizer of {settings.model_name} has no chat template; set "
            "chat_template_path (a .jinja file, or a model that has one), or train on prompt and completion"
        )
    probe_lengths = list(settings.guard.probe_lengths or default_lengths(config, settings.training.max_length))
    if settings.guard.probe_steps != 0 and tokenizer is not None and probe_lengths:
        check_probes(settings, min(probe_lengths), tokenizer)
    lengths = sorted(token_lengths(sampled.rows, tokenizer)) if tokenizer is not None else []
    warnings += cut_warning(lengths, settings.training)
    return Preflight(config, specs, selection, probe_lengths, tokenizer, sampled, lengths, warnings)


def model_config(settings: Settings) -> Any:
    """The model's config: from a folder, a config.json or the hub (`model_revision`).

    Raises:
        QKGuardError: there is none, or its code is its own and not trusted.
    """
    name, revision = settings.model_name, settings.model.model_revision
    trusted = settings.trusts_remote_code
    if revision not in (None, "main"):
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trusted)
        except Exception as error:
            raise QKGuardError(f"No config of {name} at revision {revision}: {first_line(error)}") from error
    return load_config(name, trust_remote_code=trusted)


def training_tokenizer(settings: Settings) -> Any:
    """The model's tokenizer with the chat template the training will use; None where there is no tokenizer."""
    from transformers import AutoTokenizer

    options = {"trust_remote_code": settings.trusts_remote_code}
    path = Path(settings.model_name)
    folder = path.parent if path.suffix == ".json" else path
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), revision=settings.model.model_revision, **options)
    except Exception as error:
        raise QKGuardError(f"The tokenizer of {folder} cannot be loaded: {first_line(error)}") from error
    template = settings.training.chat_template_path
    if template:
        if Path(template).is_file():
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(template, **options).chat_template
    return tokenizer


def check_probes(settings: Settings, shortest: int, tokenizer: Any) -> None:
    """Make the probe samples of the shortest length: the one that tasks may not fit into.

    Raises:
        QKGuardError: they do not fit.
    """
    guard = settings.guard
    asked = ProbeSettings(
        [shortest],
        depths=1,
        samples=1,
        tasks=guard.probe_tasks,
        haystack=guard.haystack,
        haystack_per=guard.haystack_per,
    )
    Prober(tokenizer, asked).prepare()


def has_template(tokenizer: Any) -> bool:
    """Whether there is a tokenizer that can format chats."""
    return bool(getattr(tokenizer, "chat_template", None))


def needs_template(sampled: Sampled) -> bool:
    """Whether the rows are chats, as `messages` or as prompts and completions made of turns."""
    row = sampled.rows[0]
    return sampled.form == "messages" or isinstance(row["prompt"], list)


def cut_warning(lengths: Sequence[int], training: Any) -> list[str]:
    """A sentence where `max_length` cuts samples: their ends, the answers, are then never trained on."""
    limit = training.max_length
    if limit is None or not lengths or (training.packing and training.packing_strategy != "bfd"):
        return []
    cut = sum(n > limit for n in lengths)
    if not cut:
        return []
    share, most = cut / len(lengths), lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
    return [
        f"max_length={limit} cuts {share:.0%} of the samples ({cut} of {len(lengths)} looked at; 95% are at most "
        f"{most:,} tokens, the longest {lengths[-1]:,}): the ends of these chains of thought, with their answers, are "
        "not trained on; raise max_length"
    ]
