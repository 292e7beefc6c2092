"""W_grad and the far share against plain autograd on the full attention matrices of an eager model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import qkguard.demo
from qkguard.diagnosis import logit_gradients
from qkguard.diagnosis.logit_gradients import LayerGradients, LogitGradients
from qkguard.diagnosis.measure import TextRow, measure
from qkguard.errors import QKGuardError
from qkguard.layout import find_attention
from qkguard.probe.passes import IGNORED, undisturbed
from qkguard.probe.prober import Prober
from qkguard.probe.settings import ProbeSettings
from tests.probe.test_attention import EXTRA
from tests.support import zoo
from tests.support.models import noised, tiny_config, tiny_model

TOKENS, FAR, SCALE = 34, 9, 0.25
DEMO = Path(qkguard.demo.__file__).parent / "model"
# Grouped queries, fused and gated projections, NoPE, sliding windows, soft caps, sinks, MLA; eager and sdpa
CASES = [
    *[("sdpa", name) for name in ("llama", "qwen3", "gpt2", "minimax", "qwen3_next", "mistral", "deepseek_v3")],
    *[("eager", name) for name in ("llama", "gemma2", "gpt_oss", "gemma3_text")],
]


def build(name: str, implementation: str) -> nn.Module:
    config = CONFIG_MAPPING[name](**EXTRA[name]) if name in EXTRA else tiny_config(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return noised(model, seed=2, scale=0.2).eval()


def text() -> tuple[Tensor, Tensor]:
    """Token ids, and labels from the middle on."""
    ids = torch.randint(3, 256, (TOKENS,), generator=torch.Generator().manual_seed(1))
    return ids, torch.where(torch.arange(TOKENS) < TOKENS // 2, IGNORED, ids)


@contextmanager
def recorded_scores(tokens: int) -> Iterator[list[Tensor]]:
    """What softmax is given that looks like attention of `tokens` to as many keys."""
    original, seen = nn.functional.softmax, []

    def softmax(scores: Tensor, *args: Any, **options: Any) -> Tensor:
        if scores.dim() == 4 and scores.shape[2] == tokens <= scores.shape[3]:
            seen.append(scores)
        return original(scores, *args, **options)

    nn.functional.softmax = softmax  # type: ignore[assignment]
    try:
        yield seen
    finally:
        nn.functional.softmax = original  # type: ignore[assignment]


def eager_twin(model: nn.Module) -> nn.Module:
    config = type(model.config).from_dict(model.config.to_dict())  # type: ignore[union-attr, operator]
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    return twin


def autograd(model: nn.Module, ids: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(scores, gradient), both (heads, tokens, tokens), of every softmax layer: the full matrices."""
    with recorded_scores(len(ids)) as scores:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    loss = SCALE * sum(
        -logits[t - 1].log_softmax(-1)[label] for t, label in enumerate(labels.tolist()) if label != IGNORED and t
    )
    gradients = torch.autograd.grad(loss, scores, retain_graph=True)
    return list(zip(scores, gradients, strict=True))


def by_distance(gradient: Tensor, looked: Tensor) -> tuple[list[float], list[int]]:
    """Root mean squares and numbers of pairs, pair by pair."""
    values, pairs = [], []
    for distance in range(len(gradient[0])):
        places = [(t, t - distance) for t in range(distance, len(gradient[0])) if looked[t, t - distance]]
        heads = [[float(head[place]) ** 2 for place in places] for head in gradient]
        values.append(sum((sum(h) / max(1, len(h))) ** 0.5 for h in heads) / len(heads))
        pairs.append(len(places))
    return values, pairs


def found_in(model: nn.Module, ids: Tensor, labels: Tensor, far: int = FAR) -> list[LayerGradients]:
    with undisturbed(model):
        return LogitGradients(model, far)(ids, labels, SCALE)


@pytest.mark.parametrize(("implementation", "name"), CASES)
def test_gradients_are_those_of_the_full_matrix(implementation: str, name: str) -> None:
    model = build(name, implementation)
    ids, labels = text()
    truth = autograd(eager_twin(model), ids, labels)
    found = found_in(model, ids, labels)
    assert len(found) == len(truth) > 0
    for layer, (scores, gradient) in zip(found, truth, strict=True):
        looked = scores[0, 0, :, :TOKENS] > -1e30
        values, pairs = by_distance(gradient[0, :, :, :TOKENS], looked & torch.ones(TOKENS, TOKENS).tril().bool())
        assert layer.pairs.tolist() == pairs
        assert np.abs(layer.by_distance - values).max() < 1e-5 * max(1.0, max(values))
        assert max(values) > 1e-3, "gradients that the tolerance would hide"
    other = found_in(model, ids, labels.roll(3))
    assert np.abs(other[-1].by_distance - found[-1].by_distance).max() > 1e-4


def expected_norms(model: nn.Module, ids: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Per layer, the far, near and whole gradient of each of its weights, by autograd through the full matrix."""
    out, params = [], dict(model.named_parameters())
    is_far = torch.arange(len(ids))[:, None] - torch.arange(len(ids)) > FAR
    for spec, (scores, gradient) in zip(find_attention(model), autograd(model, ids, labels), strict=True):
        parts = []
        for mask in (is_far, ~is_far, torch.ones_like(is_far)):
            given = gradient.clone()
            given[..., : len(ids)] *= mask
            names = [p.name for p in spec.params if p.kind == "weight"]
            weights = [params[name] for name in names]
            parts.append(torch.autograd.grad(scores, weights, given, retain_graph=True, materialize_grads=True))
        out.append({name: torch.stack(three) for name, *three in zip(names, *parts, strict=True)})
    return out


@pytest.mark.parametrize("name", ["llama", "minimax", "qwen3_next", "gemma2", "gpt2", "deepseek_v3"])
def test_far_parts_of_the_weights_gradients(name: str) -> None:
    model = build(name, "eager")
    ids, labels = text()
    truth = expected_norms(eager_twin(model), ids, labels)
    for spec, layer, weights in zip(find_attention(model), found_in(model, ids, labels), truth, strict=True):
        squares = {"q": torch.zeros(spec.num_heads + 1, 3), "k": torch.zeros(spec.num_kv_heads + 1, 3)}
        for param in spec.params:
            for block in param.blocks if param.kind == "weight" else ():
                rows = weights[param.name].narrow(param.dim + 1, block.start, block.stop - block.start)
                for role in set(block.role) & set("qk"):
                    squares[role][-1 if block.head is None else block.head] += rows.square().sum((1, 2))
        for role, norms in (("q", layer.q), ("k", layer.k)):
            wanted = squares[role].sqrt().numpy()
            assert norms == pytest.approx(wanted, rel=1e-3, abs=1e-6)
            assert wanted[:, 0].max() > 0 and wanted[:, 1].max() > 0
        assert (layer.q[:, 2] <= layer.q[:, 0] + layer.q[:, 1] + 1e-6).all()
    nothing_far = found_in(model, ids, labels, far=TOKENS)
    assert all(layer.q[:, 0].max() == 0 for layer in nothing_far)


def test_weights_that_layers_share_count_in_each_by_itself() -> None:
    model = zoo.tiny_model("zamba2", "eager")
    ids, labels = text()
    specs = find_attention(model)
    untied = copy.deepcopy(model)
    for module in untied.modules():
        for name, param in list(module._parameters.items()):
            if param is not None:
                module._parameters[name] = nn.Parameter(param.detach().clone())
    names = [f"{spec.module}.q_proj.weight" for spec in specs]
    truth = autograd(untied, ids, labels)
    weights = [untied.get_submodule(spec.module).q_proj.weight for spec in specs]  # type: ignore[union-attr]
    for weight, (scores, gradient), layer in zip(weights, truth, found_in(model, ids, labels), strict=True):
        (whole,) = torch.autograd.grad(scores, [weight], gradient, retain_graph=True)
        adapters = layer.q[-1, 2]  # low-rank matrices beside the shared ones
        by_head = whole.reshape(layer.q.shape[0] - 1, -1).norm(dim=1).numpy()
        assert adapters > 0 and (layer.q[:-1, 2] >= by_head * (1 - 1e-3)).all()
        assert layer.q[:-1, 2] == pytest.approx(by_head, rel=0.5)
    assert len(set(names)) == 3


@pytest.mark.parametrize("block", [1, 700])
def test_blocks_of_queries_add_up(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    model = build("llama", "sdpa")
    whole = found_in(model, *text())
    monkeypatch.setattr(logit_gradients, "_BLOCK", block)
    for one, other in zip(whole, found_in(model, *text()), strict=True):
        assert one.by_distance == pytest.approx(other.by_distance, rel=1e-4, abs=1e-7)
        assert one.q == pytest.approx(other.q, rel=1e-4) and one.k == pytest.approx(other.k, rel=1e-4)


def test_half_precision_is_close() -> None:
    model = tiny_model("qwen3_next").eval()  # without the noise that makes rounding grow from layer to layer
    exact = found_in(model, *text())
    rough = found_in(copy.deepcopy(model).bfloat16(), *text())
    for one, other in zip(exact, rough, strict=True):
        assert other.by_distance == pytest.approx(one.by_distance, rel=0.1, abs=0.02 * one.by_distance.max())
        assert other.by_distance != pytest.approx(one.by_distance, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bloom", "BloomForCausalLM cannot be diagnosed: .* computes its softmax itself"),
        ("falcon", "computes its softmax itself"),
        ("bert", "looks ahead, or attends in a way of its own"),
        ("diffllama", "attends several times"),
        ("deepseek_v4", "keys for 34 tokens"),
        ("mamba", "no softmax attention"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(QKGuardError, match=why):
        found_in(zoo.tiny_model(name, "eager"), *text())


def test_quantised_weights_are_refused() -> None:
    model = build("llama", "sdpa")
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)
    with pytest.raises(QKGuardError, match=r"q_proj\.weight is quantised \(torch\.int8\)"):
        LogitGradients(model, FAR)


REFUSED = {  # of the zoo: types whose softmax is not transformers' own, and those without any
    *("bert", "bert-generation", "big_bird", "bloom", "blt", "camembert", "codegen", "cpmant", "data2vec-text"),
    *("deepseek_v4", "diffllama", "electra", "ernie", "falcon", "falcon_mamba", "gemma3n", "gemma4_assistant"),
    *("gemma4_unified_assistant", "git", "gpt_neo", "gpt_neox_japanese", "gptj", "hrm_text", "inkling2_text", "mamba"),
    *("mamba2", "megatron-bert", "mpt", "musicgen", "musicgen_melody", "mvp", "openai-gpt", "prophetnet", "reformer"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "rwkv", "trocr", "xglm", "xlm"),
    *("xlm-roberta", "xlm-roberta-xl", "xlnet", "xlstm"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(zoo.CONFIGS))
def test_every_type_is_measured_or_refused(name: str) -> None:
    """A layer's output is recomputed in every measurement: what passes is followed exactly."""
    try:
        found = found_in(zoo.tiny_model(name, "eager"), *text())
    except (QKGuardError, ImportError, ValueError):
        assert name in REFUSED
        return
    assert name not in REFUSED
    assert all(layer.by_distance.max() > 0 and layer.q.max() > 0 for layer in found)


# -- on a model that retrieves ---------------------------------------------------------------------------------------


def demo(task: str = "single_2", samples: int = 2) -> tuple[nn.Module, list[TextRow]]:
    """The demo's model, and needle prompts with their answers to be predicted."""
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO).eval()
    prober = Prober(AutoTokenizer.from_pretrained(DEMO), ProbeSettings([256], depths=4, samples=samples, tasks=[task]))
    rows = []
    for key in prober.sample_keys:
        sample = prober.maker.make(key)
        scored = [False] * (len(sample.ids) - sample.answer_size) + [True] * sample.answer_size
        rows.append(TextRow(tuple(sample.ids.tolist()), tuple(scored)))
    return model, rows


def silence(model: nn.Module, layer: int, head: int) -> None:
    """Damage by hand: what a head reads no longer reaches the stream."""
    spec = find_attention(model)[layer]
    columns = slice(head * spec.head_dim, (head + 1) * spec.head_dim)
    with torch.no_grad():
        model.get_parameter(f"{spec.module}.o_proj.weight")[:, columns] = 0


def test_without_the_head_that_looks_far_less_gradient_comes_from_far() -> None:
    model, rows = demo("multikey_2", 4)
    before = measure(model, rows, far=32)
    share = np.stack(before.far_heads) / np.stack(before.all_heads)
    layer, head = (int(v) for v in np.unravel_index(np.stack(before.far_heads).argmax(), share.shape))
    silence(model, layer, head)
    after = measure(model, rows, far=32)
    assert before.far_share.draws is not None and after.far_share.draws is not None
    fall = np.quantile(before.far_share.draws - after.far_share.draws, 0.025)  # on the same rows, drawn alike
    assert fall > 0.02 and after.far_share.value < before.far_share.value - 0.1
    assert after.far_heads[layer][head] == 0 < before.far_heads[layer][head]

    other, _ = demo()  # the twin: without the head that looks nearest the share does not fall so
    near, nearest = (int(v) for v in np.unravel_index(share.argmin(), share.shape))
    silence(other, near, nearest)
    assert measure(other, rows, far=32).far_share.value > after.far_share.value + 0.1


def test_nothing_is_left_behind() -> None:
    model, rows = demo()
    model.train()
    list(model.parameters())[3].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    first = measure(model, rows[:3], far=32)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert model.training and [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert measure(model, rows[:3], far=32).to_json() == first.to_json()
    assert measure(model, rows[3:6], far=32).to_json() != first.to_json()


def test_rows_of_other_lengths_do_not_touch_one_another() -> None:
    model, rows = demo()
    short = TextRow(rows[0].ids[-90:], rows[0].scored[-90:])
    both, alone = measure(model, [short, rows[1]]), measure(model, [rows[1]])
    assert both.rows == 2 and both.tokens == 90 + len(rows[1].ids)
    far = both.gradient[120:250] / alone.gradient[120:250]
    assert far.max() / far.min() == pytest.approx(1, abs=1e-4)  # beyond the short row: the long one's curve alone


def test_the_loss_is_what_training_sums() -> None:
    """`scale` times the summed loss is the gradient of training on one batch of all rows, times the rows."""
    model, rows = demo()
    weight = dict(model.named_parameters())["model.layers.2.self_attn.q_proj.weight"]
    tokens = sum(row.tokens for row in rows)
    total = torch.zeros(())
    for row in rows[:1]:
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
        total = cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=IGNORED, reduction="sum")
    (whole,) = torch.autograd.grad(total * len(rows) / tokens, [weight])
    with undisturbed(model):
        row = rows[0]
        found = LogitGradients(model, 32)(torch.tensor(row.ids), torch.tensor(row.labels), len(rows) / tokens)
    norm = float(np.sqrt((found[0].q[:, 2] ** 2).sum()))
    assert norm == pytest.approx(float(whole.norm()), rel=1e-3)


def test_rows_with_nothing_to_predict_are_refused() -> None:
    model, _ = demo()
    with pytest.raises(QKGuardError, match="no row has a token to predict"):
        measure(model, [TextRow((5, 6, 7), (True, False, False))])
