"""Starting weights against their own checkpoint: what a loader left random stops the run, what is meant does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from qkguard import QKGuardConfig, QKGuardError
from qkguard.distributed.samples import sample_params, sample_spans
from qkguard.layout import find_attention, select
from qkguard.offline.restore import restore_checkpoint
from qkguard.training.loader_check import loaded_from
from qkguard.training.reference import establish_reference
from tests.support.models import CONFIGS, noised, tiny_model
from tests.support.oracle import differences, expected, load_folder


def start(model: Any, folder: Path, **settings: Any) -> str:
    """Where the reference of a training that starts with this model comes from, in words."""
    selection = select(find_attention(model))
    config = QKGuardConfig(**settings)
    pending = establish_reference(model, selection, folder, config, resumed=False, writers=(0,))[1]
    pending.wait()
    return f"{pending.origin}, {pending.compared}"


def loaded(base: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, **options)


def make_random(param: torch.Tensor, seed: int = 0) -> None:
    """What a loader that skips a parameter leaves in it."""
    with torch.no_grad():
        param.copy_(0.02 * torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for name in CONFIGS:
        tiny_model(name).save_pretrained(folder / name)  # type: ignore[operator]
    return {name: folder / name for name in CONFIGS}


NOT_ON_DISK_AS_THEY_ARE = {"minimax": 8, "qwen3_next": 8}  # experts, joined while they are loaded


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_that_was_loaded_is_found_equal(name: str, bases: dict, tmp_path: Path) -> None:
    model = loaded(bases[name], dtype="bfloat16")
    said = start(model, tmp_path / "run")
    assert f"equal to {bases[name]}" in said and "differ" not in said
    joined = NOT_ON_DISK_AS_THEY_ARE.get(name, 0)
    assert (f"({joined} parameters not compared" in said) == bool(joined), said


@pytest.mark.parametrize("name", ["llama", "minimax", "gpt2", "granitemoehybrid"])
def test_each_parameter_left_random_stops_the_run(name: str, bases: dict, tmp_path: Path) -> None:
    """All but the output embedding, which may be made anew, and experts that are joined while they are loaded."""
    on_disk = set(load_folder(bases[name]))
    model = loaded(bases[name])
    known = [(n, p) for n, p in model.named_parameters() if n in on_disk and n != "lm_head.weight"]
    kinds = {parameter.split(".", 3)[-1]: (parameter, param) for parameter, param in known}  # the last layer's of each
    for parameter, param in kinds.values():
        kept = param.detach().clone()
        make_random(param)
        with pytest.raises(QKGuardError, match=r"differ from their own checkpoint .*the loader did not fill") as error:
            start(model, tmp_path / "run")
        assert parameter in str(error.value)
        with torch.no_grad():
            param.copy_(kept)
    assert len(kinds) > 8
    assert "equal to" in start(model, tmp_path / "run")


def test_a_run_that_was_stopped_leaves_no_reference_and_is_stopped_again(bases: dict, tmp_path: Path) -> None:
    model = loaded(bases["llama"])
    start(model, tmp_path / "run")
    make_random(model.model.layers[2].mlp.up_proj.weight)
    for _ in range(2):  # queries and keys are those of the reference that is there: it alone would let this through
        with pytest.raises(QKGuardError, match=r"1 of 39 parameters that were sampled .*layers\.2\.mlp\.up_proj"):
            start(model, tmp_path / "run")
        assert not (tmp_path / "run/reference.json").exists()
    assert "not compared with any checkpoint" in start(model, tmp_path / "run", base_model="live")


def test_what_is_meant_does_not_stop_a_run(bases: dict, tmp_path: Path) -> None:
    base = bases["minimax"]
    model = loaded(base)
    model.resize_token_embeddings(260)
    assert "10 parameters not compared" in start(model, tmp_path / "resized"), "both embeddings, and the experts"

    model = loaded(base)
    make_random(model.lm_head.weight)
    assert "lm_head.weight differs from it, as a head made anew does" in start(model, tmp_path / "head")

    model = loaded(base)
    make_random(model.model.embed_tokens.weight[5:15])  # rows of tokens that were added
    assert "equal to" in start(model, tmp_path / "rows")

    model = loaded(base)
    with torch.no_grad():  # an adapter merged into the values, say
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.01)
    assert "1 parameter changed a little since loading, first model.layers.1.self_attn.v_proj" in start(
        model, tmp_path / "merged"
    )

    model = loaded(base)
    model.value_head = torch.nn.Linear(64, 1)
    assert "10 parameters not compared" in start(model, tmp_path / "value")

    model = loaded(base)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert "it is quantised" in start(model, tmp_path / "quantised")


def test_tied_embeddings_under_either_name_or_both(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(base)  # type: ignore[operator]
    tensors = load_file(base / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    for number, names in enumerate([("lm_head",), ("lm_head", "model.embed_tokens")]):
        renamed = tensors | {f"{name}.weight": embedding.clone() for name in names}
        save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
        said = start(loaded(base), tmp_path / f"run-{number}")
        assert "equal to" in said and "not compared" not in said
        model = loaded(base)
        make_random(model.model.embed_tokens.weight)
        with pytest.raises(QKGuardError, match="embed_tokens"):
            start(model, tmp_path / f"random-{number}")


def test_samples_are_spread_and_cover_small_parameters() -> None:
    assert sample_spans(7) == [(0, 7)] and sample_spans(32) == [(0, 32)]
    spans = sample_spans(1000)
    assert len(spans) == 8 and spans[0] == (0, 4) and spans[-1] == (996, 1000)
    model = tiny_model("llama", dtype=torch.bfloat16)
    samples = sample_params(model)
    for name, param in model.named_parameters():
        flat = torch.cat([param.detach().reshape(-1)[a:b] for a, b in samples[name].spans]).double()
        assert torch.equal(samples[name].values, flat)


# -- models of the hub ---------------------------------------------------------------------------------------------

HASHES = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with two revisions of org/model."""
    repo = tmp_path / "hub" / "models--org--model"
    (repo / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate(HASHES.items()):
        tiny_model("llama", seed=seed).save_pretrained(repo / "snapshots" / commit)  # type: ignore[operator]
        (repo / "refs" / revision).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it asks the network again and again
    return repo / "snapshots"


@pytest.mark.parametrize("revision", HASHES)
def test_a_revision_is_compared_with_itself(revision: str, cache: Path, tmp_path: Path) -> None:
    model = loaded("org/model", revision=revision, cache_dir=cache.parents[1])
    assert not differences(model.state_dict(), load_folder(cache / HASHES[revision]))
    assert f"equal to org/model@{HASHES[revision][:12]}" in start(model, tmp_path / "run")
    make_random(model.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(QKGuardError, match=rf"{HASHES[revision]}, first model\.layers\.1\.mlp\.down_proj"):
        start(model, tmp_path / "random")


def test_a_revision_that_is_not_in_the_cache_is_not_compared(cache: Path, tmp_path: Path) -> None:
    model = loaded("org/model", revision="v2", cache_dir=cache.parents[1])
    noised(model, seed=9)
    assert "which revision of org/model was loaded, and it is none of those in the cache" in start(
        model, tmp_path / "a"
    )
    (cache / HASHES["v2"] / "config.json").unlink()
    assert "and it is not the one in the cache" in start(model, tmp_path / "b")
    model.config._commit_hash = "c" * 40  # as transformers 5.17 keeps it
    assert "none on this machine" in start(model, tmp_path / "c")
    model.config._commit_hash = HASHES["main"]
    with pytest.raises(QKGuardError, match="differ from their own checkpoint"):
        start(model, tmp_path / "d")


def test_the_revision_under_adapters_is_found(cache: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for revision, commit in HASHES.items():
        model = loaded("org/model", revision=revision, cache_dir=cache.parents[1])
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        assert loaded_from(adapted) == str(cache / commit)
    noised(model, seed=9)
    assert loaded_from(adapted) is None


def test_base_and_tuned_take_a_revision(cache: Path, tmp_path: Path, run) -> None:
    base, tuned = cache / HASHES["v2"], tmp_path / "tuned"
    noised(loaded(base), seed=3).save_pretrained(tuned)  # type: ignore[operator]
    manifest = restore_checkpoint("org/model@v2", tuned, tmp_path / "out")
    assert manifest["base"]["id"] == "org/model" and manifest["base"]["revision"] == HASHES["v2"]
    wanted = expected("llama", load_folder(base), load_folder(tuned))
    assert differences(load_folder(tmp_path / "out"), wanted) == []
    restore_checkpoint("org/model", tuned, tmp_path / "main")
    assert differences(load_folder(tmp_path / "main"), wanted), "the twin: main is another base"
    code, text, _ = run("drift", "--base", "org/model@main", "--tuned", "org/model@v2", "--json")
    assert code == 0 and json.loads(text)["mean"]["q_rel"] > 0.1
    code, _, err = run("restore", "--base", "org/model@v3", "--tuned", tuned, "--out", tmp_path / "none")
    assert code == 2 and "org/model@v3 is neither a folder here nor" in err

    model = loaded(tuned)
    assert "read from base_model org/model@v2" in start(model, tmp_path / "run", base_model="org/model@v2")
    from safetensors.torch import load_file

    name = "model.layers.3.self_attn.k_proj.weight"
    assert torch.equal(load_file(tmp_path / "run/reference.safetensors")[name], load_folder(base)[name])
