"""One forward pass of a model without weights: which inputs it accepts, and where it attends."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.errors import UnknownLayoutError, first_line
from qkguard.layout.capture import ATTENTION_NAME, Attention, attend_with, watching
from qkguard.layout.spec_file import BY_HAND
from qkguard.layout.trace import Trace
from qkguard.layout.weightless import Fill, materialised

TOKENS = 4
WHOLE_CHUNKS = 64  # for models that take whole chunks only; their chunks divide it
NOTHING = "no softmax attention was seen"
RECURRENT = "is recurrent throughout and has no softmax attention"
KNOWN_WITHOUT = dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), RECURRENT) | {
    "reformer": "attends within hash buckets and chunks, which gives no query-key softmax over the sequence to restore"
}
"""Types of transformers that are known to have nothing to find, and why."""


@contextlib.contextmanager
def observed(model: nn.Module) -> Iterator[tuple[Trace, list[Attention]]]:
    """One forward pass of a meta copy on text, and the attentions seen in it. Call inside `plain_torch()`.

    On meta; for models whose control flow depends on values, on the CPU with parameters that take no memory, which
    stay in place while the block runs.

    Raises:
        UnknownLayoutError: nothing runs, or nothing attends.
    """
    config: Any = model.config
    if config.model_type in KNOWN_WITHOUT:
        why = KNOWN_WITHOUT[config.model_type]
        raise UnknownLayoutError(f"{type(model).__name__} {why}; choose a model with softmax attention")
    failures: list[str] = []
    for device in ("meta", "cpu"):
        real = materialised(model, set(), Fill()) if device == "cpu" else contextlib.nullcontext()
        with real:
            seen = _first_success(model, device, failures)
            if seen is not None:
                yield seen
                return
        if NOTHING in failures:  # it ran: running it on the CPU would show nothing more
            break
    raise UnknownLayoutError(_refusal(model, failures))


def _first_success(model: nn.Module, device: str, failures: list[str]) -> tuple[Trace, list[Attention]] | None:
    """The first attempt that runs and attends; why the others did not is added to `failures`."""
    for inputs, implementation in _attempts(model, device):
        attend_with(model, implementation)
        try:
            trace, attentions = _run(model, inputs, device)
        except Exception as error:  # the model's own code: whatever it raises, the next way may work
            failures.append(first_line(error))
            continue
        if attentions:
            return trace, attentions
        failures.append(NOTHING)
    return None


def _attempts(model: nn.Module, device: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Inputs and attention implementations to try, the usual ones first."""
    tokens = tokens_for(model.config)

    def ids(rows: int = 1, length: int = tokens) -> Tensor:
        return torch.zeros(rows, length, dtype=torch.long, device=device)

    base: dict[str, Any] = {"input_ids": ids(), "use_cache": False}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        # The encoder gets another length, which tells its own and cross attention from the decoder's.
        base |= {"input_ids": ids(length=tokens + 2), "decoder_input_ids": ids()}
    yield base, ATTENTION_NAME
    square = torch.zeros(1, 1, tokens, tokens, device=device)
    yield base | {"attention_mask": square}, ATTENTION_NAME  # sparse indexers look into the mask
    yield base | {"attention_mask": torch.ones_like(ids())}, ATTENTION_NAME
    yield base, "eager"
    codebooks = getattr(model.config, "num_codebooks", 1)
    if codebooks > 1:
        yield base | {"input_ids": ids(rows=codebooks)}, ATTENTION_NAME
    yield base | {"input_ids": ids(length=WHOLE_CHUNKS)}, ATTENTION_NAME


def tokens_for(config: Any) -> int:
    """The sequence length at which everything that feeds queries and keys is at work.

    Layers that attend to a compressed past (DeepSeek-V4) do so from the second full window on.
    """
    longest = TOKENS
    for name, value in vars(config.get_text_config(decoder=True)).items():
        if "compress_r" not in name:  # compress_rates, compress_ratios, indexer_compress_ratio
            continue
        rates = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        longest = max([longest, *(2 * rate for rate in rates if isinstance(rate, int))])
    return longest


def _run(model: nn.Module, inputs: dict[str, Any], device: str) -> tuple[Trace, list[Attention]]:
    trace = Trace(model)
    trace.add_inputs(inputs)
    with torch.device(device), watching(trace) as attentions:
        model(**inputs)
    if "decoder_input_ids" in inputs:
        own, other = inputs["decoder_input_ids"].shape[1], inputs["input_ids"].shape[1]
        decoder = ((own, own), (own, own + other))  # the second where one attention reads decoder and encoder
        attentions = [attention for attention in attentions if _tokens(trace, attention) in decoder]
    return trace, attentions


def _tokens(trace: Trace, attention: Attention) -> tuple[int, int]:
    """Numbers of query and key tokens."""
    if attention.scores is None:
        return trace.tensors[attention.query].shape[-2], trace.tensors[attention.key].shape[-2]
    queries, keys = trace.tensors[attention.scores].shape[-2:]
    return queries, keys


def _refusal(model: nn.Module, failures: list[str]) -> str:
    name = type(model).__name__
    if NOTHING in failures:
        what = f"{name}: {NOTHING} in a forward pass; if it attends in a way of its own, {BY_HAND}"
    else:
        what = f"{name} does not run on text without weights ({'; '.join(dict.fromkeys(failures))}); {BY_HAND}"
    hints = _likely_names(model)
    return f"{what}; by their names these may be queries and keys: {', '.join(hints)}" if hints else what


def _likely_names(model: nn.Module, most: int = 6) -> list[str]:
    """Matrices whose names sound like queries and keys, one entry for all layers: hints for who writes a spec."""
    found: dict[str, str] = {}
    for name, param in model.named_parameters():
        if param.dim() > 1 and re.search(r"(^|[._])(q|k|qk|kv|qkv|query|key)([._]|$)|c_attn|query_key", name):
            general = re.sub(r"(?<=\.)\d+(?=\.)", "{layer}", name)
            found.setdefault(general, f"{general} {tuple(param.shape)}")
    return list(found.values())[:most]
