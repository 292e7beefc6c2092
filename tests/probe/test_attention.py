"""Attention mass against the eager implementation's full matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qkguard.probe import attention
from qkguard.probe.attention import AttentionRecorder, Target, attention_rows, layer_number
from qkguard.probe.passes import LastLogits, undisturbed
from tests.support.models import SMALL, noised, tiny_config

LENGTH, WINDOW = 90, 12
TARGET = Target(
    rows=((80, 81, 82, 83), (70, 75, 89)),
    needles=(((20, 31),), ((3, 9), (60, 70))),
    weights=(1.0, 1.0),
)
EXTRA: dict[str, Any] = {
    "mistral": SMALL | {"sliding_window": 20, "head_dim": 16},
    "gemma2": SMALL
    | {"sliding_window": 24, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "gemma3_text": SMALL
    | {"sliding_window": 24, "head_dim": 16, "query_pre_attn_scalar": 9}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_oss": SMALL | {"sliding_window": 16, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": SMALL
    | {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 4},
}
CASES = [
    *[("eager", name) for name in ("llama", "gemma2", "gpt_oss", "minimax")],
    *[
        ("sdpa", n)
        for n in ("llama", "qwen3", "gpt_neox", "minimax", "qwen3_next", "mistral", "gemma3_text", "deepseek_v3")
    ],
]


def build(name: str, implementation: str) -> nn.Module:
    config = CONFIG_MAPPING[name](**EXTRA[name]) if name in EXTRA else tiny_config(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return noised(model, seed=2, scale=0.3).eval()  # large weights: attention far from uniform


def ids_of(model: nn.Module) -> Tensor:
    return torch.randint(3, 256, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def full_matrices(model: nn.Module, ids: Tensor, **options: Any) -> list[Tensor]:
    """(batch, heads, queries, keys) of every softmax layer, from an eager copy's `output_attentions`."""
    config = type(model.config).from_dict(model.config.to_dict())
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        maps = twin(input_ids=ids, output_attentions=True, use_cache=False, **options).attentions
    return [m for m in maps if m is not None and m.shape[2:] == (LENGTH, LENGTH)]  # linear layers give their states


def expected(maps: list[Tensor], target: Target = TARGET) -> list[tuple[Tensor, Tensor]]:
    out = []
    for full in maps:
        needle, local = torch.zeros(full.shape[1]), torch.zeros(full.shape[1])
        for item, (rows, needles) in enumerate(zip(target.rows, target.needles, strict=True)):
            for row in rows:
                for start, stop in needles:
                    needle += full[item, :, row, start:stop].sum(-1) / len(rows)
                local += full[item, :, row, max(0, row - WINDOW + 1) : row + 1].sum(-1) / len(rows)
        out.append((needle, local))
    return out


def record(model: nn.Module, ids: Tensor, target: Target = TARGET, chunk: int | None = None) -> AttentionRecorder:
    recorder = AttentionRecorder(model, WINDOW)
    with undisturbed(model), recorder:
        recorder.expect(target)
        LastLogits(model, chunk)(ids, 1, recorder.reached)
    return recorder


def in_order(recorder: AttentionRecorder) -> list[tuple[Tensor, Tensor]]:
    names = sorted(recorder.sums, key=lambda n: layer_number(n) or 0)
    return [(needle.float(), local.float()) for needle, local in (recorder.sums[n].of(0) for n in names)]


@pytest.mark.parametrize(("implementation", "name"), CASES)
def test_masses_equal_the_full_matrix(implementation: str, name: str) -> None:
    model = build(name, implementation)
    ids = ids_of(model)
    truth = expected(full_matrices(model, ids))
    found = in_order(record(model, ids))
    assert len(found) == len(truth) > 0
    for (needle, local), (true_needle, true_local) in zip(found, truth, strict=True):
        assert torch.allclose(needle, true_needle, atol=1e-5) and torch.allclose(local, true_local, atol=1e-5)
    assert sum(float(n.sum()) for n, _ in truth) > 0.1
    moved = Target(TARGET.rows, (((21, 32),), ((4, 10), (61, 71))), TARGET.weights)
    other = in_order(record(model, ids, moved))
    assert any(not torch.allclose(a[0], b[0], atol=1e-4) for a, b in zip(other, truth, strict=True))


def test_head_chunks_and_grouped_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "sdpa")
    whole = in_order(record(model, ids_of(model)))
    monkeypatch.setattr(attention, "_CHUNK", 1)
    for (a, b), (c, d) in zip(in_order(record(model, ids_of(model))), whole, strict=True):
        assert torch.allclose(a, c, atol=1e-7) and torch.allclose(b, d, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_contexts_read_in_chunks_give_the_same_masses(name: str) -> None:
    model = build(name, "sdpa")
    ids = ids_of(model)
    whole, parts = in_order(record(model, ids)), in_order(record(model, ids, chunk=25))
    for (a, b), (c, d) in zip(whole, parts, strict=True):
        assert torch.allclose(a, c, atol=1e-5) and torch.allclose(b, d, atol=1e-5)


def test_padding_masks_are_obeyed() -> None:
    model = build("llama", "sdpa")
    ids = ids_of(model)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    truth = expected(full_matrices(model, ids, attention_mask=mask))
    recorder = AttentionRecorder(model, WINDOW)
    with undisturbed(model), recorder:
        recorder.expect(TARGET)
        recorder.reached(LENGTH)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for found, true in zip(in_order(recorder), truth, strict=True):
        assert torch.allclose(found[0], true[0], atol=1e-5) and torch.allclose(found[1], true[1], atol=1e-5)
    unmasked = in_order(record(model, ids))
    assert not torch.allclose(unmasked[0][0], truth[0][0], atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_do_not_change_and_everything_is_taken_back(implementation: str) -> None:
    model = build("minimax", implementation)
    ids, config = ids_of(model), model.config.to_dict()
    local, shared = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(AttentionInterface._global_mapping)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        recorder = AttentionRecorder(model, WINDOW)
        with recorder:
            recorder.expect(TARGET)
            recorder.reached(LENGTH)
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
            assert ALL_ATTENTION_FUNCTIONS._local_mapping != local
    assert recorder.sums
    with pytest.raises(ZeroDivisionError), AttentionRecorder(model, WINDOW):
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == local and AttentionInterface._global_mapping == shared
    assert model.config.to_dict() == config and model.config._attn_implementation == implementation


def test_other_models_and_uncounted_rows_pass_through() -> None:
    model, other = build("llama", "sdpa"), build("qwen3", "sdpa")
    ids = ids_of(model)
    recorder = AttentionRecorder(model, WINDOW)
    with torch.no_grad(), recorder:
        recorder.expect(TARGET)
        recorder.reached(LENGTH)
        other(input_ids=ids, use_cache=False)
        assert not recorder.sums
    padded = record(model, ids, Target(TARGET.rows, TARGET.needles, (1.0, 0.0)))
    only = record(model, ids[:1], Target(TARGET.rows[:1], TARGET.needles[:1], (1.0,)))
    for (a, b), (c, d) in zip(in_order(padded), in_order(only), strict=True):
        assert torch.allclose(a, c, atol=1e-6) and torch.allclose(b, d, atol=1e-6)


def test_rows_by_hand() -> None:
    query, key = torch.tensor([[[2.0]], [[-1.0]]]), torch.tensor([[[1.0], [3.0]]])
    found = attention_rows(query, key, None, scaling=0.5, sinks=torch.tensor([0.0, 1.0]))
    first = torch.tensor([1.0, 3.0]).exp() / (torch.tensor([1.0, 3.0]).exp().sum() + 1)
    second = torch.tensor([-0.5, -1.5]).exp() / (torch.tensor([-0.5, -1.5]).exp().sum() + torch.e)
    assert torch.allclose(found[:, 0], torch.stack([first, second]))
    capped = attention_rows(query, key, torch.tensor([[True, False]]), scaling=0.5, softcap=1.0)
    assert torch.equal(capped, torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]))


def test_block_masks_of_flex_attention_are_read() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    def near(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (column > row - 7)

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 40, 8, generator=generator) for _ in range(2))
    mask = create_block_mask(near, 1, 1, 40, 40, device="cpu")
    call = attention.AttentionCall("", nn.Identity(), query, key, key, mask, False, {"scaling": 0.3})
    rows = torch.tensor([5, 20, 39])
    found = call.probabilities(0, range(2), rows, rows, torch.arange(40))
    scores = (query @ key.transpose(2, 3) * 0.3)[0][:, rows]
    inside = near(rows, rows, rows[:, None], torch.arange(40)[None])
    assert torch.allclose(found, scores.masked_fill(~inside, -torch.inf).softmax(-1), atol=1e-6)


def test_layer_numbers() -> None:
    assert layer_number("model.layers.11.self_attn") == 11
    assert layer_number("transformer.h.3.attn") == 3
    assert layer_number("conv2d.attn") is None
