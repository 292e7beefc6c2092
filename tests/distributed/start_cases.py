"""Starting weights on real ranks: what a loader left random stops all of them at step 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qkguard import QKGuardCallback, QKGuardError
from qkguard.distributed import ranks
from tests.distributed.cases import base_model, deepspeed_config, rank, reset
from tests.distributed.launch import sharding_of
from tests.support.training import arguments, train


def random_mlp(folder: Path, backend: str, *flags: str) -> None:
    """One MLP weight left random: every rank refuses, by name; the same model as it was loaded is trained."""
    base = base_model(folder, "llama")
    options: dict[str, Any] = {"max_steps": 1, "save_strategy": "no"}
    if backend.startswith("zero"):
        options["deepspeed"] = deepspeed_config(int(backend[-1]), "default" not in flags)
    settings: dict[str, Any] = {"probe_steps": 0, "final_export": False, "strict": True}
    for damaged in (True, False):
        reset()
        model = AutoModelForCausalLM.from_pretrained(base)
        if damaged:  # the same on all ranks, as a loader's seed would be
            weight = model.model.layers[2].mlp.up_proj.weight
            with torch.no_grad():
                weight.copy_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        guard = QKGuardCallback(**settings)
        with sharding_of(backend):
            args = arguments(folder / str(damaged), **options)
            if damaged:
                with pytest.raises(QKGuardError, match=r"1 of \d+ parameters .*layers\.2\.mlp\.up_proj\.weight"):
                    train(base, args, guard, model=model)
            else:
                train(base, args, guard, model=model)
                assert guard.session is not None and guard.session.pending is not None
                if ranks.rank() == 0:
                    compared = str(guard.session.pending.compared)
                    assert f"equal to {base}" in compared and "not compared" not in compared
        ranks.on_rank_zero("the next half", rank)
