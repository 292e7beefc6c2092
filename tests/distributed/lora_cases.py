"""Adapters on real ranks; the cases are of the same form as in `cases.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from qkguard import QKGuardCallback, verify
from qkguard.adapters.drift import AdapterDriftMonitor
from qkguard.adapters.live import adapted_weights
from qkguard.adapters.restored import export_adapter
from qkguard.distributed import sharding
from qkguard.distributed.ranks import Deferred
from qkguard.layout import find_attention, select
from tests.distributed.cases import STEPS, base_model, check_backend, deepspeed_config, rank, reset
from tests.distributed.launch import sharding_of
from tests.support import judge, oracle
from tests.support.lora import LINEAR, expected_merge, peft_merge
from tests.support.models import noised, tiny_model
from tests.support.training import arguments, train

TARGETS = {"phi3": ["qkv_proj", "o_proj"]}


def lora_options(backend: str, flags: tuple[str, ...]) -> dict[str, Any]:
    if not backend.startswith("zero"):
        return {}
    gather = "nogather" not in flags
    return {"deepspeed": deepspeed_config(int(backend[-1]), tight="default" not in flags, gather=gather)}


def lora_config(name: str, flags: tuple[str, ...]) -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS.get(name, LINEAR), use_dora="dora" in flags, task_type="CAUSAL_LM"
    )


def lora(folder: Path, backend: str, name: str, *flags: str) -> None:
    """One guarded training of adapters: drift, restored adapter and merges against stock PEFT's; flags: dora, ..."""
    base = base_model(folder, name)
    guard = QKGuardCallback(strict=True, merge_at_end=True, routing_drift_steps=2)
    with sharding_of(backend):
        args = arguments(folder, **lora_options(backend, flags))
        train(base, args, guard, peft_config=lora_config(name, flags))
    check_backend(guard, backend)
    export_adapter(guard.session.model, "default", folder / "exported")
    if rank() == 0:
        saved, live = (
            load_file(p / "adapter_model.safetensors")
            for p in (folder / f"run/checkpoint-{STEPS}", folder / "exported")
        )
        assert not (wrong := oracle.differences(live, saved)), wrong
        check_lora_run(folder, base, name)
    dist.barrier()


def check_lora_run(folder: Path, base: Path, name: str) -> None:
    reset()  # else loading a model would partition it, which one rank cannot do alone
    run = folder / "run"
    checkpoint, final = run / f"checkpoint-{STEPS}", run / "_qkguard/final"
    peft = peft_merge(base, checkpoint, folder / "peft")
    wanted = expected_merge(name, base, peft)
    assert not (wrong := oracle.differences(oracle.load_folder(final / "merged_raw"), peft)), wrong
    assert not (wrong := oracle.differences(oracle.load_folder(final / "merged_qk_restored"), wanted)), wrong
    verify(final / "merged_qk_restored", full=True)
    if (checkpoint / "qk_restored/default").exists():
        restored = peft_merge(base, checkpoint / "qk_restored/default", folder / "restored")
        assert not (wrong := oracle.differences(restored, wanted)), wrong
        verify(checkpoint / "qk_restored/default")
    before_and_after = (oracle.load_folder(base), peft)
    last = [r for r in judge.metrics_rows(run) if r["step"] == STEPS and "qkguard/drift/routing_rel" in r][-1]
    checked = 0
    for pattern, (dim, ranges) in oracle.ROWS[name].items() if name != "phi3" else ():
        for key in (key for key in before_and_after[0] if re.search(pattern, key)):
            rows = [i for lo, hi in ranges or [(0, before_and_after[0][key].shape[dim])] for i in range(lo, hi)]
            w0, w = (tensors[key].double().numpy()[rows] for tensors in before_and_after)
            want = float(np.linalg.norm(w - w0) / np.linalg.norm(w0))
            got = last[f"qkguard/drift/layer_{key.split('.')[2]}/{key.split('.')[4][0]}_rel"]
            assert abs(got / want - 1) < 1e-4, (key, got, want)  # the merge rounds to float32
            checked += 1
    assert checked or name == "phi3"
    assert not [p.name for p in (run / "_qkguard").iterdir() if p.name.startswith("_")]


def lora_neutral(folder: Path, backend: str, *flags: str) -> None:
    """With and without the guard, and resumed: losses, gradient norms and adapters are bit-identical."""
    base = base_model(folder, "minimax")
    outcomes = []
    for guarded in (False, True):
        part, rows = folder / str(guarded), []
        for steps in (2, 4):
            reset()
            args = arguments(part, max_steps=steps, save_steps=steps, **lora_options(backend, flags))
            guard = QKGuardCallback(strict=True, routing_drift_steps=1) if guarded else None
            trainer = train(base, args, guard, resume=steps == 4, peft_config=lora_config("minimax", flags))
            rows += trainer.recorder.rows
            assert list(trainer.model.peft_config) == ["default"], trainer.model.peft_config
        tensors = load_file(part / "run/checkpoint-4/adapter_model.safetensors")
        bits = {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}
        outcomes.append((rows, bits, torch.get_rng_state().tolist()))
        dist.barrier()
    assert len(outcomes[0][0]) == 4 and outcomes[0] == outcomes[1]


def lora_fsdp2(folder: Path, *flags: str) -> None:
    """FSDP2's row shards: the drift of the whole model to rounding, and its adapter bit for bit."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model: Any = get_peft_model(tiny_model("llama"), lora_config("llama", flags))
    noised(torch.nn.ParameterList([p for n, p in model.named_parameters() if "lora_" in n]), 3, 0.05)
    selection = select(find_attention(model))
    outcomes = []
    for step in range(2):
        if step:
            for layer in model.base_model.model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        assert sharding.backend(model) == ("fsdp2" if step else "replicated")
        tracker = AdapterDriftMonitor(model, selection, adapted_weights(model, selection))
        outcomes.append(tracker.measure(model, Deferred("measuring"), routing=True)[0])
        export_adapter(model, "default", folder / str(step))
    whole, sharded = outcomes
    assert whole.keys() == sharded.keys() and whole["qkguard/drift/q_rel"] > 1e-3
    for key, value in whole.items():
        assert abs(sharded[key] - value) <= 1e-9 * abs(value), (key, value, sharded[key])
    if rank() == 0:
        tensors = [load_file(folder / str(step) / "adapter_model.safetensors") for step in range(2)]
        assert len(tensors[0]) >= 32 and not oracle.differences(*tensors)
    dist.barrier()
