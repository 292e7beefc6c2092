"""Checkpoints loaded to be measured, and probes of them within the accelerator's memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkguard.checkpoint.scaled import describe_quantisation
from qkguard.errors import QKGuardError
from qkguard.probe.passes import check_chunks, input_device, undisturbed
from qkguard.probe.prober import Prober
from qkguard.probe.results import ProbeResult
from qkguard.probe.settings import Progress

CHUNK_ABOVE = 32768  # tokens: longer contexts are read in chunks of this size, where the model's cache allows it

CHUNK_ERROR = 0.05
"""Total variation that reading in chunks may cause in float32. On the models of `tests/probe/test_scoring.py` it is
below 1e-3 (rounding) where the cache can be continued, and above 0.05 where it cannot."""

CHUNK_ERROR_HALF = 0.3
"""The same in bfloat16 and float16, where rounding alone moves outputs somewhat."""

OpenBar = Callable[[str], AbstractContextManager[Progress]]
"""Called with a label, gives a context with a progress function."""


@dataclass(frozen=True)
class LoadOptions:
    """How checkpoints are loaded: `dtype` "auto" is that of the files, `device` "auto" all accelerators."""

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


def no_bar(label: str) -> AbstractContextManager[Progress]:
    """The progress bar of those who want none."""
    return nullcontext(_ignore)


def _ignore(done: int, total: int) -> None:
    pass


def load_tokenizer(folder: Path, options: LoadOptions, fallback: Any = None) -> Any:
    """The tokenizer in a folder, else `fallback`.

    Raises:
        QKGuardError: neither exists.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        if fallback is not None:
            return fallback
        raise QKGuardError(f"{folder}: cannot load a tokenizer: {_line(error)}") from error


def load_model(folder: Path, options: LoadOptions) -> nn.Module:
    """The checkpoint in evaluation mode on the device asked for; "auto" spreads it over all accelerators.

    An adapter comes on top of the base model that it names, of the revision that it names.

    Raises:
        QKGuardError: an unknown dtype, or a folder that does not load or leaves weights random.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    if options.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise QKGuardError(f"Invalid dtype {options.dtype!r}: expected auto, float32, bfloat16 or float16.")
    spread = options.device == "auto" and torch.accelerator.is_available()
    source, revision = folder, None
    try:
        adapted = (folder / "adapter_config.json").is_file()
        if adapted:
            adapter = PeftConfig.from_pretrained(str(folder))
            source, revision = adapter.base_model_name_or_path, adapter.revision
        model = load_whole(
            AutoModelForCausalLM,
            source,
            revision=revision,
            dtype=options.dtype,
            device_map="auto" if spread else None,
            trust_remote_code=options.trust_remote_code,
        )
        if adapted:  # transformers loads adapters too, but leaves DoRA's magnitudes at their starting values
            with _missing_adapter_refused(folder):
                model = PeftModel.from_pretrained(model, folder)
        if options.dtype != "auto" and describe_quantisation(folder):
            _all_in(model, getattr(torch, options.dtype))
        if options.device != "auto":
            nn.Module.to(model, options.device)
        return model.eval()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise QKGuardError(f"{folder}: the model could not be loaded: {_line(error)}") from error


def _all_in(model: nn.Module, dtype: torch.dtype) -> None:
    """A quantised checkpoint that transformers (5.23) dequantises while loading comes in two dtypes; make it one.

    Its plain tensors stay as stored whatever dtype is asked for. A model that runs quantised is left as it is.
    """
    params = [param for param in model.parameters() if param.is_floating_point()]
    if all(param.dtype.itemsize > 1 for param in params):
        nn.Module.to(model, dtype)


def load_whole(loader: Any, source: Any, revision: str | None = None, **options: Any) -> Any:
    """`loader.from_pretrained(source, **options)`, which itself only logs it when weights stay random.

    Raises:
        QKGuardError: a parameter has no tensor in the checkpoint; tied ones need none of their own.
    """
    if revision is not None:
        options["revision"] = revision
    model, info = loader.from_pretrained(source, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        unused = sorted(info["unexpected_keys"])
        also = f" The checkpoint's {unused[0]} fits none of them." if unused else ""
        raise QKGuardError(
            f"{source}: {len(missing)} weights are missing and would be random, first {', '.join(missing[:3])}.{also} "
            "Save the model again with save_pretrained, or name a whole checkpoint."
        )
    return model


@contextmanager
def _missing_adapter_refused(folder: Path) -> Iterator[None]:
    """PEFT (0.18 to 0.21) only warns when weights of an adapter are missing; `from_pretrained` returns no report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise QKGuardError(f"{folder}: weights of the adapter are missing and would be random. Save it again.")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def free_memory() -> None:
    """Give back what models let go of, on the accelerator too."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def choose_chunk(model: nn.Module, prober: Prober, chunk: int | None) -> list[str]:
    """Let long contexts be read in chunks, if the model's cache gives the same answers that way; else a warning.

    `chunk` of None stands for `CHUNK_ABOVE`, 0 for reading whole.
    """
    chunk = CHUNK_ABOVE if chunk is None else chunk
    shortest, longest = prober.sample_keys[0].length, prober.sample_keys[-1].length
    if chunk <= 0 or longest <= chunk:
        return []
    keys = [key for key in prober.sample_keys if key.length == shortest]
    error = 0.0
    with undisturbed(model):
        for key in keys[:: -(-len(keys) // 6)]:  # up to six of them
            sample = prober.maker.make(key)
            ids = sample.ids[None].long().to(input_device(model))
            error = max(error, check_chunks(model, ids, max(16, shortest // 3), sample.answer_size + 1))
    exact = next(model.parameters()).dtype == torch.float32
    if error > (CHUNK_ERROR if exact else CHUNK_ERROR_HALF):
        return [f"the model's cache does not allow reading in chunks (outputs differ by {error:.2f}); reading whole"]
    prober.chunk = chunk
    return []


def run_within_memory(model: nn.Module, prober: Prober, progress: Progress) -> ProbeResult:
    """Run a probe; where the accelerator's memory ends, again with smaller batches.

    Raises:
        QKGuardError: one sample at a time is too much.
    """
    longest = prober.sample_keys[-1].length
    while True:
        try:
            return prober.run(model, progress=progress)
        except torch.OutOfMemoryError as error:
            if prober.batch_tokens <= longest:
                raise QKGuardError(
                    f"Out of memory with one context of up to {longest} tokens. Give shorter --lengths, --chunk 4096, "
                    "or --dtype bfloat16."
                ) from error
            prober.batch_tokens = max(longest, prober.batch_tokens // 2)
        free_memory()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
