"""inspect, restore, drift and verify as typed: output, JSON, exit codes, and one line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkguard.offline import restore as offline
from tests.conftest import Run
from tests.support.models import noised, save_pair, tiny_model
from tests.support.oracle import differences, expected, load_folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save_pair(tmp_path, "qwen3_next", dtype=torch.bfloat16, shard="60KB")


def test_help_is_quick_and_names_the_commands() -> None:
    code = "import sys; sys.argv=['qkguard','--help']\nfrom qkguard.cli import main\n"
    code += "try: main()\nfinally: print('heavy', sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "heavy []" in done.stdout
    for command in ("inspect", "restore", "drift", "verify"):
        assert f" {command} " in done.stdout


def test_the_command_alone_shows_its_help(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "") and "\n  restore " in err and "error:" not in err
    assert err.strip() == run("--help")[1].strip()


def test_the_installed_command_restores(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    command = Path(sys.executable).with_name("qkguard")
    args = ["restore", "--base", base, "--tuned", tuned, "--out", tmp_path / "out", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([command, *args], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    manifest = json.loads(done.stdout)
    assert {t["name"] for t in manifest["tensors"]} == {f"model.layers.3.self_attn.{p}_proj.weight" for p in "qk"}
    wanted = expected("qwen3_next", load_folder(base), load_folder(tuned))
    assert differences(load_folder(tmp_path / "out"), wanted) == []


def test_restore_verify_drift_inspect(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    base, tuned = pair
    out = tmp_path / "out"
    code, text, err = run("restore", "--base", base, "--tuned", tuned, "--out", out, "--projections", "k")
    assert (code, err) == (0, "") and "1 tensors of 1 softmax-attention layers" in text
    code, text, _ = run("restore", "--base", base, "--tuned", tuned, "--out", out, "--overwrite", "--json")
    assert code == 0 and len(json.loads(text)["tensors"]) == 2

    code, text, _ = run("verify", out, "--full")
    assert code == 0 and "whole" in text and "every byte" in text
    code, text, _ = run("verify", out, "--json")
    assert code == 0 and json.loads(text)["raw"] == "unchanged"

    code, text, _ = run("drift", "--base", base, "--tuned", tuned, "--heads")
    assert code == 0 and "routing_rel" in text and "head 3" in text
    before = json.loads(run("drift", "--base", base, "--tuned", tuned, "--json")[1])
    after = json.loads(run("drift", "--base", base, "--tuned", out, "--json", "--no-routing")[1])
    assert before["mean"]["q_rel"] > 0.1 and "routing_rel" in before["mean"]
    assert after["mean"] == {"q_rel": 0, "q_1mcos": 0, "k_rel": 0, "k_1mcos": 0}

    code, text, _ = run("inspect", tuned)
    assert code == 0 and "3 linear_attention, 1 full_attention" in text
    assert "q 0:16, 32:48, 64:80, ... (4 ranges)" in text
    code, text, _ = run("inspect", tuned / "config.json", "--json")
    report = json.loads(text)
    assert report["softmax_layers"] == 1
    assert report["parameters"]["query_key"] == (64 + 32) * 64
    assert report["layers"][0]["params"][0]["rows"]["q"] == [[0, 16], [32, 48], [64, 80], [96, 112]]


def test_drift_numbers_are_those_of_a_plain_computation(tmp_path: Path, run: Run) -> None:
    base, tuned = save_pair(tmp_path, "gpt_neox")
    report = json.loads(run("drift", "--base", base, "--tuned", tuned, "--json")[1])
    old, new = load_folder(base), load_folder(tuned)
    for layer in report["layers"]:
        name = f"gpt_neox.layers.{layer['layer']}.attention.query_key_value.weight"
        w0, w = (folder[name].double().view(4, 3, 16, 64) for folder in (old, new))
        (q0, k0), (q, k) = ((x[:, 0], x[:, 1]) for x in (w0, w))
        routing = [((q[h].T @ k[h] - q0[h].T @ k0[h]).norm() / (q0[h].T @ k0[h]).norm()).item() for h in range(4)]
        assert layer["drift"]["q_rel"] == pytest.approx(((q - q0).norm() / q0.norm()).item(), rel=1e-6)
        assert layer["drift"]["k_rel"] == pytest.approx(((k - k0).norm() / k0.norm()).item(), rel=1e-6)
        assert layer["drift"]["q_1mcos"] == pytest.approx((1 - (q * q0).sum() / q.norm() / q0.norm()).item(), rel=1e-6)
        assert layer["routing_per_head"] == pytest.approx(routing, rel=1e-9)
        top = torch.linalg.matrix_norm((k - k0).reshape(64, 64), 2).item()
        assert layer["drift"]["k_top_sv"] == pytest.approx(top, rel=1e-2)
        heads = next(t for t in layer["tensors"] if t["kind"] == "weight")["rel_per_head"]["q"]
        plain = [((q[h] - q0[h]).norm() / q0[h].norm()).item() for h in range(4)]
        assert [heads[str(h)] for h in range(4)] == pytest.approx(plain, rel=1e-6)
        assert heads["0"] != pytest.approx(heads["1"], rel=1e-4)


def test_a_layout_by_hand(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    """A model type that nobody knows, and the layout of one that is known."""
    base, tuned = pair
    spec = tmp_path / "spec.yaml"
    assert run("inspect", tuned, "--write-spec", spec)[0] == 0
    assert "exists" in one_line(*run("inspect", tuned, "--write-spec", spec))
    unknown_architecture(base, tuned)
    assert "nobody_knows" in one_line(*run("inspect", tuned))
    code, text, _ = run("inspect", tuned, "--spec", spec)
    assert code == 0 and "unknown model type" in text and "q 0:16, 32:48, 64:80, ... (4 ranges)" in text
    assert run("restore", "-b", base, "-t", tuned, "-o", tmp_path / "out", "--spec", spec)[0] == 0
    wanted = expected("qwen3_next", load_folder(base), load_folder(tuned))
    assert differences(load_folder(tmp_path / "out"), wanted) == []
    assert json.loads(run("drift", "-b", base, "-t", tuned, "--spec", spec, "--json")[1])["mean"]["q_rel"] > 0.1
    spec.write_text(spec.read_text().replace("shape: [128, 64]", "shape: [96, 64]").replace("[96, 112, q, 3]", ""))
    assert "spec.yaml" in one_line(*run("inspect", tuned, "--spec", spec))


def one_line(code: int, out: str, err: str) -> str:
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


USAGE = {
    "no command": (["restor"], "'restore'"),
    "a missing option": (["restore", "--base", "x"], "--tuned"),
    "unknown parts": (["restore", "-b", "x", "-t", "y", "-o", "z", "--projections", "qv"], "expected q, k or both"),
    "unknown layers": (
        ["drift", "-b", "x", "-t", "y", "--layers", "3-1"],
        "expected layer numbers such as 3,7,11",
    ),
    "unknown choice": (["restore", "-b", "x", "-t", "y", "-o", "z", "--shared", "no"], "keep, restore, refuse"),
    "no folder": (["restore", "-b", "./x", "-t", "./y", "-o", "z"], "no such folder: x"),
    "no folder to verify": (["verify", "./x"], "no such folder: x"),
    "no model to inspect": (["inspect", "./nowhere/config.json"], "nowhere"),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_mistyped_command_is_one_line(case: str, run: Run) -> None:
    args, message = USAGE[case]
    assert message in one_line(*run(*args))


def another_architecture(base: Path, tuned: Path) -> None:
    shutil.rmtree(base)
    tiny_model("llama").save_pretrained(base)


def another_shape(base: Path, tuned: Path) -> None:
    shutil.rmtree(base)
    tiny_model("qwen3_next", num_key_value_heads=4).save_pretrained(base)


def another_depth(base: Path, tuned: Path) -> None:
    kinds = ["linear_attention", "full_attention"]
    shutil.rmtree(base)
    tiny_model("qwen3_next", num_hidden_layers=2, layer_types=kinds).save_pretrained(base)


def truncated(base: Path, tuned: Path) -> None:
    file = sorted(tuned.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1000])


def corrupt(base: Path, tuned: Path) -> None:
    file = sorted(base.glob("*.safetensors"))[0]
    file.write_bytes(b"\xff" * 4000)


def missing_shard(base: Path, tuned: Path) -> None:
    sorted(tuned.glob("*.safetensors"))[-1].unlink()


def outside(base: Path, tuned: Path) -> None:
    index = tuned / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../base/model-00001"))


def pickled(base: Path, tuned: Path) -> None:
    for file in tuned.glob("model*"):
        file.unlink()
    torch.save({}, tuned / "pytorch_model.bin")


def adapter(base: Path, tuned: Path) -> None:
    for file in tuned.glob("model*"):
        file.unlink()
    (tuned / "adapter_config.json").write_text("{}")


def nan_in_base(base: Path, tuned: Path) -> None:
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if "3.self_attn.k_proj" in name:
                tensors[name][0, 0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})


def no_config(base: Path, tuned: Path) -> None:
    (tuned / "config.json").unlink()


def unknown_architecture(base: Path, tuned: Path) -> None:
    for folder in (base, tuned):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"model_type": "nobody_knows", "architectures": ["X"]})
        )


def lacking_a_tensor(base: Path, tuned: Path) -> None:
    for file in base.glob("model*"):
        file.unlink()
    save_file({"something.weight": torch.zeros(3)}, base / "model.safetensors", metadata={"format": "pt"})


MISTAKES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "another architecture": (another_architecture, "The base is a llama model"),
    "another shape": (another_shape, "num_key_value_heads is 4 in the base"),
    "another depth": (another_depth, "num_hidden_layers is 2 in the base"),
    "truncated": (truncated, "truncated"),
    "corrupt": (corrupt, "not a safetensors file"),
    "missing shard": (missing_shard, "lacks model-000"),
    "index outside the folder": (outside, "points outside its folder"),
    "pickles": (pickled, "save_pretrained"),
    "an adapter": (adapter, "adapter, not a full checkpoint"),
    "NaN in the base": (nan_in_base, "NaN or Inf before SFT"),
    "no config": (no_config, "no config.json"),
    "an unknown architecture": (unknown_architecture, "nobody_knows"),
    "a base without the tensors": (lacking_a_tensor, "k_proj.weight"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, pair: tuple[Path, Path], tmp_path: Path, run: Run
) -> None:
    base, tuned = pair
    damage, message = MISTAKES[case]
    damage(base, tuned)
    err = one_line(*run("restore", "--base", base, "--tuned", tuned, "--out", tmp_path / "out", "--json"))
    assert message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_targets_that_are_taken(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    base, tuned = pair
    for out, message in (
        (tuned, "is or contains"),
        (base, "is or contains"),
        (tmp_path, "is or contains"),
        (tuned / "config.json", "exists"),
        (tuned / "config.json" / "below", "config.json"),
    ):
        assert message in one_line(*run("restore", "--base", base, "--tuned", tuned, "--out", out))
    assert "same folder" in one_line(*run("restore", "-b", tuned, "-t", tuned, "-o", tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_warnings_go_to_stderr_and_into_the_manifest(tmp_path: Path, run: Run) -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    model.save_pretrained(tmp_path / "base")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    noised(model, 3).save_pretrained(tmp_path / "tuned")
    code, out, err = run(
        "restore", "-b", tmp_path / "base", "-t", tmp_path / "tuned", "-o", tmp_path / "out", "--json"
    )
    assert code == 0 and err.startswith("warning: rope_parameters.rope_theta is 10000.0 in the base but 500000.0 in")
    assert json.loads(out)["warnings"] == [err.removeprefix("warning: ").strip()]


def test_a_terminated_command_unwinds(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM and SIGHUP act like ctrl-C, so that half-written folders are removed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in handlers:
        monkeypatch.setattr(offline, "restore_checkpoint", lambda *args, **kwargs: os.kill(os.getpid(), number))  # noqa: B023
        assert run("restore", "-b", "x", "-t", "y", "-o", tmp_path / "out")[0] == 130
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_layers_without_softmax_attention_are_refused(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    base, tuned = pair
    err = one_line(*run("restore", "-b", base, "-t", tuned, "-o", tmp_path / "out", "--layers", "0-3"))
    assert "Layers [0, 1, 2] have no softmax attention; those that have it: 3" in err
