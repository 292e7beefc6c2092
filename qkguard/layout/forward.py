"""Get a weightless model to run: which inputs it wants, and real tensors where it insists on values."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout.build import BY_HAND, first_line
from qkguard.layout.capture import ATTENTION_NAME, Seen, attend_with, watching
from qkguard.layout.materialise import Fill, materialised
from qkguard.layout.trace import Trace

TOKENS = 4
LONG = 64
NOTHING = "no softmax attention was seen"
# Types of transformers that are known to have nothing to find.
WITHOUT = dict.fromkeys(
    ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), "is recurrent throughout and has no softmax attention"
) | {
    "reformer": "attends within hash buckets and chunks, which gives no query-key softmax over the sequence to restore"
}


@contextlib.contextmanager
def attended(model: nn.Module) -> Iterator[tuple[Trace, list[Seen]]]:
    """One forward pass of a meta copy on text, and the attentions seen in it.

    On meta, through the attention function where the model knows it and eagerly where not; at last, for models whose
    way depends on values, on the CPU with parameters that take no memory (which stay in place while the block runs).

    Raises UnknownLayoutError where nothing runs or nothing attends.
    """
    config: Any = model.config
    if known := WITHOUT.get(config.model_type):
        raise UnknownLayoutError(
            f"{type(model).__name__} {known}; for queries and keys to guard, choose a model with softmax attention"
        )
    failures: list[str] = []
    for device in ("meta", "cpu"):
        with contextlib.ExitStack() as stack:
            if device == "cpu":
                stack.enter_context(materialised(model, set(), Fill()))
            for inputs, implementation in _attempts(model, device):
                attend_with(model, implementation)
                try:
                    found = _run(model, inputs, device)
                except Exception as error:  # the model's own code: any failure means "try the next way"
                    failures.append(first_line(error))
                    continue
                if found[1]:
                    yield found
                    return
                failures.append(NOTHING)
        if NOTHING in failures:
            break
    raise UnknownLayoutError(_sentence(model, failures))


def _attempts(model: nn.Module, device: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Inputs and attention implementations to try, the usual ones first."""

    tokens_usual = tokens_for(model.config)

    def ids(rows: int = 1, tokens: int = tokens_usual) -> Tensor:
        return torch.zeros(rows, tokens, dtype=torch.long, device=device)

    base: dict[str, Any] = {"input_ids": ids(), "use_cache": False}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        # Another length, so that encoder and cross attention can be told from the decoder's own.
        base |= {"input_ids": ids(tokens=tokens_usual + 2), "decoder_input_ids": ids()}
    yield base, ATTENTION_NAME
    square = torch.zeros(1, 1, tokens_usual, tokens_usual, device=device)
    yield base | {"attention_mask": square}, ATTENTION_NAME  # sparse indexers look into the mask
    yield base | {"attention_mask": torch.ones_like(ids())}, ATTENTION_NAME
    yield base, "eager"
    codebooks = getattr(model.config, "num_codebooks", 1)
    if codebooks > 1:
        yield base | {"input_ids": ids(rows=codebooks)}, ATTENTION_NAME
    yield base | {"input_ids": ids(tokens=LONG)}, ATTENTION_NAME  # whole chunks only


def tokens_for(config: Any) -> int:
    """Sequence length at which everything that feeds queries and keys is at work.

    Layers that attend to a compressed past (DeepSeek-V4) do so from the second full window on.
    """
    windows = [TOKENS]
    for name, value in vars(config.get_text_config(decoder=True)).items():
        if "compress_r" in name:  # compress_rates, compress_ratios, indexer_compress_ratio
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            windows += [2 * rate for rate in values if isinstance(rate, int)]
    return max(windows)


def _run(model: nn.Module, inputs: dict[str, Any], device: str) -> tuple[Trace, list[Seen]]:
    trace = Trace(model)
    trace.activate(inputs)
    with torch.device(device), watching(trace) as seen:
        model(**inputs)
    if "decoder_input_ids" in inputs:
        own, other = inputs["decoder_input_ids"].shape[1], inputs["input_ids"].shape[1]
        seen = [found for found in seen if _tokens(trace, found) in ((own, own), (own, own + other))]
    return trace, seen


def _tokens(trace: Trace, found: Seen) -> tuple[int, int]:
    """Numbers of query and key tokens: the decoder's own, followed by the encoder's where attention merges both."""
    if found.scores is None:
        return trace.tensors[found.query].shape[-2], trace.tensors[found.key].shape[-2]
    queries, keys = trace.tensors[found.scores].shape[-2:]
    return queries, keys


def _sentence(model: nn.Module, failures: list[str]) -> str:
    name = type(model).__name__
    if NOTHING in failures:
        what = f"{name}: {NOTHING} in a forward pass; if it attends in a way of its own, {BY_HAND}"
    else:
        what = f"{name} does not run on text without weights ({'; '.join(dict.fromkeys(failures))}); {BY_HAND}"
    if found := _candidates(model):
        what += f"; by their names these may be queries and keys: {', '.join(found)}"
    return what


def _candidates(model: nn.Module, most: int = 6) -> list[str]:
    """Matrices whose names sound like queries and keys, one entry for all layers: hints for who writes a spec."""
    found: dict[str, str] = {}
    for name, param in model.named_parameters():
        if param.dim() > 1 and re.search(r"(^|[._])(q|k|qk|kv|qkv|query|key)([._]|$)|c_attn|query_key", name):
            general = re.sub(r"(?<=\.)\d+(?=\.)", "{layer}", name)
            found.setdefault(general, f"{general} {tuple(param.shape)}")
    return list(found.values())[:most]
