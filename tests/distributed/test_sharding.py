"""The sharding seam: tiles that count every element once, and placements that are refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from qkguard import QKGuardCallback
from qkguard.distributed import ranks, sharding
from qkguard.errors import QKGuardError
from qkguard.layout import find_attention
from tests.support.models import tiny_model


@pytest.fixture
def world(monkeypatch):
    def set_world(size: int, rank: int) -> None:
        monkeypatch.setattr(ranks, "world_size", lambda: size)
        monkeypatch.setattr(ranks, "rank", lambda: rank)

    return set_world


@pytest.fixture
def one_rank_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def zero3_param(full: torch.Tensor, size: int, rank: int) -> nn.Parameter:
    """A parameter as DeepSpeed leaves it: this rank's flat piece, the last ones padded (with NaN, to be noticed)."""
    per = -(-full.numel() // size)
    padded = torch.full((per * size,), float("nan"))
    padded[: full.numel()] = full.flatten()
    param = nn.Parameter(torch.empty(0))
    param.ds_tensor = padded[rank * per : (rank + 1) * per].clone()
    param.ds_tensor.final_location = "not-nvme"  # DeepSpeed's word for CPU offload
    param.ds_shape, param.ds_numel = full.shape, full.numel()
    param.ds_zero_partition_rank, param.ds_zero_partition_world_size = rank, size
    return param


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("kind", ["replicated", "zero3"])
def test_tiles_cover_every_element_once(world, kind, size):
    full = torch.randn(7, 3)
    pieces = []
    for rank in range(size):
        world(size, rank)
        param = nn.Parameter(full) if kind == "replicated" else zero3_param(full, size, rank)
        span = sharding.shard_span(param)
        piece = sharding.read(param, span)
        assert sharding.full_shape(param) == (7, 3) and piece.numel() == span[1] - span[0]
        assert torch.equal(piece, full.flatten()[slice(*span)])
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces), full.flatten()), "padding counted, or an element lost"


def test_a_gathered_zero3_parameter_is_still_read_from_its_partition(world):
    world(2, 1)
    param = zero3_param(torch.arange(6.0), 2, 1)
    param.data = torch.full((6,), -1.0)  # left gathered by a forward pass, stale after the optimizer step
    assert torch.equal(sharding.read(param, sharding.shard_span(param)), torch.tensor([3.0, 4.0, 5.0]))


class One(nn.Module):
    def __init__(self, param, **attributes):
        super().__init__()
        self.register_parameter("weight", param)
        for name, value in attributes.items():
            setattr(self, name, value)


def refusal(param, **attributes) -> str:
    with pytest.raises(QKGuardError) as error:
        sharding.check_supported(One(param, **attributes), ["weight"])
    return str(error.value)


def partition_of(self):
    """DeepSpeed hangs such a function on every parameter."""

    def partition():
        return self

    return partition


def test_refusals_name_what_was_found(world):
    world(4, 0)
    assert "tensor parallel (tp_size=2)" in refusal(nn.Parameter(torch.zeros(4)), tp_size=2)
    part = zero3_param(torch.zeros(8), 2, 0)
    assert "2 of 4 ranks" in refusal(part)
    part = zero3_param(torch.zeros(8), 4, 0)
    sharding.check_supported(One(part), ["weight"])
    part.ds_tensor.final_location = "nvme"
    assert "NVMe" in refusal(part)
    part.ds_tensor.final_location, part.ds_tensor.ds_quant_scale = None, torch.ones(1)
    assert "quantised" in refusal(part)
    del part.ds_tensor.ds_quant_scale
    part.partition = SimpleNamespace  # what is no function of DeepSpeed's says nothing
    sharding.check_supported(One(part), ["weight"])
    part.partition = partition_of(SimpleNamespace(quantized_weights=True))
    assert "zero_quantized_weights" in refusal(part)
    part.partition = partition_of(SimpleNamespace(quantized_weights=False))
    sharding.check_supported(One(part), ["weight"])
    part.ds_zero_param_process_group = object()
    assert "hpZ" in refusal(part)
    assert "meta" in refusal(nn.Parameter(torch.zeros(4, device="meta")))
    sharding.check_supported(One(nn.Parameter(torch.zeros(4, device="meta"))), ["another"])


def test_a_partition_of_deepspeed_before_0_19_3(world):
    """Its parameters do not say where this rank is among the partitions; the object that makes them does."""
    param = zero3_param(torch.arange(6.0), 2, 1)
    param.partition = partition_of(SimpleNamespace(get_partition_rank=lambda: 1, num_partitions=2))
    del param.ds_zero_partition_rank, param.ds_zero_partition_world_size
    world(2, 1)
    sharding.check_supported(One(param), ["weight"])
    assert sharding.shard_span(param) == (3, 6)
    assert torch.equal(sharding.read(param, (3, 6)), torch.tensor([3.0, 4.0, 5.0]))
    world(4, 1)  # the twin: MiCS
    assert "2 of 4 ranks" in refusal(param)


class XlaFullyShardedDataParallel(nn.Module):
    """A class of that name which is not torch's, as torch_xla and fairscale have them."""


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_is_refused_by_name_with_the_way_to_fsdp2(original, one_rank_group, tmp_path):
    whole, options = tiny_model("llama"), {"use_orig_params": original, "device_id": torch.device("cpu")}
    wrapped = FullyShardedDataParallel(tiny_model("llama"), **options)
    inner = tiny_model("llama")
    inner.model.layers[0] = FullyShardedDataParallel(inner.model.layers[0], **options)
    other = nn.Sequential(XlaFullyShardedDataParallel())
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    for model in (wrapped, inner, other):
        with pytest.raises(QKGuardError, match=r"FSDP1 .*FullyShardedDataParallel.*fsdp_version: 2") as error:
            QKGuardCallback(probe_steps=0).on_train_begin(args, TrainerState(), TrainerControl(), model=model)
        assert "another model" not in str(error.value)
    sharding.refuse_wrappers(whole)


def test_tensor_parallel_layers_are_refused_by_name():
    model = tiny_model("llama")
    sharding.refuse_wrappers(model)
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.tensor_model_parallel = True
    with pytest.raises(QKGuardError, match=r"layers\.1\.self_attn\.q_proj\.weight is tensor parallel \(DeepSpeed"):
        sharding.refuse_wrappers(model)


def test_a_module_that_packs_its_weight_is_named():
    """What no name is known for: the message says which class it is, and leaves open what is wrong."""

    class Packed(nn.Linear):
        pass

    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj = Packed(64, 32)
    with pytest.raises(QKGuardError, match=r"shape \(64, 64\), the model has \(32, 64\) in a .*Packed; either"):
        find_attention(model)


def test_dtensor_placements(one_rank_group, world):
    def placed(placement, *names):
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=names or None)
        return nn.Parameter(distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [placement]))

    for placement in (Shard(0), Replicate()):
        param = placed(placement)
        sharding.check_supported(One(param), ["weight"])
        assert sharding.shard_span(param) == (0, 12)
        assert torch.equal(sharding.read(param, (3, 7)), torch.arange(3.0, 7.0))
    assert "Shard(dim=1)" in refusal(placed(Shard(1)))
    assert "tensor parallel (mesh ('tp',))" in refusal(placed(Shard(0), "tp"))
    sharded = placed(Shard(0))
    world(2, 0)
    assert "mesh of 1 of 2 ranks" in refusal(sharded)


def test_hsdp_replicas_share_a_shard_without_overlap(monkeypatch):
    """2 x 2 ranks, replicate x shard of 5 rows: the four tiles make the parameter once."""
    spans = []
    for replica in range(2):
        for shard in range(2):
            mesh = SimpleNamespace(size=lambda axis=None: 2, get_local_rank=lambda axis, at=(replica, shard): at[axis])
            param = SimpleNamespace(
                device_mesh=mesh, placements=(Replicate(), Shard(0)), shape=torch.Size((5, 3)), ndim=2
            )
            monkeypatch.setattr(sharding, "DTensor", SimpleNamespace)
            spans.append(sharding.shard_span(param))
    assert sorted(spans) == [(0, 5), (5, 9), (9, 12), (12, 15)]


def test_unwrap_finds_the_model_inside_its_wrappers():
    inner = nn.Linear(2, 2)
    assert sharding.unwrap(inner) is inner
    assert sharding.unwrap(nn.DataParallel(inner)) is inner
    assert sharding.unwrap(torch.compile(inner)) is inner
