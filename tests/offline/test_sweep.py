"""The sweep on models whose damage is known: what it swaps, how it scores, what it recommends, what it says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qkguard
from qkguard.choice.candidates import Candidate, control_candidates, layer_candidates, method_candidates
from qkguard.choice.task import TaskResult, encode_rows, score_rows
from qkguard.choice.value_output import find_value_output
from qkguard.choice.verdict import Interval, Measurement, compare, explain, rank_layers, recommend
from qkguard.demo import MODEL
from qkguard.demo.arithmetic import problems
from qkguard.errors import QKGuardError
from qkguard.layout import find_attention
from qkguard.layout.rows import RowSelection
from qkguard.offline.pair import open_folders
from qkguard.offline.restore import restore_checkpoint
from qkguard.offline.sweep import SweepReport, measure_candidates, sweep
from qkguard.offline.sweep_page import html_page, tradeoff_figure
from qkguard.offline.sweep_swap import CandidateSwap
from qkguard.offline.task_rows import read_rows
from qkguard.probe.results import ProbeResult
from qkguard.probe.samples import SampleKey
from qkguard.probe.statistics import paired_interval
from qkguard.report.page import themed_png
from tests.support import zoo
from tests.support.models import save_pair, tiny_model
from tests.support.oracle import load_folder

SMALL: dict[str, Any] = {"lengths": (256,), "tasks": ("single_2",), "depths": 5, "samples": 2, "device": "cpu"}


def damaged_copy(folder: Path, damage: dict[str, float], seed: int = 0) -> Path:
    """The demo's model with noise on the tensors whose names end so, in units of their own spread."""
    shutil.copytree(MODEL, folder)
    tensors, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        for part, scale in damage.items():
            if re.search(rf"layers\.[25]\.self_attn\.{part}\.weight$", name):
                noise = torch.randn(tensor.shape, generator=random) * tensor.float().std() * scale
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def chains(count: int, seed: int = 0) -> list[dict[str, str]]:
    from itertools import islice

    return [{"prompt": c.prompt, "completion": c.completion} for c in islice(problems(seed=seed), count)]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n].contiguous().view(-1).view(torch.uint8), b[n].contiguous().view(-1).view(torch.uint8))
        for n in a
    )


def by_name(report: SweepReport) -> dict[str, dict[str, Any]]:
    return {point["name"]: point for point in report.to_json()["points"]}


# -- end to end ---------------------------------------------------------------------------------------------------


def test_damaged_queries_and_keys_are_found_and_brought_back(tmp_path: Path) -> None:
    tuned = damaged_copy(tmp_path / "tuned", {"q_proj": 3.0, "k_proj": 3.0})
    options = SMALL | {"data": chains(12), "methods": "restore,interpolate:alpha=0.5,qk-pro:ridge=0"}
    report = sweep(MODEL, tuned, **options, controls="v", each_layer=True, write=tmp_path / "out")
    points = by_name(report)
    assert points["base"]["recall"]["value"] == 1.0 and points["raw"]["recall"]["value"] <= 0.5
    assert points["restore"]["recall"] == points["base"]["recall"]
    assert points["restore"]["task"]["loss"] == points["base"]["task"]["loss"] < points["raw"]["task"]["loss"]
    assert points["V only"]["same_as"] == "raw", "the values are the base's own"
    assert points["qk-pro ridge 0"]["recall"] == points["restore"]["recall"]
    assert points["restore"]["pareto"] and not points["raw"]["pareto"]
    assert report.recommended.name == "restore" and "Recommended: restore." in report.words[-1]
    assert any("100% of what was lost" in sentence for sentence in report.words)
    first, second = report.to_json()["layers"]
    assert {first["layer"], second["layer"]} == {2, 5} and first["gain"] > 0 and first["ratio"] is None
    written = load_folder(tmp_path / "out")
    assert same(written, load_folder(MODEL)) and not same(written, load_folder(tuned))
    manifest = json.loads((tmp_path / "out/qkguard.json").read_text())
    assert manifest["sweep"]["recommended"] == "restore" and manifest["sweep"]["words"] == report.words
    assert report.words[-1] in (tmp_path / "out/README.md").read_text()

    again = sweep(MODEL, tuned, **options | {"methods": "restore,interpolate:alpha=0.5"})
    repeated = by_name(again)
    assert len(repeated) == 4 and all(point == points[name] for name, point in repeated.items())
    other = by_name(sweep(MODEL, tuned, **options | {"methods": "restore", "seed": 1}))
    assert other["raw"] != points["raw"]


def test_queries_and_keys_that_are_not_the_cause(tmp_path: Path) -> None:
    tuned = damaged_copy(tmp_path / "tuned", {"v_proj": 4.0})
    report = sweep(MODEL, tuned, **SMALL, data="none", methods="restore", controls="v", write=tmp_path / "out")
    points = by_name(report)
    assert points["base"]["recall"]["value"] - points["raw"]["recall"]["value"] > 0.3
    assert points["restore"]["same_as"] == "raw" and points["V only"]["recall"] == points["base"]["recall"]
    assert report.recommended.name == "raw" and not (tmp_path / "out").exists()
    said = " ".join(report.words)
    assert "Q/K are not the cause on this run" in said and "V only brings back more" in said
    assert "No point has more recall" in said and report.metric is None
    assert themed_png(tradeoff_figure(report)).startswith(b"\x89PNG")
    page = html_page(report)
    assert report.to_json()["attribution"] is None and "Which weights" not in page
    assert "<table>" in page and "V only" in page and 'src="data:image/png;base64,' in page
    assert "http" not in page.replace("https://arxiv.org", "") and page.count("src=") == 1


def test_a_point_restores_the_layers_that_retrieve_in_the_base(tmp_path: Path) -> None:
    """The demo's layer 2 looks up needles, its layer 5 does not."""
    tuned = damaged_copy(tmp_path / "tuned", {"q_proj": 3.0, "k_proj": 3.0})
    grid = "restore,restore:layers=retrieval,interpolate:alpha=0:layers=retrieval"
    options = SMALL | {"data": "none", "methods": grid}
    report = sweep(MODEL, tuned, **options)
    assert report.retrieval is not None and report.retrieval.layers == (2,) and report.warnings == []
    points = by_name(report)
    names = [f"{name} in retrieval layers" for name in ("restore", "interpolate alpha 0")]
    assert list(points) == ["base", "raw", "restore", *names]
    point = points["restore in retrieval layers"]
    assert point["layers"] == [2] and [did["layer"] for did in point["did"]] == [2]
    assert points["interpolate alpha 0 in retrieval layers"]["same_as"] == "raw"
    assert points["raw"]["recall"]["value"] < point["recall"]["value"]
    assert report.to_json()["retrieval"] == report.retrieval.summary()
    assert report.retrieval.words.replace('"', "&#34;") in html_page(report)

    written = sweep(MODEL, tuned, **options | {"methods": "restore:layers=retrieval", "write": tmp_path / "out"})
    assert written.recommended.name == "restore in retrieval layers" and "whole" not in " ".join(written.words)
    restore_checkpoint(MODEL, tuned, tmp_path / "by hand", layers=[2])
    made = load_folder(tmp_path / "out")
    assert same(made, load_folder(tmp_path / "by hand")) and not same(made, load_folder(MODEL))
    manifest = json.loads((tmp_path / "out/qkguard.json").read_text())
    assert manifest["retrieval"] == report.retrieval.summary() and manifest["method"]["layers"] == [2]

    other = sweep(MODEL, tuned, **options | {"layers": [5]})
    assert other.retrieval is not None and other.retrieval.layers is None
    assert list(by_name(other)) == ["base", "raw", "restore"]
    assert len(other.warnings) == 2 and "restore in retrieval layers is left out: no head passes" in other.warnings[0]
    poor = sweep(tuned, MODEL, **options | {"methods": "restore:layers=retrieval"})
    assert poor.retrieval is not None and poor.retrieval.layers is None and list(by_name(poor)) == ["base", "raw"]
    assert "restore in retrieval layers is left out: " in poor.warnings[0] and "samples were" in poor.warnings[0]
    with pytest.raises(QKGuardError, match="layers=retrieval, with several values"):
        method_candidates("restore:layers=2")


# -- swapping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_next", "phi3"])
def test_swapped_in_as_written_and_out_to_the_bit(name: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, name, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype="auto")
    before = bits(model)
    swapper = CandidateSwap(model, open_folders(base, tuned), rows=RowSelection())
    grid = "restore,restore:projections=k,qk-pro:ridge=0.5,interpolate:alpha=0.5:align,procrustes"
    points = [*method_candidates(grid), *control_candidates("all"), *layer_candidates(swapper.layers)]
    assert len(points) == 5 + 5 + (1 if name == "qwen3_next" else 4)
    seen = []
    for number, point in enumerate(points):
        with swapper.swapped(swapper.prepare(point)):
            inside = bits(model)
        assert same(bits(model), before)
        assert not same(inside, before), point
        seen.append(inside)
        if point.recommendable:
            out = tmp_path / str(number)
            restore_checkpoint(base, tuned, out, method=point.method, projections=point.tensors, **point.options)
            written = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
            assert same(inside, bits(written)), point
    assert not same(seen[0], seen[2])
    with pytest.raises(ZeroDivisionError), swapper.swapped(swapper.prepare(points[0])):
        raise ZeroDivisionError
    assert same(bits(model), before)


def test_a_sweep_leaves_the_model_as_it_was_and_measures_equal_weights_once(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(tuned)
    before, calls = bits(model), []

    def measure(model: nn.Module, name: str) -> Any:
        calls.append(name)
        return ProbeResult((), (), (), {}), None

    points = [
        Candidate("raw", "raw"),
        *method_candidates("restore,interpolate:alpha=0/1"),
        *control_candidates("q,k,v,o"),
    ]
    found = measure_candidates(
        model, CandidateSwap(model, open_folders(base, tuned), rows=RowSelection()), measure, points
    )
    assert same(bits(model), before)
    assert [m.same_as for m in found] == [None, None, "raw", "restore", None, None, None, None]
    assert len(calls) == 6


CARRIED: dict[str, tuple[dict[str, Any], set[str]]] = {
    # values: parameter -> rows (None: all); parameters of the output projection; of the last attention layer
    "llama": ({"v_proj.weight": None}, {"o_proj.weight"}),
    "qwen2": ({"v_proj.weight": None, "v_proj.bias": None}, {"o_proj.weight"}),
    "qwen3_next": ({"v_proj.weight": None}, {"o_proj.weight"}),
    "phi3": ({"qkv_proj.weight": [(96, 128)]}, {"o_proj.weight"}),
    "gpt2": ({"c_attn.weight": [(128, 192)], "c_attn.bias": [(128, 192)]}, {"c_proj.weight", "c_proj.bias"}),
    "gpt_neox": (
        {f"query_key_value.{kind}": [(48 * h + 32, 48 * h + 48) for h in range(4)] for kind in ("weight", "bias")},
        {"dense.weight", "dense.bias"},
    ),
    "minimax": ({"v_proj.weight": None}, {"o_proj.weight"}),
    "granitemoehybrid": ({"v_proj.weight": None}, {"o_proj.weight"}),
}


@pytest.mark.parametrize("name", CARRIED)
def test_values_and_outputs_are_found_by_what_they_do(name: str) -> None:
    model = tiny_model(name)
    before, wanted = bits(model), [p.requires_grad for p in model.parameters()]
    spec = find_attention(model)[-1]
    values, outputs = ([param for _, param in find_value_output(model, [spec], which)] for which in "vo")
    own = {p.name.removeprefix(f"{spec.module}."): p for p in values}
    rows, names = CARRIED[name]
    assert own.keys() == rows.keys()
    for key, param in own.items():
        assert param.ranges == (((0, param.shape[0]),) if rows[key] is None else tuple(rows[key])), key
        assert param.dim == (1 if (name, key) == ("gpt2", "c_attn.weight") else 0)
    assert {p.name.removeprefix(f"{spec.module}.") for p in outputs} == names
    assert same(bits(model), before) and wanted == [p.requires_grad for p in model.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_values_that_cannot_be_told_are_refused() -> None:
    for name, message in (("bloom", "AttentionInterface"), ("deepseek_v4", "no parameter of its own for V")):
        model = zoo.tiny_model(name)
        with pytest.raises(QKGuardError, match=message):
            find_value_output(model, find_attention(model), "v")
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- task quality -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        MODEL
    )


def test_loss_and_answers_are_those_of_transformers(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    raw = [
        *({"prompt": c["prompt"], "answer": c["completion"]} for c in chains(6)),
        {"prompt": "Question: k = 3; b = k + 1. What is b?\nThink:", "answer": " k"},
    ]
    rows, dropped = encode_rows(tokenizer, raw, 4096)
    assert dropped == 0
    result = score_rows(model, rows, batch_tokens=400)
    one_by_one = score_rows(model, rows, batch_tokens=1)
    assert result.exact == one_by_one.exact and result.nll == pytest.approx(one_by_one.nll, rel=1e-4)
    for row, nll, tokens, exact, given in zip(rows, result.nll, result.tokens, result.exact or (), raw, strict=True):
        prompt = tokenizer(given["prompt"])["input_ids"]
        assert list(row.ids[: row.start]) == prompt
        ids = torch.tensor([row.ids])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        with torch.no_grad():
            assert nll / tokens == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)
            said = model.generate(
                ids[:, : len(prompt)], max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert exact == (said[0, len(prompt) :].tolist() == list(row.ids[row.start :]))
    assert result.accuracy is not None and 0 < result.accuracy < 1, "answers of one kind show nothing"
    assert result.loss == pytest.approx(sum(result.nll) / sum(result.tokens))


def test_forms_of_rows(demo: tuple[Any, Any], tmp_path: Path) -> None:
    _, tokenizer = demo
    chain = chains(1)[0]
    (row,), _ = encode_rows(tokenizer, [chain | {"answer": chain["completion"][-1]}], 4096)
    assert row.answer is not None
    assert tokenizer.decode(row.ids[row.answer[0] : row.answer[1]]).strip() == chain["completion"][-1]
    assert row.answer[1] >= len(row.ids) - 1, "the last occurrence"
    (text,), _ = encode_rows(tokenizer, [{"text": chain["prompt"]}], 4096)
    assert text.start == 1 and text.answer is None
    many = [chain, chain | {"completion": chain["completion"] * 20}]
    kept, dropped = encode_rows(tokenizer, many, 300)
    assert (len(kept), dropped) == (1, 1)
    for bad, message in (
        ([{"question": "x"}], "has the keys question; expected rows with"),
        ([chain | {"answer": "nowhere"}], "is not in its completion"),
        ([chain, chain | {"answer": chain["completion"][-1]}], "Some rows have an"),
        ([chain | {"completion": chain["completion"] * 20}], "Every row is longer"),
    ):
        with pytest.raises(QKGuardError, match=message):
            encode_rows(tokenizer, bad, 300)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in many))
    assert read_rows(file) == many and read_rows(str(file), 1) == many[:1]
    file.write_text("[1, 2]")
    with pytest.raises(QKGuardError, match="holds no rows"):
        read_rows(file)
    file.write_text("prompt,answer\n1,2")
    with pytest.raises(QKGuardError, match="not JSON lines"):
        read_rows(file)
    with pytest.raises(QKGuardError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")


def test_chats() -> None:
    from tests.support.probing import CHATML, bpe_tokenizer

    tokenizer = bpe_tokenizer(CHATML)
    turns = [{"role": "user", "content": "What is one of the numbers?"}, {"role": "assistant", "content": "one is 7"}]
    (whole,), _ = encode_rows(tokenizer, [{"messages": turns}], 400)
    (split,), _ = encode_rows(tokenizer, [{"prompt": turns[:1], "completion": turns[1:]}], 400)
    assert whole == split
    begun = tokenizer.apply_chat_template(turns[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert list(whole.ids[: whole.start]) == list(begun)
    assert tokenizer.decode(whole.ids[whole.start :]) == "one is 7<|im_end|>\n"


# -- verdict ------------------------------------------------------------------------------------------------------

KEYS_OF_SAMPLES = tuple(SampleKey(256, "single_2", 0.5, i) for i in range(40))


def measured(point: Candidate, hits: int, right: int | None = None, nll: float | None = None) -> Measurement:
    probe = ProbeResult(KEYS_OF_SAMPLES, tuple(i < hits for i in range(40)), (0.0,) * 40, {"digest": "x"})
    task = None
    if right is not None:
        task = TaskResult((1.0,) * 50, (2,) * 50, tuple(i < right for i in range(50)))
    elif nll is not None:
        task = TaskResult(tuple(nll * (1 + 0.01 * i) for i in range(50)), (2,) * 50, None)
    return Measurement(point, probe, task)


def run_of(*points: Measurement) -> list[Measurement]:
    compare(points, seed=0)
    return list(points)


BASE, RAW = Candidate("base", "base"), Candidate("raw", "raw")
RESTORE, KEYS, HALF = method_candidates("restore,restore:projections=k,interpolate:alpha=0.5")


def test_recommendation_follows_the_rule() -> None:
    points = run_of(
        measured(BASE, 40, 0),
        measured(RAW, 10, 49),
        measured(RESTORE, 36, 40),
        measured(KEYS, 30, 48),
        measured(HALF, 30, 49),
        measured(control_candidates("q")[0], 40, 50),
    )
    assert recommend(points, 0.02).name == "interpolate alpha 0.5", "equal recall: the better task quality"
    assert recommend(points, 0.2).name == "restore"
    assert recommend(points, 0.0).name == "interpolate alpha 0.5"
    worse = run_of(measured(BASE, 40, 0), measured(RAW, 10, 49), measured(RESTORE, 36, 40))
    assert recommend(worse, 0.02).name == "raw"
    assert "larger tolerance" in explain(worse, worse[1], 0.02)[-1]
    noise = run_of(measured(BASE, 40, 0), measured(RAW, 30, 49), measured(RESTORE, 31, 49))
    assert recommend(noise, 1.0).name == "raw", "one sample more is noise"
    fewer = run_of(measured(BASE, 40, 0), measured(RAW, 30, 49), measured(RESTORE, 20, 50))
    assert recommend(fewer, 1.0).name == "raw"


def test_tolerance_of_a_loss_is_in_nats() -> None:
    points = run_of(measured(BASE, 40, nll=4.0), measured(RAW, 10, nll=1.0), measured(RESTORE, 36, nll=1.03))
    raised = points[2].task.loss - points[1].task.loss  # type: ignore[union-attr]
    assert points[2].change is not None and points[2].change.value == pytest.approx(-raised)
    assert recommend(points, raised * 1.01).name == "restore" and recommend(points, raised * 0.99).name == "raw"


def test_words_say_what_the_numbers_say() -> None:
    def said(base: int, raw: int, restored: int) -> str:
        points = run_of(measured(BASE, base, 0), measured(RAW, raw, 50), measured(RESTORE, restored, 48))
        return " ".join(explain(points, recommend(points, 0.1), 0.1))

    assert "SFT took recall from 1.000 to 0.250" in said(40, 10, 30)
    assert "67% of what was lost, task accuracy from 1.000 to 0.960" in said(40, 10, 30)
    assert "Q/K are not the cause on this run" in said(40, 10, 10) and "Recommended: raw" in said(40, 10, 10)
    assert "not the cause" not in said(40, 10, 30)
    assert "cost no recall beyond noise" in said(40, 40, 40) and "not the cause" not in said(40, 40, 40)
    assert "The base finds no needles here (0 of 40), so this probe cannot show a loss" in said(0, 0, 0)
    assert "cost no recall" not in said(0, 0, 0) and "no needles" not in said(40, 0, 0)


def test_intervals_and_pareto_points() -> None:
    points = run_of(
        measured(BASE, 40, 5),
        measured(RAW, 12, 45),
        measured(RESTORE, 30, 30),
        measured(KEYS, 30, 25),
        measured(HALF, 20, 40),
    )
    assert [p.name for p in points if p.pareto] == ["raw", "restore", "interpolate alpha 0.5"]
    random = np.random.default_rng(9)
    gains = np.array([0] * 12 + [1] * 18 + [0] * 10, dtype=float)
    drawn = [gains[random.integers(40, size=40)].mean() for _ in range(4000)]
    gain = points[2].gain
    assert gain.value == pytest.approx(18 / 40)
    # Near the bootstrap's, drawn towards 0 by the two samples that are added to 40
    assert (gain.low, gain.high) == pytest.approx((np.quantile(drawn, 0.025), np.quantile(drawn, 0.975)), abs=0.05)
    assert (gain.low, gain.high) == pytest.approx((-paired_interval(0, 18, 40)[1], -paired_interval(0, 18, 40)[0]))
    for found, count in ((points[1].gain, 40), (points[1].change, 50)):
        assert found == Interval(0.0, *paired_interval(0, 0, count)), "no change among so few is no certainty"
    quality = points[2].quality
    assert (
        quality is not None
        and quality.low < 0.6 < quality.high
        and quality.high - quality.low == pytest.approx(0.27, abs=0.05)
    )


def test_layers_are_ranked_by_gain_per_loss() -> None:
    layers = layer_candidates([1, 4, 7, 9, 11])
    hits = {1: (20, 40), 4: (30, 40), 7: (14, 50), 9: (10, 50), 11: (8, 45)}
    points = run_of(measured(RAW, 10, 50), *(measured(p, *hits[p.layers[0]]) for p in layers if p.layers))
    ranked = rank_layers(points)
    assert [row["layer"] for row in ranked] == [7, 4, 1, 9, 11]
    assert ranked[1]["ratio"] == pytest.approx((20 / 40) / (10 / 50)) and ranked[0]["ratio"] is None


# -- settings -----------------------------------------------------------------------------------------------------


def test_the_grid_as_written() -> None:
    default = method_candidates()
    assert [p.name for p in default[:3]] == ["restore", "restore in retrieval layers", "restore K only"]
    assert len(default) == 9 and [p.layers for p in default[:3]] == [None, "retrieval", None]
    found = method_candidates("qk-pro:ridge=0.3/1,interpolate:alpha=0.25:align,procrustes")
    assert [(p.method, p.options.get("ridge")) for p in found[:2]] == [("qk-pro", 0.3), ("qk-pro", 1.0)]
    assert found[2].options == {"alpha": 0.25, "align": True} and found[2].name == "interpolate alpha 0.25 aligned"
    assert len(found) == 4
    for entry, message in (
        ("average", "Unknown restore method"),
        ("qk-pro:ridge", "Invalid 'ridge' in"),
        ("qk-pro:strength=3", "Invalid 'strength=3' in"),
        ("restore:alpha=0.5", "no effect with method 'restore'"),
        ("qk-pro:projections=k", "queries and keys together"),
        ("interpolate:alpha=2", "from 0"),
        ("restore:projections=v", "Invalid 'projections=v' in"),
        (" ", "grid is empty"),
    ):
        with pytest.raises(QKGuardError, match=message):
            method_candidates(entry)
    assert [p.tensors for p in control_candidates("all")] == [("q",), ("k",), ("v",), ("o",), ("v", "o")]
    with pytest.raises(QKGuardError, match="Unknown control 'x'"):
        control_candidates("q,x")


def test_the_public_name_is_the_function() -> None:
    assert qkguard.sweep is sweep and callable(qkguard.sweep)
    with pytest.raises(QKGuardError, match=r"--data FILE\.jsonl.*--data none"):
        qkguard.sweep(MODEL, MODEL)


def test_rows_that_are_tokenised_already() -> None:
    """As a run keeps them of its evaluation set: the same loss as the text they were made from."""
    from qkguard.choice.task import encode_rows

    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [5, 6], "labels": [5, 6]}]
    found, dropped = encode_rows(None, rows, 10)
    assert [(row.ids, row.start, row.answer) for row in found] == [((5, 6, 7, 8), 2, None), ((5, 6), 1, None)]
    assert dropped == 0
    with pytest.raises(QKGuardError, match="all of its labels are -100"):
        encode_rows(None, [{"input_ids": [5, 6], "labels": [-100, -100]}], 10)
