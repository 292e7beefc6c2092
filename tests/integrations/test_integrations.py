"""The room itself. Frameworks are not installed here: their loading code is stood in for, nothing of ours is."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from qkguard import QKGuardCallback, QKGuardConfig, QKGuardError, restore_checkpoint
from qkguard.distributed import ranks
from qkguard.integrations import restore_after_save
from qkguard.integrations.frameworks import FRAMEWORKS, find_framework, needed
from qkguard.integrations.settings import VARIABLE, checked, from_environment
from tests.integrations.page import blocks
from tests.support.models import save_pair

SECTION: dict[str, Any] = {"restore_on": "end", "probe_lengths": [1024], "per_layer": {3: 0.5}, "probe_budget": None}
SECTION["method"] = "interpolate"
WRONG: list[tuple[Any, str]] = [
    ({"restore_onn": "end"}, "Unknown setting restore_onn='end'. Did you mean restore_on?"),
    ({"probe_samples": "many"}, "Invalid probe_samples='many': expected a whole number >= 1."),
    ([1], "[1] is no section of settings"),
]


class AnswersAll(dict):
    """axolotl's kind of mapping: a missing key is None."""

    def __missing__(self, key: object) -> None:
        return None


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of a framework that is not installed, with the packages above it."""
    with pytest.raises(PackageNotFoundError):  # the real one is tested in test_frameworks.py
        version(name.partition(".")[0])
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    yield importlib.import_module("qkguard.integrations.axolotl")
    sys.modules.pop("qkguard.integrations.axolotl")


def test_the_axolotl_section_is_the_guards_own_settings(axolotl: ModuleType) -> None:
    module, _, name = axolotl.QKGuardPlugin().get_input_args().rpartition(".")
    kind = getattr(importlib.import_module(module), name)  # as axolotl finds it
    assert issubclass(kind, BaseModel)
    section = kind.model_json_schema()["properties"]["qkguard"]["anyOf"][0]
    schema = TypeAdapter(QKGuardConfig).json_schema()
    assert section["properties"] == schema["properties"] and section["additionalProperties"] is False
    assert set(section["properties"]) == set(QKGuardConfig.__dataclass_fields__)
    defaults = QKGuardConfig().to_json()
    assert kind(qkguard=defaults).qkguard == defaults


def test_the_axolotl_plugin_hands_the_section_to_the_guard(axolotl: ModuleType) -> None:
    plugin = axolotl.QKGuardPlugin()
    merged = type("AxolotlInputConfig", (axolotl.QKGuardArgs,), {})
    for given, wanted in ((SECTION, QKGuardConfig(**SECTION)), (None, QKGuardConfig()), ({}, QKGuardConfig())):
        kept = merged(qkguard=given).model_dump(exclude_none=True)  # what axolotl does: a null must survive it
        cfg = AnswersAll({k: AnswersAll(v) if v is not None else v for k, v in kept.items()})
        (guard,) = plugin.add_callbacks_pre_trainer(cfg, model=None)
        assert isinstance(guard, QKGuardCallback) and guard.config == wanted
    assert QKGuardConfig(**SECTION) != QKGuardConfig()


@pytest.mark.parametrize("plugin", [True, False])
def test_the_guards_lines_show_where_axolotl_hides_those_of_others(
    axolotl: ModuleType, plugin: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A root handler for warnings alone, and loggers too, as axolotl has; without the plugin nothing changes."""
    quiet, package, inner = logging.StreamHandler(), logging.getLogger("qkguard"), logging.getLogger("qkguard.inner")
    quiet.setLevel(logging.WARNING)
    monkeypatch.setattr(logging.getLogger(), "handlers", [quiet])
    package.handlers.clear()
    hides = type("AxolotlOrWarnErrorFilter", (logging.Filter,), {"__module__": "axolotl.logging_config"})
    hides.filter = lambda self, record: record.levelno >= logging.WARNING
    monkeypatch.setattr(inner, "filters", [hides()])
    if plugin:
        axolotl.QKGuardPlugin().add_callbacks_pre_trainer(AnswersAll({}), model=None)
    else:
        QKGuardCallback()
    inner.info("a line")
    assert ("[qkguard] INFO a line" in capsys.readouterr().err) == plugin


@pytest.mark.parametrize(("section", "said"), WRONG)
def test_axolotl_refuses_what_the_guard_refuses(axolotl: ModuleType, section: Any, said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        axolotl.QKGuardArgs(qkguard=section)
    (found,) = refused.value.errors()
    assert found["loc"][0] == "qkguard" and said in found["msg"]


def test_the_ms_swift_plugin_registers_the_guard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registered: dict[str, Any] = {}
    stand_in(monkeypatch, "swift.callbacks", callbacks_map=registered)
    assert find_framework("LLaMAFactory").name == "llama-factory" and find_framework("miles").file is None
    assert find_framework("unsloth") is find_framework("trl")
    file = find_framework("ms-swift").file
    # ms-swift puts the folder on sys.path: no module name in it may be anybody else's
    assert {path.name for path in file.parent.glob("*.py")} == {"__init__.py", "qkguard_ms_swift.py"}

    def load() -> QKGuardCallback:
        spec = importlib.util.spec_from_file_location("_swift_external", file)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return registered["qkguard"](object(), object())

    assert load().config == QKGuardConfig()
    written = tmp_path / "guard.yaml"
    written.write_text("restore_on: end\nprobe_lengths: [1024]\n")
    for text in (str(written), "{restore_on: end, probe_lengths: [1024]}"):
        monkeypatch.setenv(VARIABLE, text)
        assert load().config == QKGuardConfig(restore_on="end", probe_lengths=[1024])
    monkeypatch.setenv(VARIABLE, "{restore_on: never_ever}")
    with pytest.raises(QKGuardError, match="QKGUARD_SETTINGS: Invalid restore_on='never_ever'"):
        load()


@pytest.mark.parametrize(
    ("text", "said"),
    [("/none.yaml", "cannot be read"), ("{a: [", "is not valid YAML"), ("end", "'end' is no section of settings")],
)
def test_settings_that_are_none(monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(QKGuardError, match=VARIABLE) as refused:
        from_environment()
    assert said in str(refused.value)


def test_llama_factory_trains_with_the_guard_and_without_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[Any, list[QKGuardCallback]]] = []
    given: list[Any] = [{"stage": "sft", "qkguard": {"restore_on": "end"}}, {"stage": "sft"}, ["--stage", "sft"]]

    def run_exp(args: Any, callbacks: list[QKGuardCallback]) -> None:
        trained.append((args, callbacks))

    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    stand_in(monkeypatch, "llamafactory.hparams", read_args=lambda: given[len(trained)])
    from qkguard.integrations import llamafactory

    for _ in range(3):
        llamafactory.main()
    assert [args for args, _ in trained] == [{"stage": "sft"}, {"stage": "sft"}, ["--stage", "sft"]]
    configs = [callbacks[0].config for _, callbacks in trained]
    assert configs == [QKGuardConfig(restore_on="end"), QKGuardConfig(), QKGuardConfig()]
    given.append({"qkguard": {"restore_on": "sometimes"}})
    with pytest.raises(QKGuardError, match="qkguard: Invalid restore_on"):
        llamafactory.main()


def test_a_missing_framework_is_one_line() -> None:
    with pytest.raises(ImportError) as missing, needed("axolotl", "axolotl"):
        import axolotl.integrations.base  # noqa: F401
    assert "\n" not in str(missing.value) and "axolotl is not installed; install it first" in str(missing.value)
    with pytest.raises(ModuleNotFoundError, match="bits_and_bobs"), needed("axolotl", "axolotl"):
        import bits_and_bobs  # noqa: F401 - what a framework itself misses keeps its own message


def test_the_room_imports_without_any_framework() -> None:
    code = "import sys, qkguard.integrations as room; room.restore_after_save; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    brought = {name.partition(".")[0] for name in done.stdout.split()}
    assert "qkguard" in brought and not brought & {"axolotl", "swift", "llamafactory", "torch", "pydantic"}
    assert all(framework.file is None or framework.file.is_file() for framework in FRAMEWORKS)
    assert checked(None) == {} and checked(SECTION) == SECTION


def test_restoring_after_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    wanted = tmp_path / "wanted"
    restore_checkpoint(base, tuned, wanted)
    for _ in range(2):  # a hook may come again for the same folder
        made = restore_after_save(base, tuned)
        assert made == tuned / "qk_restored"
        assert (made / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    assert (wanted / "model.safetensors").read_bytes() != (tuned / "model.safetensors").read_bytes()
    half = restore_after_save(base, tuned, method="interpolate", alpha=0.5)
    assert half is not None
    assert (half / "model.safetensors").read_bytes() != (wanted / "model.safetensors").read_bytes()

    before = (half / "qkguard.json").read_bytes()
    monkeypatch.setattr(ranks, "rank", int)  # 0
    with caplog.at_level(logging.ERROR, "qkguard"):
        assert restore_after_save(tmp_path / "none", tuned) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"Restoring {tuned} failed: ") and "Training continues." in line
    with pytest.raises(QKGuardError, match="no such folder"):
        restore_after_save(tmp_path / "none", tuned, strict=True)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert restore_after_save(base, tuned) is None
    assert (half / "qkguard.json").read_bytes() == before


def test_the_pages_hooks_run_as_the_frameworks_call_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    verl, miles, megatron = blocks("Frameworks with a hook after a save", "python")
    hook_class = type(
        "CheckpointCallback", (), {"__init__": lambda self, config=None: setattr(self, "config", config)}
    )
    stand_in(monkeypatch, "verl.trainer.ppo.checkpoint_callback", CheckpointCallback=hook_class)
    stand_in(monkeypatch, "megatron.bridge.training.callbacks", Callback=object)
    restored = []

    def saved(folder: Path) -> Path:
        shutil.copytree(tuned, folder)
        restored.append(folder / "qk_restored")
        return folder

    names: dict[str, Any] = {}
    exec(verl, names)
    model = SimpleNamespace(path=str(base))
    config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(model=model))
    hook = names["Restore"](config=config)
    step = saved(tmp_path / "global_step_1" / "actor" / "huggingface").parents[1]
    hook.on_save(trainer=None, global_step=1, checkpoint_dir=str(step), async_save=True)
    assert not restored[0].exists()
    hook.on_save(trainer=None, global_step=1, checkpoint_dir=str(step), async_save=False)

    exec(miles, names)
    names["restore"](SimpleNamespace(hf_checkpoint=str(base)), 1, str(tmp_path), None)
    names["restore"](SimpleNamespace(hf_checkpoint=str(base)), 1, str(tmp_path), str(saved(tmp_path / "hf-1")))

    exec(megatron, names)
    bridge = SimpleNamespace(save_hf_pretrained=lambda model, folder: saved(Path(folder)))
    state = SimpleNamespace(train_state=SimpleNamespace(step=7))
    names["Restore"](bridge, base, tmp_path / "out").on_checkpoint_save(SimpleNamespace(state=state, model=[]))
    assert restored[2] == tmp_path / "out" / "step-7" / "qk_restored"
    wanted = tmp_path / "wanted"
    restore_checkpoint(base, tuned, wanted)
    for folder in restored:
        assert (folder / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()


def test_the_pages_scripts_hand_the_guard_over(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def run_exp(args: Any, callbacks: list[QKGuardCallback]) -> None:
        made.extend(callbacks)

    def trainer(model: Any, args: Any, train_dataset: Any, callbacks: list[QKGuardCallback]) -> None:
        made.extend(callbacks)

    monkeypatch.setattr("trl.SFTTrainer", trainer)
    monkeypatch.setattr("transformers.Trainer", trainer)
    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    given = dict.fromkeys(("model", "args", "rows", "tokens", "settings"))
    for block in (*blocks("transformers and TRL", "python"), *blocks("LLaMA-Factory", "python")):
        exec(block, dict(given))
    assert [guard.config.restore_on for guard in made] == ["save", "end", "save"]
