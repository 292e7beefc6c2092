"""Attention mass against the eager implementation's full matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qkguard.probe import attention
from qkguard.probe import recorder as recording
from qkguard.probe.attention import attention_rows, layer_number
from qkguard.probe.passes import LastLogits, undisturbed
from qkguard.probe.recorder import AttentionRecorder, Target
from tests.support.models import SMALL, noised, tiny_config

LENGTH, WINDOW = 90, 12
TARGET = Target(
    rows=((80, 81, 82, 83), (70, 75, 89)),
    needles=(((20, 31),), ((3, 9), (60, 70))),
    places=(0, 1),
    questions=((45, 46, 60), (64, 68)),
)
COUNTS = ("needle", "chance", "local", "distance")
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


def expected(maps: list[Tensor], target: Target = TARGET) -> list[dict[str, Tensor]]:
    """Per layer, by count, (samples, heads) means over a sample's rows; of the question's under "asked_needle"."""
    out = []
    for full in maps:
        found = {name: torch.zeros(full.shape[:2], dtype=torch.float64) for name in (*COUNTS, "asked_needle")}
        for item, needles in enumerate(target.needles):
            for row in target.rows[item]:
                seen = full[item, :, row].double()
                share = 1 / len(target.rows[item])
                found["needle"][item] += share * sum(seen[:, start:stop].sum(-1) for start, stop in needles)
                found["local"][item] += share * seen[:, max(0, row - WINDOW + 1) : row + 1].sum(-1)
                back = row - torch.arange(LENGTH, dtype=torch.float64)
                found["distance"][item] += share * (seen * back).sum(-1) / seen.sum(-1)
                found["chance"][item] += share * torch.tensor([chance_of(head, needles) for head in seen])
            for row in target.questions[item]:
                seen = full[item, :, row].double()
                share = 1 / len(target.questions[item])
                found["asked_needle"][item] += share * sum(seen[:, start:stop].sum(-1) for start, stop in needles)
        out.append(found)
    return out


def chance_of(seen: Tensor, needles: tuple[tuple[int, int], ...]) -> float:
    """The needle's share of the keys with any probability: no scores here are so far apart that one has none."""
    visible = seen > 0
    return float(sum(visible[start:stop].sum() for start, stop in needles) / visible.sum())


def record(model: nn.Module, ids: Tensor, target: Target = TARGET, chunk: int | None = None) -> AttentionRecorder:
    recorder = AttentionRecorder(model, WINDOW, questions=True)
    with undisturbed(model), recorder:
        recorder.expect(target)
        LastLogits(model, chunk)(ids, 1, recorder.reached)
    return recorder


def in_order(recorder: AttentionRecorder) -> list[dict[str, Tensor]]:
    names = sorted(recorder.sums, key=lambda n: layer_number(n) or 0)
    out = []
    for name in names:
        sums = recorder.sums[name]
        found = dict(zip(COUNTS, sums.of("answer", (0, 1)).unbind(1), strict=True))
        out.append(found | {"asked_needle": sums.of("question", (0, 1))[:, 0]})
    return out


def close(found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]], atol: float) -> dict[str, bool]:
    """By count, whether it is the same in all layers; distances are of the order of LENGTH, the rest of 1."""
    assert len(found) == len(truth) > 0
    scale = {"distance": LENGTH}
    return {
        name: all(
            torch.allclose(a[name], b[name], atol=atol * scale.get(name, 1)) for a, b in zip(found, truth, strict=True)
        )
        for name in truth[0]
    }


@pytest.mark.parametrize(("implementation", "name"), CASES)
def test_counts_equal_the_full_matrix(implementation: str, name: str) -> None:
    model = build(name, implementation)
    ids = ids_of(model)
    truth = expected(full_matrices(model, ids))
    assert all(close(in_order(record(model, ids)), truth, 1e-5).values())
    assert sum(float(layer["needle"].sum()) for layer in truth) > 0.1
    moved = replace(TARGET, needles=(((21, 33),), ((4, 10), (61, 71))))
    other = close(in_order(record(model, ids, moved)), truth, 1e-4)
    assert not other["needle"] and not other["chance"] and not other["asked_needle"]
    later = replace(TARGET, rows=((81, 82, 83, 84), (70, 76, 88)), questions=((45, 47), (63, 68)))
    other = close(in_order(record(model, ids, later)), truth, 1e-4)
    assert not other["local"] and not other["distance"] and not other["asked_needle"]


def test_head_chunks_and_grouped_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "sdpa")
    whole = in_order(record(model, ids_of(model)))
    monkeypatch.setattr(recording, "_CHUNK", 1)
    assert all(close(in_order(record(model, ids_of(model))), whole, 1e-7).values())


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_contexts_read_in_chunks_give_the_same_counts(name: str) -> None:
    model = build(name, "sdpa")
    ids = ids_of(model)
    assert all(close(in_order(record(model, ids, chunk=25)), in_order(record(model, ids)), 1e-5).values())


def test_padding_masks_are_obeyed() -> None:
    model = build("llama", "sdpa")
    ids = ids_of(model)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    truth = expected(full_matrices(model, ids, attention_mask=mask))
    recorder = AttentionRecorder(model, WINDOW, questions=True)
    with undisturbed(model), recorder:
        recorder.expect(TARGET)
        recorder.reached(LENGTH)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert all(close(in_order(recorder), truth, 1e-5).values())
    assert not any(close(in_order(record(model, ids)), truth, 1e-4).values())


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
    padded = record(model, ids, replace(TARGET, places=(0, None)))
    first = [{name: found[:1] for name, found in layer.items()} for layer in in_order(record(model, ids))]
    assert all(close(in_order(padded), first, 1e-6).values())
    assert all(sums.of("answer", (1,)).shape[0] == 0 for sums in padded.sums.values())


def test_totals_are_means_by_length_and_scores_of_right_samples() -> None:
    model = build("llama", "sdpa")
    recorder = record(model, ids_of(model))
    layers = in_order(recorder)
    mass, scores = recorder.read(recorder.totals([70, 90], [False, True]), [70, 90], right=1)
    assert mass is not None and scores is not None and mass.layers == (0, 1, 2, 3) and scores.samples == 1
    for i, layer in enumerate(layers):
        for place, length in enumerate((70, 90)):
            for kind in ("needle", "local", "distance"):
                assert torch.allclose(torch.tensor(getattr(mass, kind)[length][i]).double(), layer[kind][place])
        wanted = (layer["needle"][1] - layer["chance"][1]) / (1 - layer["chance"][1])
        assert torch.allclose(torch.tensor(scores.answer[i]).double(), wanted)
        other = (layer["needle"][0] - layer["chance"][0]) / (1 - layer["chance"][0])
        assert not torch.allclose(torch.tensor(scores.answer[i]).double(), other)
    both, _ = recorder.read(recorder.totals([90, 90], [True, True]), [90, 90], right=2)
    assert both is not None and both.by_layer("distance", 90) == pytest.approx(
        [float(layer["distance"].mean()) for layer in layers]
    )
    assert both.mean("distance") == pytest.approx(sum(both.by_layer("distance", 90)) / 4)


def test_a_module_that_two_layers_share_is_measured_by_the_mean_of_its_calls() -> None:
    model: Any = build("llama", "sdpa")
    model.model.layers[2].self_attn = model.model.layers[1].self_attn
    ids = ids_of(model)
    first, second, third, last = expected(full_matrices(model, ids))
    both = {name: (second[name] + third[name]) / 2 for name in second}
    assert all(close(in_order(record(model, ids)), [first, both, last], 1e-5).values())
    assert not all(close(in_order(record(model, ids)), [first, second, last], 1e-4).values())


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
