"""Attribution: groups of weights swapped in and out of a live model, and the group that was damaged by hand named."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkguard.checkpoint import scaled
from qkguard.choice.attribution import Attribution, states_to_measure
from qkguard.choice.candidates import Candidate
from qkguard.choice.groups import find_groups
from qkguard.choice.verdict import Measurement, compare
from qkguard.demo import MODEL
from qkguard.errors import QKGuardError
from qkguard.layout import find_attention
from qkguard.offline import group_swap
from qkguard.offline.group_swap import GroupSwap, measure_groups
from qkguard.offline.pair import open_folders
from qkguard.offline.sweep import sweep
from qkguard.offline.sweep_page import attribution_table, html_page
from qkguard.probe.prober import Prober
from qkguard.probe.results import ProbeResult
from qkguard.probe.samples import SampleKey
from qkguard.probe.settings import ProbeSettings
from tests.support import zoo
from tests.support.models import noised, save_pair
from tests.support.quantised import quantise

SMALL: dict[str, Any] = {"lengths": (256,), "tasks": ("single_2",), "depths": 5, "samples": 2}

# Which tensors of the demo's files are in which group, and how much noise on them loses recall (in their own spread)
DAMAGE: dict[str, tuple[str, float]] = {
    "qk": (r"layers\.[25]\.self_attn\.[qk]_proj", 4.0),
    "vo": (r"layers\.[25]\.self_attn\.[vo]_proj", 4.0),
    "mixers": (r"layers\.[0134]\.self_attn\.(qkv_proj|out_proj|output_gate)", 2.0),
    "mlp": (r"block_sparse_moe", 5.0),
    "norms": (r"norm|embed_tokens|lm_head", 2.0),
}
ELSEWHERE = 0.02  # noise on all other matrices, as any SFT moves them


def spread(tensor: Tensor) -> Tensor:
    return tensor.float().std() if tensor.numel() > 1 else tensor.float().abs().mean()


def damaged_demo(folder: Path, group: str) -> Path:
    """The demo's model with much noise on one group, and a little everywhere else."""
    shutil.copytree(MODEL, folder)
    pattern, much = DAMAGE[group]
    tensors, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        scale = much if re.search(pattern, name) and "self_attn.norm" not in name else ELSEWHERE
        if scale == ELSEWHERE and not name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight")):
            continue
        noise = torch.randn(tensor.shape, generator=random) * spread(tensor) * scale
        tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {n: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for n, t in model.state_dict().items()}


def whole(kind: str, found: tuple[ProbeResult, Any]) -> Measurement:
    return Measurement(Candidate(kind, kind), *found)


def attributed(base: Path, tuned: Path, measure: Any) -> Attribution:
    """Attribution of a pair, measured by `measure(model, label)`; the tuned model is the same afterwards."""
    before = whole("base", measure(load(base), "base"))
    model = load(tuned)
    raw, kept = whole("raw", measure(model, "raw")), bits(model)
    compare([raw, before], 0)
    swap = GroupSwap(model, open_folders(base, tuned), find_attention(model))
    found = measure_groups(model, swap, measure, before, raw, 0)
    assert bits(model) == kept
    return found


# -- the group that was damaged by hand is named ------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe_demo() -> Any:
    prober = Prober(AutoTokenizer.from_pretrained(MODEL), ProbeSettings(**SMALL, attention=False))
    prober.find_formats(load(MODEL))

    def measure(model: nn.Module, label: str) -> tuple[ProbeResult, None]:
        return prober.run(model), None

    return measure


@pytest.mark.parametrize("group", DAMAGE)
def test_the_damaged_group_is_named(group: str, tmp_path: Path, probe_demo: Any) -> None:
    found = attributed(MODEL, damaged_demo(tmp_path / "tuned", group), probe_demo)
    assert found.cause == [group]
    assert {effect.group.key for effect in found.effects if effect.back is not None} >= {"qk", "vo", "mixers", "mlp"}
    said = " ".join(found.words)
    if group == "qk":
        assert said.startswith("Is it queries and keys? Yes: taken back alone they bring back") and "It is" not in said
    else:
        title = next(effect.group.title for effect in found.effects if effect.group.key == group)
        assert said.startswith("Is it queries and keys? No: ") and f"It is {title}: taken back alone they" in said


KEYS = tuple(SampleKey(16, "single_2", 0.5, i) for i in range(40))


def agreement(base: nn.Module) -> Any:
    """A stand-in for recall on models that were never trained: is the base's own first choice still the first one?"""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 200, (len(KEYS), 16), generator=random)
    with torch.no_grad():
        wanted = base(input_ids=ids).logits[:, -1].argmax(-1)

    def measure(model: nn.Module, label: str) -> tuple[ProbeResult, None]:
        with torch.no_grad():
            right = (model(input_ids=ids).logits[:, -1].argmax(-1) == wanted).tolist()
        return ProbeResult(KEYS, tuple(right), (0.0,) * len(KEYS), {"digest": "x"}), None

    return measure


OTHERS: dict[str, tuple[str, str]] = {
    "other": ("qwen3_next", r"layers\.3\.self_attn\.q_proj"),  # the rows of the output gate
    "shared": ("deepseek_v3", r"kv_a_proj_with_mqa"),  # the latent that keys and values come from
}


@pytest.mark.parametrize("group", OTHERS)
def test_what_fits_no_group_is_one_of_its_own(group: str, tmp_path: Path) -> None:
    name, pattern = OTHERS[group]
    model = zoo.tiny_model(name)
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    generator = torch.Generator().manual_seed(5)
    (wanted,) = (found for found in find_groups(model, find_attention(model)) if found.key == group)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for part in wanted.parts:
            if re.search(pattern, part.name):
                noise = 3 * params[part.name].std() * torch.randn(params[part.name].shape, generator=generator)
                part.put(params[part.name], params[part.name] + noise)
    noised(model, 1, 1e-4)
    model.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    found = attributed(tmp_path / "base", tmp_path / "tuned", agreement(load(tmp_path / "base")))
    assert found.cause == [group]
    data = {entry["key"]: entry for entry in found.to_json(0.02)["groups"]}
    assert any(re.search(pattern, part) for part in data[group]["names"]) and data["qk"]["names"] is None


# -- swapping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minimax", "qwen3_next", "phi3", "gpt2", "granitemoehybrid"])
def test_each_group_in_and_out(name: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, name, dtype=torch.bfloat16, shard="60KB")
    model, theirs, mine = load(tuned), load(base).state_dict(), load(tuned).state_dict()
    before = bits(model)
    with GroupSwap(model, open_folders(base, tuned), find_attention(model)) as swap:
        keys = [group.key for group in swap.groups]
        assert swap.changed == set(keys) and {"qk", "vo", "mlp", "norms"} <= set(keys) and not swap.warnings
        for state in states_to_measure(keys):
            swap.take_from_base(state)
            wanted = {part.name: mine[part.name].clone() for group in swap.groups for part in group.parts}
            for group in swap.groups:
                for part in group.parts if group.key in state else ():
                    part.put(wanted[part.name], theirs[part.name])
            found = model.state_dict()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
            assert not all(torch.equal(found[key], mine[key]) for key in wanted), "something came from the base"
            assert not all(torch.equal(found[key], theirs[key]) for key in wanted), "something stayed tuned"
        swap.take_from_base(keys)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items()), "the whole base"
    assert bits(model) == before
    with pytest.raises(ZeroDivisionError), swap:
        swap.take_from_base(keys)
        raise ZeroDivisionError
    assert bits(model) == before


def test_weights_that_do_not_return_are_reported(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    model = load(tuned)
    swap = GroupSwap(model, open_folders(base, tuned), find_attention(model))
    with pytest.raises(QKGuardError, match=r"layers\.1.*did not return to its own bits"), swap:
        swap.take_from_base({"qk"})
        model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] += 1


def test_a_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays read from both checkpoints are let go before the one after the next is read."""
    base, tuned = save_pair(tmp_path, "minimax")
    alive, most, total = [0], [0], [0]

    def gone(size: int) -> None:
        alive[0] -= size

    def watched(weights: Any, key: str) -> Any:
        array = scaled.read_whole(weights, key)
        alive[0] += array.nbytes
        total[0] += array.nbytes
        most[0] = max(most[0], alive[0])
        weakref.finalize(array, gone, array.nbytes)
        return array

    monkeypatch.setattr(group_swap, "read_whole", watched)
    model = load(tuned)
    largest = max(param.nbytes for param in model.parameters())
    with GroupSwap(model, open_folders(base, tuned), find_attention(model)) as swap:
        for state in states_to_measure(swap.changed):
            swap.take_from_base(state)
    assert 0 < most[0] <= 2 * largest < total[0] / 20
    assert alive[0] == 0


def test_a_quantised_base_is_dequantised(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", dtype=torch.bfloat16)
    meant = quantise(base, "fp8 blocks")
    model = load(tuned)
    with GroupSwap(model, open_folders(base, tuned), find_attention(model)) as swap:
        swap.take_from_base({"mlp"})
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(model.get_parameter(name), meant[name].float().bfloat16())
        assert not swap.warnings


def test_a_quantised_tuned_model_is_refused(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    model = load(tuned)
    param = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    param.data = param.data.to(torch.float8_e4m3fn)
    with pytest.raises(QKGuardError, match=r"up_proj\.weight is quantised"):
        GroupSwap(model, open_folders(base, tuned), find_attention(model))


# -- embeddings ---------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Any, **config: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))


def head_apart(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2


def head_again(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def three_rows_more(tensors: dict[str, Tensor]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((3, 64), 0.25)])


def predict_more(tensors: dict[str, Tensor]) -> None:
    tensors["mtp.fc.weight"] = torch.ones(2)


def swapped_norms(base: Path, tuned: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The embeddings of a model whose norms and embeddings come from the base, and the swap's warnings."""
    model = load(tuned)
    with GroupSwap(model, open_folders(base, tuned), find_attention(model)) as swap:
        swap.take_from_base({"norms"})
        state = {key: tensor.clone() for key, tensor in model.state_dict().items() if "embed" in key or "head" in key}
    return state, swap.warnings


def test_tied_embeddings(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", tie_word_embeddings=True)
    stored = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    for folder in (None, base, tuned):  # ZeRO-2 writes the tied one twice
        if folder is not None:
            edit(folder, head_again)
        state, warnings = swapped_norms(base, tuned)
        assert torch.equal(state["model.embed_tokens.weight"], stored) and not warnings
        assert torch.equal(state["lm_head.weight"], stored)


def test_embeddings_that_only_one_side_ties(tmp_path: Path) -> None:
    tied, _ = save_pair(tmp_path / "a", "llama", tie_word_embeddings=True)
    _, apart = save_pair(tmp_path / "b", "llama", tie_word_embeddings=True)
    edit(apart, head_apart, tie_word_embeddings=False)
    stored = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    state, warnings = swapped_norms(tied, apart)
    assert torch.equal(state["model.embed_tokens.weight"], stored) and not warnings
    assert torch.equal(state["lm_head.weight"], stored), "the base's output embedding is its input's"

    state, (warning,) = swapped_norms(apart, tied)
    assert "lm_head.weight of its own, which the tuned model ties" in warning
    assert torch.equal(state["lm_head.weight"], load_file(apart / "model.safetensors")["model.embed_tokens.weight"])


def test_tokens_that_sft_added(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    edit(tuned, three_rows_more, vocab_size=259)
    state, warnings = swapped_norms(base, tuned)
    stored = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(state[name][:256], stored[name]) and (state[name][256:] == 0.25).all()
    assert len(warnings) == 2 and "259 in the tuned model: the first 256 are swapped" in warnings[0]


# -- in the sweep -------------------------------------------------------------------------------------------------


def test_the_sweep_says_it(tmp_path: Path) -> None:
    from tests.offline.test_sweep import chains

    tuned = damaged_demo(tmp_path / "tuned", "qk")
    edit(tuned, dict, max_position_embeddings=4096)
    base = tmp_path / "base"
    shutil.copytree(MODEL, base)
    edit(base, predict_more)
    options: Any = SMALL | {"device": "cpu", "data": chains(6), "methods": "restore"}
    report = sweep(base, tuned, **options, attribute=True, write=tmp_path / "out")
    found = report.attribution
    assert found is not None and found.cause == ["qk"]
    restored = next(point for point in report.points if point.name == "restore")
    effect = found.of("qk")
    assert effect is not None and effect.back is not None and effect.back.task is not None
    assert effect.back.probe.correct == restored.probe.correct, "hit for hit: the same weights"
    assert effect.back.task.nll == restored.task.nll and effect.brings == restored.gain  # type: ignore[union-attr]
    mlp = found.of("mlp")
    assert mlp is not None and mlp.back is not None and mlp.back.task is not None
    assert mlp.back.task.nll != restored.task.nll  # type: ignore[union-attr]

    config, lost = report.warnings
    assert config.startswith("max_position_embeddings is 8192 in the base but 4096 in the tuned model")
    assert (
        lost.startswith("the tuned checkpoint lacks 1 tensor that the base has (mtp)") and (tmp_path / "out").exists()
    )
    data = json.loads(json.dumps(report.to_json()))["attribution"]
    assert data["cause"] == ["qk"] and data["words"] == found.words
    by_key = {group["key"]: group for group in data["groups"]}
    assert by_key["qk"]["taken_back"]["recall"] == restored.recall.to_json()
    losses = {key: group["all_others_taken_back"]["task"]["loss"] for key, group in by_key.items() if group["changed"]}
    assert max(losses, key=losses.__getitem__) == "qk"
    table = attribution_table(found, report.metric)
    assert [row[0] for row in table.rows] == [group["title"] for group in data["groups"]] and table.marked == 0
    assert {len(row) for row in table.rows} == {len(table.head)}
    page = html_page(report)
    assert "Which weights lost the recall" in page and page.count("src=") == 2
    assert all(sentence.replace("'", "&#39;") in page for sentence in found.words)
