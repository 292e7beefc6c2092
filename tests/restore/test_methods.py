"""The restore methods against formulas written out in full, scipy, and the models' own attention."""

from __future__ import annotations

import inspect
import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GlmConfig

from qkguard.errors import QKGuardError
from qkguard.layout import find_attention
from qkguard.layout.rows import RowSelection
from qkguard.layout.selection import select
from qkguard.layout.spec import AttentionSpec, Block, ParamMap
from qkguard.restore.apply import restore_layer
from qkguard.restore.interpolate import interpolate
from qkguard.restore.plain import restore
from qkguard.restore.procrustes import allowed_rotations, closest_rotation, procrustes
from qkguard.restore.qk_pro import correct_queries, qk_pro
from qkguard.restore.registry import METHODS, check_options
from tests.support.models import SMALL, noised, tiny_config, tiny_model

Compact = dict[str, Tensor]


def layer(
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 8,
    width: int = 24,
    *,
    bias: str = "",
    rotary: str | None = "none",
    rotary_dim: int = 0,
    norm: int = 0,
    **other: Any,
) -> AttentionSpec:
    """A layer by hand: separate projections, head after head; `bias` names the roles that have one."""
    params = []
    for role, count in (("q", heads), ("k", kv_heads)):
        blocks = tuple(Block(size * h, size * h + size, role, h) for h in range(count))
        params.append(ParamMap(f"{role}_proj.weight", (count * size, width), 0, "weight", blocks))
        if role in bias:
            params.append(ParamMap(f"{role}_proj.bias", (count * size,), 0, "bias", blocks))
        if norm:
            params.append(ParamMap(f"{role}_norm.weight", (norm,), 0, "norm", (Block(0, norm, role),)))
    return AttentionSpec(
        3, "attn", "full_attention", heads, kv_heads, size, tuple(params), rotary, rotary_dim, **other
    )


def chosen(spec: AttentionSpec, **options: Any) -> tuple[ParamMap, ...]:
    return select([spec], RowSelection.of(options))[0][1]


def drawn(spec: AttentionSpec, seed: int) -> Compact:
    random = torch.Generator().manual_seed(seed)
    return {p.name: torch.randn(p.compact_shape, generator=random, dtype=torch.float64) for p in spec.params}


def by_head(spec: AttentionSpec, compact: Compact, role: str) -> np.ndarray:
    """(heads, d_k, width), with the bias as one more column where there is one; for `layer` alone."""
    rows = compact[f"{role}_proj.weight"].double().numpy()
    if (bias := compact.get(f"{role}_proj.bias")) is not None:
        rows = np.concatenate([rows, bias.double().numpy()[:, None]], 1)
    return rows.reshape(-1, spec.head_dim, rows.shape[-1])


def distance(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# -- qk-pro -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("bias", ["", "qk"])
def test_qk_pro_by_head_is_the_formula_on_d_by_d_matrices(kv_heads: int, bias: str) -> None:
    """In the routing matrix's own space: W_Q^T = W_Q_post^T + (R_pre - W_Q_post^T W_K) W_K^T (G + l I)^-1."""
    spec = layer(kv_heads=kv_heads, bias=bias)
    pre, post = drawn(spec, 0), drawn(spec, 1)
    new = qk_pro(spec, chosen(spec), pre, post, ridge=0.7)
    found, wrong = by_head(spec, new.rows, "q"), []
    for h, (q0, q1) in enumerate(zip(by_head(spec, pre, "q"), by_head(spec, post, "q"), strict=True)):
        own = h // (4 // kv_heads)
        k = by_head(spec, pre, "k")[own]
        gram = k @ k.T
        absolute = 0.7 * np.trace(gram) / len(gram)
        assert new.report["ridge_absolute"][own] == pytest.approx(absolute, rel=1e-12)
        routing, tuned = q0.T @ k, q1.T @ k  # d x d
        correction = (routing - tuned) @ k.T @ np.linalg.inv(gram + absolute * np.eye(len(gram)))
        assert distance(found[h], q1 + correction.T) < 1e-12
        # the same through the d x d Gram matrix of the inputs: (l I + K^T K)^-1 instead of (l I + K K^T)^-1
        pushed = (routing - tuned) @ np.linalg.inv(k.T @ k + absolute * np.eye(k.shape[1])) @ k.T
        assert distance(found[h], q1 + pushed.T) < 1e-10
        other = by_head(spec, pre, "k")[(own + 1) % kv_heads]
        wrong.append(np.linalg.norm((q0 - q1).T @ other @ k.T - (q0 - q1).T @ gram))
    assert kv_heads == 1 or min(wrong) > 1e-3, "any key head would do: the grouping is not tested"
    assert torch.equal(new.rows["k_proj.weight"], pre["k_proj.weight"])


def test_qk_pro_with_a_key_bias_alone_is_qk_pro_without_it() -> None:
    """The queries have no bias to correct: the key bias stays out of the formula and becomes `pre`."""
    spec, bare = layer(bias="k"), layer()
    pre, post = drawn(spec, 0), drawn(spec, 1)
    new = qk_pro(spec, chosen(spec), pre, post, ridge=0.7)
    without = qk_pro(bare, chosen(bare), pre, post, ridge=0.7)
    assert torch.equal(new.rows["q_proj.weight"], without.rows["q_proj.weight"])
    assert new.report == without.report
    assert torch.equal(new.rows["k_proj.bias"], pre["k_proj.bias"])
    assert not torch.equal(pre["k_proj.bias"], post["k_proj.bias"])
    both = layer(bias="qk")  # the twin: with a query bias, the key bias is part of the formula
    affine = qk_pro(both, chosen(both), pre | drawn(both, 0), post | drawn(both, 1), ridge=0.7)
    assert affine.report["ridge_absolute"] != pytest.approx(without.report["ridge_absolute"], rel=1e-3)


def test_qk_pro_with_a_query_bias_alone_corrects_it_as_a_column() -> None:
    spec = layer(bias="q")
    pre, post = drawn(spec, 0), drawn(spec, 1)
    new = qk_pro(spec, chosen(spec), pre, post, ridge=0.7)
    found = by_head(spec, new.rows, "q")
    for h, (q0, q1) in enumerate(zip(by_head(spec, pre, "q"), by_head(spec, post, "q"), strict=True)):
        k = by_head(spec, pre, "k")[h // 2]
        gram = k @ k.T
        factor = gram @ np.linalg.inv(gram + 0.7 * np.trace(gram) / len(gram) * np.eye(len(gram)))
        assert distance(found[h], q1 + factor @ (q0 - q1)) < 1e-12
        assert distance(found[h][:, -1], q0[:, -1]) > 0.05 < distance(found[h][:, -1], q1[:, -1])


@pytest.mark.parametrize("bias", ["", "k", "q", "qk"])
def test_the_routing_of_every_head_goes_to_its_value_before_sft_as_the_ridge_goes_to_0(bias: str) -> None:
    """W_Q^T W_K of each head, d x d, in plain float64; the reading by inputs, which was dropped, stays away."""
    spec = layer(bias=bias)
    pre, post = drawn(spec, 0), drawn(spec, 1)
    columns = "qk" if "q" in bias else ""  # a key bias alone stays out of the formula

    def heads(rows: Compact, role: str) -> np.ndarray:
        found = by_head(spec, rows if columns else {f"{role}_proj.weight": rows[f"{role}_proj.weight"]}, role)
        wide = spec.params[0].shape[1] + bool(columns)
        return np.pad(found, ((0, 0), (0, 0), (0, wide - found.shape[-1])))  # no bias of this role: zeros

    def routing_errors(rows: Compact) -> list[float]:
        q, k, q0, k0 = (heads(r, role) for r in (rows, pre) for role in "qk")
        return [distance(q[h].T @ k[h // 2], q0[h].T @ k0[h // 2]) for h in range(4)]

    ridges = (1.0, 1e-2, 1e-4, 1e-6, 1e-8)
    errors = [routing_errors(qk_pro(spec, chosen(spec), pre, post, ridge=ridge).rows) for ridge in ridges]
    for head in zip(*errors, strict=True):
        assert head[0] > 0.1 and head[-1] < 1e-6
        # to first order the error is proportional to the ridge
        assert [a / b for a, b in itertools.pairwise(head[1:])] == pytest.approx([100.0] * 3, rel=0.5)
    assert max(routing_errors(qk_pro(spec, chosen(spec), pre, post, ridge=0.0).rows)) < 1e-12
    by_inputs = dict(pre)  # W_Q_post + (W_Q_pre - W_Q_post) P, P the projector on the rows of all key heads
    k = pre["k_proj.weight"].numpy()[:8]
    projector = k.T @ np.linalg.solve(k @ k.T, k)
    q0, q1 = (rows["q_proj.weight"].numpy() for rows in (pre, post))
    by_inputs["q_proj.weight"] = torch.from_numpy(q1 + (q0 - q1) @ projector)
    assert min(routing_errors(by_inputs)) > 0.1


def test_the_default_ridge_is_the_labs_wherever_it_is_said() -> None:
    from qkguard import QKGuardConfig, restore_checkpoint
    from qkguard.cli.restore import restore as command

    said = [inspect.signature(function).parameters["ridge"].default for function in (restore_checkpoint, command)]
    said += [inspect.signature(qk_pro).parameters["ridge"].default, QKGuardConfig().ridge]
    assert said == [10.0] * 4 == [check_options("qk-pro", {})["ridge"]] * 4


def test_limits_of_qk_pro() -> None:
    spec = layer(bias="qk")  # 16 key rows in 25 dimensions: the projector is not the identity
    maps, pre, post = chosen(spec), drawn(spec, 0), drawn(spec, 1)
    q0, q1 = (by_head(spec, rows, "q") for rows in (pre, post))
    k0 = by_head(spec, pre, "k")

    def q(ridge: float) -> np.ndarray:
        new = qk_pro(spec, maps, pre, post, ridge=ridge)
        assert np.array_equal(by_head(spec, new.rows, "k"), k0)
        return by_head(spec, new.rows, "q")

    assert distance(q(0.0), q0) < 1e-12
    assert distance(q(1e-9), q0) < 1e-7
    assert distance(q(1e9), q1) < 1e-7
    assert distance(q(1.0), q0) > 0.05 < distance(q(1.0), q1)
    errors = [
        restore_layer(METHODS["qk-pro"], {"ridge": r}, spec, maps, pre, post).report["routing_error"]
        for r in (0.0, 0.1, 1.0, 10.0)
    ]
    means = [error["mean"] for error in errors]
    assert means == sorted(means) and means[0] < 1e-12 < 0.1 < means[-1]


def test_singular_keys() -> None:
    """More key rows than inputs, a dead head, no ridge: only what keys can see is corrected, and nothing is NaN."""
    random = torch.Generator().manual_seed(0)
    q0, q1 = (torch.randn(2, 8, 5, generator=random, dtype=torch.float64) for _ in range(2))
    k = torch.randn(2, 8, 5, generator=random, dtype=torch.float64)
    k[1] = 0
    for ridge in (0.0, 1.0):
        q, absolute = correct_queries(q0, q1, k, ridge)
        assert q.isfinite().all() and absolute.isfinite().all()
    assert torch.equal(correct_queries(q0, q1, k, 1.0)[0][1], q1[1])
    seen = correct_queries(q0, q1, k, 1e-12)[0]
    assert torch.allclose(seen[0].mT @ k[0], q0[0].mT @ k[0])  # the routing is that before


# -- rotations ----------------------------------------------------------------------------------------------------


def test_full_rotation_is_scipys_orthogonal_procrustes() -> None:
    spec = layer(bias="k")
    pre, post = drawn(spec, 0), drawn(spec, 1)
    new = procrustes(spec, chosen(spec), pre, post)
    assert new.report["group"] == "orthogonal"

    def stacked(compact: Compact, g: int) -> np.ndarray:
        q = compact["q_proj.weight"].double().numpy().reshape(4, 8, 24)[2 * g : 2 * g + 2]
        k = compact["k_proj.weight"].double().numpy().reshape(2, 8, 24)[g]
        b = compact["k_proj.bias"].double().numpy().reshape(2, 8, 1)[g]
        return np.concatenate([*q, k, b], 1)

    for g in range(2):
        before, after = stacked(pre, g), stacked(post, g)
        turned, _ = scipy.linalg.orthogonal_procrustes(before.T, after.T)  # min |A R - B|
        assert distance(stacked(new.rows, g), turned.T @ before) < 1e-12
        assert distance(turned.T @ before, before) > 0.1, "nothing was to be turned"
        near, far = distance(stacked(new.rows, g), after), distance(before, after)
        assert near < far


def turn(x: np.ndarray, position: float, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Rotary embedding of rows (d_k, n) at a position, pair by pair."""
    out = x.copy()
    for i, (a, b) in enumerate(pairs):
        angle = position * 100.0 ** (-i / len(pairs))
        out[a], out[b] = (
            np.cos(angle) * x[a] - np.sin(angle) * x[b],
            np.sin(angle) * x[a] + np.cos(angle) * x[b],
        )
    return out


PAIRS = {
    "half": [(i, i + 4) for i in range(4)],
    "interleaved": [(2 * i, 2 * i + 1) for i in range(4)],
    "half, partial": [(0, 2), (1, 3)],
    "interleaved, partial": [(0, 1), (2, 3)],
    "half, at the end": [(4, 6), (5, 7)],
}


@pytest.mark.parametrize("kind", PAIRS)
def test_scores_are_unchanged_at_all_distances(kind: str) -> None:
    """Attention logits x_i^T W_Q^T R_i^T R_j W_K x_j of any inputs: as before SFT, not as a wrong group has them."""
    pairs = PAIRS[kind]
    rotary = kind.split(",")[0]
    start = pairs[0][0]
    spec = layer(rotary=rotary, rotary_dim=2 * len(pairs), rotary_start=start)
    pre, post = drawn(spec, 0), drawn(spec, 1)

    def scores(rows: Compact) -> np.ndarray:
        q, k = by_head(spec, rows, "q"), by_head(spec, rows, "k")
        return np.stack(
            [turn(q[h], m, pairs).T @ turn(k[h // 2], 0, pairs) for m in (0, 1, 7, 1000) for h in range(4)]
        )

    new = procrustes(spec, chosen(spec), pre, post)
    assert new.report["group"] == "phases"
    assert distance(scores(new.rows), scores(pre)) < 1e-12
    for role in "qk":
        moved = [distance(by_head(spec, rows, role), by_head(spec, post, role)) for rows in (new.rows, pre)]
        assert distance(by_head(spec, new.rows, role), by_head(spec, pre, role)) > 0.05, "nothing was turned"
    assert moved[0] < moved[1]
    swapped = {"half": "interleaved", "interleaved": "half"}[rotary]
    wrong = [replace(spec, rotary="none"), replace(spec, rotary=swapped)]
    wrong += [replace(spec, rotary_start=4 - start), replace(spec, rotary_dim=8, rotary_start=0)] if start else []
    for other in wrong:
        assert distance(scores(procrustes(other, chosen(spec), pre, post).rows), scores(pre)) > 1e-2


def test_phases_are_the_best_ones() -> None:
    spec = layer(rotary="half", rotary_dim=8)
    rotations = allowed_rotations(spec, {})
    random = torch.Generator().manual_seed(0)
    pre, post = (torch.randn(2, 8, 40, generator=random, dtype=torch.float64) for _ in range(2))
    best = closest_rotation(pre, post, rotations)
    error = (best @ pre - post).square().sum((-1, -2))
    for pair in rotations.pairs:
        for angle in (-0.1, -1e-3, 1e-3, 0.1, 3.0):
            other = torch.eye(8, dtype=torch.float64)
            (a, b), c, s = pair, np.cos(angle), np.sin(angle)
            other[a, a], other[b, b], other[a, b], other[b, a] = c, c, -s, s
            assert ((other @ best @ pre - post).square().sum((-1, -2)) > error).all()
    exact = closest_rotation(pre, best @ pre, rotations)
    assert torch.allclose(exact, best, atol=1e-12) and not torch.allclose(best, torch.eye(8, dtype=torch.float64))


def test_norms_decide_the_group() -> None:
    spec = layer(rotary="half", rotary_dim=4, norm=8)
    maps, pre, post = chosen(spec), drawn(spec, 0), drawn(spec, 1)
    even = torch.tensor([2.0, 3, 2, 3, 5, 5, 5, 5])
    names = ["q_norm.weight", "k_norm.weight"]
    turned = procrustes(spec, maps, pre, post, gains=dict.fromkeys(names, even))
    assert turned.report["group"] == "phases" and "fallback" not in turned.report

    def scores(rows: Compact) -> np.ndarray:
        def through(x: np.ndarray, m: int) -> np.ndarray:
            normed = x / np.sqrt((x**2).mean(0, keepdims=True)) * even.double().numpy()[:, None]
            return turn(normed, m, [(0, 2), (1, 3)])

        q, k = by_head(spec, rows, "q"), by_head(spec, rows, "k")
        return np.stack([through(q[h], m).T @ through(k[h // 2], 0) for m in (0, 5) for h in range(4)])

    assert distance(scores(turned.rows), scores(pre)) < 1e-12
    for bad in ([2.0, 3, 2.5, 3, 5, 5, 5, 5], [2.0, 3, 2, 3, 5, 5, 5, 5.5]):
        new = procrustes(spec, maps, pre, post, gains={names[0]: even, names[1]: torch.tensor(bad)})
        assert new.report["group"] == "identity" and "differ between channels" in new.report["fallback"]
        assert all(new.rows[p.name] is pre[p.name] for p in maps)
    assert "not at hand" in procrustes(spec, maps, pre, post).report["fallback"]
    with_norms = chosen(spec, include_norms=True)
    assert "differ between" in procrustes(spec, with_norms, pre, post).report["fallback"]
    stacked = replace(spec, params=(*spec.params, replace(spec.params[1], name="q_norm.bias")))
    assert (
        "more than one gain"
        in procrustes(stacked, maps, pre, post, gains=dict.fromkeys(names, even)).report["fallback"]
    )
    unknown, shared = (replace(layer(), rotary=None), replace(layer(), shares_keys=True))
    for other, why in ((unknown, "not known"), (shared, "other layers")):
        assert why in procrustes(other, chosen(other), pre, post).report["fallback"]


# -- interpolation ------------------------------------------------------------------------------------------------


def test_interpolation() -> None:
    spec = layer(bias="q", norm=8)
    maps, pre, post = chosen(spec, include_norms=True), drawn(spec, 0), drawn(spec, 1)
    half = interpolate(spec, maps, pre, post, alpha=0.25)
    assert set(half.rows) == set(pre)
    for name, rows in half.rows.items():
        assert np.allclose(rows, 0.75 * post[name].numpy() + 0.25 * pre[name].numpy(), rtol=1e-15)
    assert all(interpolate(spec, maps, pre, post, alpha=1.0).rows[n] is pre[n] for n in pre)
    assert all(interpolate(spec, maps, pre, post, alpha=0.0).rows[n] is post[n] for n in pre)
    queries = chosen(spec, projections=["q"])
    assert set(interpolate(spec, queries, pre, post, alpha=0.5).rows) == {"q_proj.weight", "q_proj.bias"}


def test_interpolation_between_equivalent_weights_needs_the_alignment() -> None:
    """A tuned model that attends exactly as before, but through rotated heads: half-way must attend so as well."""
    spec = layer(rotary="half", rotary_dim=8, bias="qk")
    maps, pre = chosen(spec), drawn(spec, 0)
    phases = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    turned = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)
    for g in range(2):
        for i, (c, s) in enumerate(zip(phases[g].cos(), phases[g].sin(), strict=True)):
            turned[g, i, i], turned[g, i + 4, i + 4], turned[g, i, i + 4], turned[g, i + 4, i] = c, c, -s, s
    post = {}
    for param in maps:
        rows = pre[param.name].view(-1, 8, *pre[param.name].shape[1:])
        by = turned if len(rows) == 2 else turned.repeat_interleave(2, 0)
        post[param.name] = torch.einsum("hab,hb...->ha...", by, rows).reshape(pre[param.name].shape)
    options = {"alpha": 0.5, "align": True, "per_layer": None}
    method = METHODS["interpolate"]
    aligned = restore_layer(method, options, spec, maps, pre, post)
    plain = restore_layer(method, options | {"align": False}, spec, maps, pre, post)
    assert aligned.report["group"] == "phases" and aligned.report["routing_error"]["max"] < 1e-6
    assert plain.report["routing_error"]["mean"] > 0.1
    assert aligned.report["distance"]["q_from_tuned"] < 1e-12 < plain.report["distance"]["q_from_tuned"]


# -- layouts ------------------------------------------------------------------------------------------------------


# q(h), k(g): rows of a full weight that make a head, by hand (heads of 16)
WHERE: dict[str, Any] = {
    "llama": ("q_proj", "k_proj", lambda h: 16 * h, lambda g: 16 * g),
    "qwen2": ("q_proj", "k_proj", lambda h: 16 * h, lambda g: 16 * g),
    "qwen3_next": ("q_proj", "k_proj", lambda h: 32 * h, lambda g: 16 * g),
    "phi3": ("qkv_proj", "qkv_proj", lambda h: 16 * h, lambda g: 64 + 16 * g),
    "gpt_neox": ("query_key_value", "query_key_value", lambda h: 48 * h, lambda g: 48 * g + 16),
    "gpt2": ("c_attn", "c_attn", lambda h: 16 * h, lambda g: 64 + 16 * g),
}


@pytest.mark.parametrize("name", WHERE)
def test_layouts_of_real_models(name: str) -> None:
    """qk-pro on gated, fused, transposed and biased projections: every head by its formula, by rows known here."""
    spec = find_attention(tiny_config(name))[-1]
    before = tiny_model(name)
    after = noised(tiny_model(name), 7)
    maps = chosen(spec)
    pre, post = (
        {p.name: p.take(model.get_parameter(p.name).detach()).double() for p in maps} for model in (before, after)
    )
    new = qk_pro(spec, maps, pre, post, ridge=0.5)
    written = {}
    for param in maps:
        full = after.get_parameter(param.name).detach().double().clone()
        param.put(full, new.rows[param.name])
        written[param.name] = full
    q_name, k_name, q_at, k_at = WHERE[name]
    group = spec.num_heads // spec.num_kv_heads

    def head(which: Any, part: str, start: int) -> np.ndarray:
        out = []
        for kind in ("weight", "bias"):
            full = next((n for n in written if re.search(rf"{part}\.{kind}$", n)), None)
            if full is None:
                continue
            tensor = which[full] if isinstance(which, dict) else which.get_parameter(full).detach().double()
            tensor = tensor.T if kind == "weight" and name == "gpt2" else tensor
            rows = tensor[start : start + 16].numpy()
            out.append(rows if kind == "weight" else rows[:, None])
        return np.concatenate(out, 1)

    for h in range(spec.num_heads):
        k0 = head(before, k_name, k_at(h // group))
        q0, q1 = (head(model, q_name, q_at(h)) for model in (before, after))
        gram = k0 @ k0.T
        factor = gram @ np.linalg.inv(gram + 0.5 * np.trace(gram) / 16 * np.eye(16))
        assert distance(head(written, q_name, q_at(h)), q1 + factor @ (q0 - q1)) < 1e-9
        assert distance(head(written, k_name, k_at(h // group)), k0) == 0
        assert distance(q1 + factor @ (q0 - q1), q1) > 1e-2


def model_in_float64(name: str, **options: Any) -> Any:
    if name == "glm":  # rotates interleaved pairs of the first channels of a head
        config = GlmConfig(**SMALL | {"head_dim": 16, "attention_bias": True} | options)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = noised(AutoModelForCausalLM.from_config(config), 1000)
    else:
        model = tiny_model(name, **options)
    model.set_experts_implementation("eager")  # the default one lacks float64
    return model.double().eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("name", "group", "options"),
    [
        ("llama", "phases", {}),
        ("gpt_neox", "phases", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("glm", "phases", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("gpt2", "orthogonal", {}),
        ("qwen3_next", "identity", {}),
        ("minimax", "phases", {}),
    ],
)
def test_a_rotated_model_answers_as_the_restored_one(name: str, group: str, options: dict[str, Any]) -> None:
    """Through transformers' own forward pass in float64: positions and norms as the model really applies them."""
    before, after = model_in_float64(name, **options), noised(model_in_float64(name, **options), 7)
    ids = torch.arange(100)[None] * 37 % 256
    found, moved = {}, {}
    raw = logits(after, ids)
    for method, options_ in (("restore", {}), ("procrustes", {}), ("wrong", {})):
        model = noised(model_in_float64(name, **options), 7)
        for spec in find_attention(model):
            maps = chosen(spec)
            pre, post = ({p.name: p.take(m.get_parameter(p.name).detach()) for p in maps} for m in (before, after))
            norms = {p.name: after.get_parameter(p.name).detach() for p in spec.params if p.kind == "norm"}
            if method == "wrong":
                spec = replace(spec, rotary="none", params=maps)
            call = METHODS["restore" if method == "restore" else "procrustes"]
            new = restore_layer(call, options_, spec, maps, pre, post, gains=norms)
            assert method != "procrustes" or new.report["group"] == group
            for p in maps:
                p.put(model.get_parameter(p.name).data, new.rows[p.name])
                moved[method] = max(moved.get(method, 0.0), distance(new.rows[p.name], pre[p.name]))
        found[method] = logits(model, ids)
    scale = (found["restore"] - raw).norm()
    assert scale > 1e-3 * raw.norm()
    assert (found["procrustes"] - found["restore"]).norm() < 1e-9 * scale
    assert moved["procrustes"] > 1e-3 or group == "identity"
    if group != "orthogonal":
        assert (found["wrong"] - found["restore"]).norm() > 1e-3 * scale


def test_layers_without_heads_fall_back_as_documented() -> None:
    factored = layer()
    extra = ParamMap("q_a.weight", (8, 24), 0, "weight", (Block(0, 8, "q"),))
    factored = replace(factored, params=(extra, *factored.params))
    shared = replace(
        layer(), params=(layer().params[0], ParamMap("kv.weight", (32, 24), 0, "weight", (Block(0, 32, "kv"),)))
    )
    borrowed = replace(layer(), params=layer().params[:1])
    for spec, why in ((factored, "several weights"), (shared, "make values too"), (borrowed, "no keys of its own")):
        maps, pre, post = chosen(spec), drawn(spec, 0), drawn(spec, 1)
        for method in (qk_pro, procrustes):
            new = method(spec, maps, pre, post)
            assert new.report["fallback"].startswith("restore: ") and why in new.report["fallback"]
            assert {n: id(t) for n, t in new.rows.items()} == {p.name: id(pre[p.name]) for p in maps}
        mixed = interpolate(spec, maps, pre, post, alpha=0.5, align=True)
        assert mixed.report["fallback"].startswith("unaligned: ") and why in mixed.report["fallback"]
        assert all(torch.allclose(t, (pre[n] + post[n]) / 2) for n, t in mixed.rows.items())


# -- options ------------------------------------------------------------------------------------------------------


def test_per_layer_strengths_and_dtypes() -> None:
    spec = layer()
    maps, pre, post = chosen(spec), drawn(spec, 0), drawn(spec, 1)
    post = {n: t.bfloat16() for n, t in post.items()}
    options = check_options("interpolate", {"alpha": 0.5, "per_layer": {"3": 0.25, "7": 1}})
    assert options == {"alpha": 0.5, "align": False, "per_layer": {3: 0.25, 7: 1.0}}
    for number, alpha in ((3, 0.25), (4, 0.5), (7, 1.0)):
        new = restore_layer(METHODS["interpolate"], options, replace(spec, layer=number), maps, pre, post)
        assert new.report["alpha"] == alpha
        for name, rows in new.rows.items():
            assert rows.dtype == torch.bfloat16
            assert torch.equal(rows, ((1 - alpha) * post[name].double() + alpha * pre[name]).bfloat16())
    plain = restore_layer(METHODS["restore"], {}, spec, maps, pre, post)
    assert plain.rows == {p.name: pre[p.name] for p in maps} and plain.report == {}
    assert restore(spec, maps, pre, post).rows.keys() == plain.rows.keys()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("interpolate", {"alpha": 1.5}, "from 0 .tuned. to 1"),
        ("interpolate", {"alpha": "much"}, "from 0 .tuned. to 1"),
        ("qk-pro", {"ridge": -1}, "Invalid ridge=.*: expected a number >= 0"),
        ("qk-pro", {"ridge": float("inf")}, "Invalid ridge=.*: expected a number >= 0"),
        ("restore", {"alpha": 0.5}, "no effect with method 'restore'.*interpolate"),
        ("procrustes", {"ridge": 2.0}, "no effect.*qk-pro"),
        ("restore", {"per_layer": {3: 1}}, "no effect.*qk-pro or interpolate"),
        ("interpolate", {"per_layer": {3: 2}}, "from 0 .tuned. to 1"),
        ("interpolate", {"per_layer": [3]}, "for each of some layers"),
        ("qk-pro", {"projections": ["k"]}, "queries and keys together"),
        ("procrustes", {"projections": ["q"]}, "queries and keys together"),
        ("interpolate", {"align": True, "projections": ["q"]}, "interpolate with align treats"),
        ("average", {}, "one of: restore, qk-pro, procrustes, interpolate"),
    ],
)
def test_bad_options_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QKGuardError, match=message):
        check_options(method, options, options.get("projections", ["q", "k"]))
