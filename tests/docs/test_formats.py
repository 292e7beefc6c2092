"""Every `--json`, `qkguard.json` and `metrics.jsonl` against its schema in docs/schemas: no key is undescribed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from peft import LoraConfig

import qkguard
from qkguard.cli import app
from tests.conftest import Run
from tests.offline.test_missing import pair_that_lost
from tests.support.demos import make_small
from tests.support.quantised import quantise
from tests.support.stand_ins import guarded_run, make_stand_ins

jsonschema = pytest.importorskip("jsonschema", reason="of the extra dev; an environment made before it lacks it")

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
PROBE = "--lengths 256 --samples 1 --depths 1 --tasks single_2"
PAIR = "--base BASE --tuned TUNED"
METHODS = "--methods restore,restore:layers=retrieval --each-layer --controls vo --attribute"
SWEEP = f"sweep {PAIR} --data heldout.jsonl {PROBE} {METHODS}"
COMMANDS = [
    ("inspect", "inspect MODEL --verify", 0),
    ("restore", f"restore {PAIR} --out OUT", 0),
    ("restore", f"restore {PAIR} --out OUT-2 --method qk-pro", 0),
    ("restore", f"restore {PAIR} --out OUT-3 --method interpolate --alpha 0.5 --align", 0),
    ("merge", "merge --base BASE --adapter ADAPTER --out OUT-4", 0),
    ("drift", f"drift {PAIR}", 0),
    ("verify", "verify OUT --full --load", 0),
    ("probe", f"probe BASE TUNED {PROBE}", 0),
    ("probe", f"probe BASE {PROBE} --generate --new-tokens 4", 0),
    ("probe", "probe BASE --prompts prompts.jsonl --new-tokens 4", 0),
    ("sweep", SWEEP, 0),
    ("diagnose", "diagnose --model MODEL --data cot.jsonl --against prose.txt --far 8", 0),
    ("diagnose", "diagnose --model MODEL --data prose.txt --rows 1 --max-length 60 --no-heads", 0),
    ("recipes", "recipes", 0),
    ("integrations", "integrations", 0),
    ("integrations", "integrations ms-swift", 0),
    ("sft", "sft --dry-run --config qwen3.5/cot-sft/full --model_name_or_path qwen3.5 --dataset_name rows.jsonl", 0),
    ("demo", "demo --steps 1", 0),
    ("report", "report run", 0),
]


def schema(name: str) -> dict[str, Any]:
    return json.loads((SCHEMAS / f"{name}-1.json").read_text(encoding="utf-8"))


def closed(part: Any) -> Any:
    """A schema that takes no key which it does not describe, inside all of its objects."""
    if isinstance(part, list):
        return [closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    out = {key: closed(value) for key, value in part.items()}
    if "properties" in out and "additionalProperties" not in out:
        out["unevaluatedProperties"] = False
    return out


def opened(part: dict[str, Any]) -> dict[str, Any]:
    """The same without that at its top: for schemas that others extend."""
    return {key: value for key, value in part.items() if key != "unevaluatedProperties"}


def complaints(name: str, data: Any) -> list[str]:
    """What a closed schema finds wrong with data."""
    from referencing import Registry, Resource

    found = {path.name: closed(json.loads(path.read_text(encoding="utf-8"))) for path in SCHEMAS.glob("*.json")}
    extended = found | {"qkguard-1.json": opened(found["qkguard-1.json"])}
    registry = Registry().with_resources([(key, Resource.from_contents(value)) for key, value in extended.items()])
    top = found[f"{name}-1.json"]
    if name == "qkguard":
        top = top | {"$id": "closed.json"}
    validator = jsonschema.Draft202012Validator(top, registry=registry)
    return [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(data)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stand-ins, prompts and a guarded run; the working directory of the commands."""
    root = make_stand_ins(tmp_path_factory.mktemp("formats"))
    (root / "prompts.jsonl").write_text(json.dumps({"input": "m = 3 ; n", "outputs": ["4"]}) + "\n")
    guarded_run(root / "run", layers="retrieval")
    guarded_run(root / "run-lora", peft_config=LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        make_small(patch)
        yield root


@pytest.mark.parametrize(("name", "command", "expected"), COMMANDS)
def test_what_commands_print_is_described(name: str, command: str, expected: int, place: Path, run: Run) -> None:
    code, out, err = run(*command.split(), "--json")
    assert code == expected, err
    assert complaints(name, json.loads(out, parse_constant=pytest.fail)) == []


def test_every_command_with_json_has_a_schema() -> None:
    commands = typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    with_json = {name for name, command in commands if any("--json" in param.opts for param in command.params)}
    assert with_json == {name for name, _, _ in COMMANDS}
    files = {path.stem for path in SCHEMAS.glob("*.json")}
    assert files == {f"{name}-1" for name in with_json | {"adapter", "common", "metrics", "qkguard"}}


@pytest.mark.parametrize("folder", ["checkpoint-2/qk_restored", "_qkguard/final/qk_restored"])
def test_a_run_s_manifests_are_described(folder: str, place: Path) -> None:
    manifest = json.loads((place / "run" / folder / "qkguard.json").read_text())
    assert complaints("qkguard", manifest) == []


def test_a_manifest_of_a_quantised_base_with_more_tensors_is_described(tmp_path: Path) -> None:
    base, tuned = pair_that_lost(tmp_path)
    quantise(base, "fp8 blocks")
    manifest = qkguard.restore_checkpoint(base, tuned, tmp_path / "out", carry_missing=True)
    assert manifest["carried"] and manifest["base"]["quantised"] and complaints("qkguard", manifest) == []
    assert complaints("qkguard", manifest | {"carried": [manifest["carried"][0] | {"new": 1}]})


def test_an_adapter_s_manifest_is_described(place: Path) -> None:
    (file,) = place.glob("run-lora/checkpoint-2/qk_restored/**/qkguard.json")
    assert complaints("adapter", json.loads(file.read_text())) == []


def test_metrics_are_described(place: Path) -> None:
    rows = [json.loads(line) for line in (place / "run/_qkguard/metrics.jsonl").read_text().splitlines()]
    assert {"niah_grid", "niah_restored_change", "verdict", "saved_step", "retrieval"} <= set().union(*rows)
    assert [complaint for row in rows for complaint in complaints("metrics", row)] == []


def described_keys() -> re.Pattern[str]:
    """The metrics that the table in docs/metrics.md has."""
    found = []
    for cell in re.findall(r"^\| (`qkguard/.*?) \|", (SCHEMAS.parent / "metrics.md").read_text(), re.M):
        names = re.findall(r"`([^`]+)`", cell)
        parent = names[0].rsplit("/", 1)[0]
        found += [name if name.startswith("qkguard/") else f"{parent}/{name}" for name in names]
    places = {"{i}": "[\\d.]+", "{task}": "\\w+", "{length}": "\\d+", "{point}": "[^/]+"}
    patterns = [re.sub(r"\\?\{\w+\\?\}", lambda m: places[m[0].replace("\\", "")], re.escape(name)) for name in found]
    return re.compile("|".join(f"(?:{pattern}(?:/max)?)" for pattern in patterns))


def test_every_metric_is_in_the_table(place: Path) -> None:
    rows = [json.loads(line) for line in (place / "run/_qkguard/metrics.jsonl").read_text().splitlines()]
    keys = {key.replace("_restored", "") for row in rows for key in row if key.startswith("qkguard/")}
    assert len(keys) > 20
    assert [key for key in sorted(keys) if not described_keys().fullmatch(key)] == []
    assert not described_keys().fullmatch("qkguard/drift/layer_2/new")


@pytest.mark.parametrize(
    ("key", "value"), [("new", 1), ("method", {"name": 3}), ("format", 2), ("created", None), ("files", {"a": {}})]
)
def test_other_manifests_are_found_out(key: str, value: Any, place: Path) -> None:
    manifest = json.loads((place / "run/checkpoint-2/qk_restored/qkguard.json").read_text())
    assert complaints("qkguard", manifest | {key: value})
    del manifest["tensors"]
    assert complaints("qkguard", manifest)


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.json")), ids=lambda path: path.stem)
def test_schemas_are_schemas(path: Path) -> None:
    text = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(text)
    assert text["$id"] == path.name and text["title"]
