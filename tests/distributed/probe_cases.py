"""Probes on real ranks: sharded models, divided samples, the single process's numbers."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import qkguard.demo
from qkguard.distributed import collectives, ranks
from qkguard.probe import Prober, ProbeResult, ProbeSettings
from tests.support.probing import damage_until_some_are_wrong

DEMO = Path(qkguard.demo.__file__).parent / "model"


def probed(folder: Path, backend: str, *flags: str) -> None:
    """The demo's hybrid, queries and keys damaged, on a number of samples that no number of ranks divides."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    damage_until_some_are_wrong(model, new_prober(), 0.5)
    alone = probe(deepcopy(model).eval(), 0, 1)
    sharded = shard(model, backend, "default" in flags)
    for training in (True, False):
        sharded.train(training)
        together = probe(sharded, ranks.rank(), ranks.world_size())
        assert all(m.training is training for m in sharded.modules())
        check(together, alone)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, together.to_json() | {"seconds": 0})
    assert all(result == everyone[0] for result in everyone)


def new_prober() -> Prober:
    from transformers import AutoTokenizer

    prober = Prober(
        AutoTokenizer.from_pretrained(DEMO),
        ProbeSettings(
            lengths=[200, 256],
            depths=[0.1, 0.4, 0.5, 0.6, 0.9],
            samples=1,
            tasks=["mk1", "mk2", "s1"],
            batch_tokens=600,
            questions=True,
        ),
    )
    prober.sample_keys = prober.sample_keys[:-1]  # 29: neither 2 nor 3 ranks share it evenly
    return prober


def probe(model: nn.Module, rank: int, world: int) -> ProbeResult:
    prober = new_prober()
    prober.prepare(rank, world)
    all_reduce: Any = collectives.all_reduce_sum if world > 1 else (lambda vector: vector)
    prober.find_formats(model, rank=rank, world=world, all_reduce=all_reduce)
    return prober.run(model, rank=rank, world=world, all_reduce=all_reduce)


def check(found: ProbeResult, expected: ProbeResult) -> None:
    assert found.sample_keys == expected.sample_keys and found.settings == expected.settings
    assert found.correct == expected.correct
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert found.attention is not None and expected.attention is not None
    for kind in ("needle", "local", "distance"):
        for length, grid in getattr(expected.attention, kind).items():
            for one, other in zip(getattr(found.attention, kind)[length], grid, strict=True):
                assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert found.retrieval is not None and expected.retrieval is not None
    assert found.retrieval.modules == expected.retrieval.modules
    assert 0 < found.retrieval.samples == expected.retrieval.samples == sum(expected.correct) < len(expected.correct)
    for rows in ("answer", "question"):
        for one, other in zip(getattr(found.retrieval, rows), getattr(expected.retrieval, rows), strict=True):
            assert one == pytest.approx(other, abs=1e-6) and max(map(abs, one)) > 1e-3


def shard(model: nn.Module, backend: str, default: bool) -> nn.Module:
    """The model as its owner holds it in training: the module inside DDP or DeepSpeed's engine, or FSDP2's own."""
    if backend == "ddp":
        return nn.parallel.DistributedDataParallel(model).module
    if backend == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (ranks.world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    import deepspeed

    zero: dict[str, Any] = {"stage": int(backend.removeprefix("zero"))}
    if not default:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine.module
