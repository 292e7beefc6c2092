"""`qkguard probe` as typed: tables, JSON, pictures, several models, and one line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qkguard.demo
from qkguard.cli.options import parse_depths, parse_lengths
from qkguard.errors import QKGuardError
from qkguard.offline.models import LoadOptions, run_within_memory
from qkguard.offline.probe import probe_models
from qkguard.probe import Prober, ProbeResult, ProbeSettings
from tests.conftest import Run
from tests.support.lora import LINEAR, peft_merge, save_adapter
from tests.support.models import tiny_model
from tests.support.probing import bpe_tokenizer

DEMO = Path(qkguard.demo.__file__).parent / "model"
SMALL = ("--lengths", "256,300", "--depths", "2", "--samples", "2", "--tasks", "S1,mk2")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The demo's model without its queries, and without a tokenizer of its own."""
    folder = tmp_path / "run" / "model"
    shutil.copytree(DEMO, folder)
    for file in folder.glob("token*"):
        file.unlink()
    weights = load_file(folder / "model.safetensors")
    zeroed = {k: torch.zeros_like(v) if k.endswith("q_proj.weight") else v for k, v in weights.items()}
    save_file(zeroed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_models_side_by_side(run: Run, broken: Path, tmp_path: Path) -> None:
    code, out, err = run("probe", DEMO, broken, *SMALL, "--png", tmp_path / "a.png", "--html", tmp_path / "a.html")
    assert code == 0 and err == ""
    table = [line.split() for line in out.splitlines() if line.startswith(("single_1", "multikey_2", "all"))]
    assert [row[0] for row in table] == ["multikey_2", "multikey_2", "single_1", "single_1", "all"]
    assert float(table[-1][1].rstrip("%")) > 90 and float(table[-1][2].rstrip("%")) < 30
    assert re.search(r"run/model against model: -\d{2,3}\.\d points \(95% -\d", out)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "a.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 3, "three pictures, light and dark"
    assert "run/model" in page and re.search(
        r"<td>multikey_2</td><td>256</td><td>\d+\.\d% \(\d+% to \d+%\)</td>", page
    )
    assert "http" not in page  # nothing is loaded from elsewhere


def test_a_first_model_that_finds_nothing_is_said_to_show_no_loss(run: Run, broken: Path) -> None:
    for file in DEMO.glob("token*"):
        shutil.copy(file, broken)
    few = ("--lengths", "256", "--depths", "2", "--samples", "1", "--tasks", "mk2")
    code, _, err = run("probe", broken, DEMO, *few)
    assert code == 0 and "it finds no needles here (0 of 2), so this probe cannot show a loss" in err
    code, out, err = run("probe", DEMO, DEMO, *few)
    assert code == 0 and "no difference measured (2 samples)" in out and "needles" not in err


def test_an_adapter_is_probed_on_the_base_it_names(tmp_path: Path) -> None:
    adapter = save_adapter(DEMO, tmp_path / "adapter", scale=0.3, target_modules=LINEAR, use_dora=True)
    peft_merge(DEMO, adapter, tmp_path / "merged")
    settings = ProbeSettings(lengths=[256], depths=2, samples=1, tasks=["S1"], attention=False)
    folders = [str(DEMO), str(adapter), str(tmp_path / "merged")]
    base, found, wanted = (report.result.logprob for report in probe_models(folders, settings))
    assert found == pytest.approx(wanted, abs=1e-4)
    assert found != pytest.approx(base, abs=1e-2)


def test_json_is_the_whole_result(run: Run, broken: Path) -> None:
    code, out, _ = run("probe", DEMO, broken, *SMALL, "--json", "--generate", "--new-tokens", 10)
    assert code == 0
    first, second = json.loads(out)["models"]
    result = ProbeResult.from_json(first["result"])
    assert len(result.sample_keys) == 16 and result.settings["model"] == str(DEMO)
    assert result.generated["contradicted"] == 0 and result.generated["recall"] >= result.recall
    assert first.get("drop") is None and second["drop"]["drop"] > 0.5 and second["drop"]["p_value"] < 0.01
    assert second["result"]["settings"]["digest"] == first["result"]["settings"]["digest"]


def test_a_haystack_per_length_is_another_probe(run: Run) -> None:
    one, other = (run("probe", DEMO, *SMALL, "--haystack-per", per, "--json") for per in ("sample", "length"))
    assert one[0] == other[0] == 0
    found = [json.loads(out)["models"][0]["result"]["settings"] for _, out, _ in (one, other)]
    assert [settings["haystack_per"] for settings in found] == ["sample", "length"]
    assert found[0]["digest"] != found[1]["digest"]


def test_prompts_from_a_file(run: Run, tmp_path: Path) -> None:
    row = {"input": "One of the special magic numbers for bold-island is: 1234567.", "outputs": ["1234567"]}
    row["gen_prefix"] = "The special magic number for bold-island mentioned in the provided text is"
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    code, out, _ = run("probe", DEMO, "--prompts", tmp_path / "p.jsonl", "--new-tokens", 9, "--json")
    (model,) = json.loads(out)["models"]
    assert code == 0 and len(model["answers"]) == 1 and model["recall"] == model["answers"][0]["score"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no/such/folder"], "no such folder"),
        ([DEMO, "--lengths", "many"], "--lengths 'many'"),
        ([DEMO, "--depths", "deep"], "--depths 'deep'"),
        ([DEMO, "--depths", "0,7"], "expected numbers from 0"),
        ([DEMO, "--tasks", "vt"], "Unknown probe task"),
        ([DEMO, "--lengths", "20"], "too short"),
        ([DEMO, "--new-tokens", "0"], "'--new-tokens'"),
        ([DEMO, "--samples", "0"], "'--samples'"),
        ([DEMO, "--mode", "chat"], "no chat template"),
        ([DEMO, "--mode", "loud"], "--mode 'loud'"),
        ([DEMO, "--haystack-per", "task"], "--haystack-per 'task'"),
        ([DEMO, "--dtype", "int3"], "dtype 'int3'"),
        ([DEMO, "--haystack", "no/such.txt"], "no such file"),
        ([DEMO, "--png", "no/such/a.png"], "there is no folder"),
        ([DEMO, "--prompts", "none.jsonl"], "none.jsonl"),
        ([], "Missing argument"),
    ],
)
def test_mistakes_cost_one_line(run: Run, args: list[object], message: str) -> None:
    code, out, err = run("probe", *args)
    assert (code, out) == (2, "") and message in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_a_model_without_weights_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    for file in DEMO.glob("token*"):
        shutil.copy(file, tmp_path)
    code, _, err = run("probe", tmp_path)
    assert code == 2 and "could not be loaded" in err


def test_lengths_beyond_the_model_are_warned_of(run: Run, tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=1024, max_position_embeddings=256).save_pretrained(tmp_path / "m")  # type: ignore[operator]
    bpe_tokenizer().save_pretrained(tmp_path / "m")
    code, _, err = run("probe", tmp_path / "m", "--lengths", "300", "--depths", 1, "--samples", 1, "--tasks", "s1")
    beyond, floor = err.splitlines()
    assert (code, beyond) == (0, "warning: m: lengths above 256 tokens are beyond the model's max_position_embeddings")
    assert floor == "warning: m: it finds no needles here (0 of 1), so this probe cannot show a loss"


def test_lists_of_numbers() -> None:
    assert parse_lengths("512, 1K 2.5k,131072") == [512, 1024, 2560, 131072]
    assert parse_depths("5") == 5 and parse_depths("0.5") == [0.5] and parse_depths("0,1") == [0.0, 1.0]


def test_memory_that_ends_means_smaller_batches() -> None:
    class Hungry(nn.Module):
        """Answers nothing, and has room for 700 tokens at a time."""

        def __init__(self, room: int) -> None:
            super().__init__()
            self.weight, self.room = nn.Parameter(torch.zeros(1)), room

        def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> object:
            if input_ids.numel() > self.room:
                raise torch.OutOfMemoryError
            return type("Out", (), {"logits": torch.zeros(len(input_ids), logits_to_keep, 700)})()

    prober = Prober(bpe_tokenizer(), ProbeSettings(lengths=[300], depths=2, samples=4, tasks=["s1"], attention=False))
    assert run_within_memory(Hungry(700), prober, lambda done, total: None).recall == 0
    assert 300 <= prober.batch_tokens <= 700
    with pytest.raises(QKGuardError, match="Out of memory with one context of up to 300 tokens"):
        run_within_memory(Hungry(200), prober, lambda done, total: None)


def test_chunks_where_the_cache_allows_them(tmp_path: Path) -> None:
    for name in ("llama", "minimax"):
        model = tiny_model(name, vocab_size=1024, max_position_embeddings=1024)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 3  # outputs that depend on what was read
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        bpe_tokenizer().save_pretrained(tmp_path / name)
    settings = ProbeSettings(lengths=[300], depths=2, samples=1, tasks=["s1"], attention=True)
    load = LoadOptions(device="cpu")
    for name, allowed in (("llama", True), ("minimax", False)):
        (whole,) = probe_models([str(tmp_path / name)], settings, load)
        (parts,) = probe_models([str(tmp_path / name)], replace(settings, chunk=100), load)
        assert bool([line for line in parts.warnings if "no needles" not in line]) is not allowed
        assert parts.result.logprob == pytest.approx(whole.result.logprob, abs=1e-3)
        needle, same = (torch.tensor(r.result.attention.needle[300]) for r in (whole, parts))
        assert torch.allclose(needle, same, atol=1e-4)
