"""From a recipe and a command line to typed settings; a key that nothing reads is refused."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import ModelConfig, SFTConfig, TrlParser

from qkguard.errors import QKGuardError
from qkguard.sft.data import DataArguments
from qkguard.training.config import QKGuardConfig

SECTION = "qkguard"  # the recipe's section for the guard's settings, and their prefix on the command line
REQUIRED = {
    "model_name_or_path": "the model to train: a folder or a hub id",
    "output_dir": "where the run's files go",
}


@dataclass
class Settings:
    """What one training is made from.

    Attributes:
        data: the rows.
        training: TRL's SFTConfig.
        model: TRL's ModelConfig: checkpoint, dtype, adapters.
        guard: the guard's settings.
    """

    data: DataArguments
    training: SFTConfig
    model: ModelConfig
    guard: QKGuardConfig

    @property
    def model_name(self) -> str:
        return str(self.model.model_name_or_path)

    @property
    def trusts_remote_code(self) -> bool:
        """Whether the checkpoint's own code may run; the key has moved between TRL's two classes."""
        return any(bool(getattr(owner, "trust_remote_code", False)) for owner in (self.training, self.model))

    @property
    def output_dir(self) -> Path:
        return Path(str(self.training.output_dir))


def _guard_arguments() -> type:
    """QKGuardConfig under names of its own (SFTConfig has an `output_dir` too): `--qkguard.method`."""
    hints = get_type_hints(QKGuardConfig)
    renamed: list[Any] = []
    for f in fields(QKGuardConfig):
        default = (
            {"default": f.default} if f.default is not dataclasses.MISSING else {"default_factory": f.default_factory}
        )
        metadata = dict(f.metadata) | {"aliases": [f"--{SECTION}.{f.name}"]}
        hint = dict[Any, Any] | str | None if dict in _kinds(hints[f.name]) else hints[f.name]  # or JSON, when typed
        renamed.append((f"{SECTION}_{f.name}", hint, dataclasses.field(metadata=metadata, **default)))
    return dataclasses.make_dataclass("GuardArguments", renamed)


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("argument --"):  # "--a/--b: what is wrong" -> "a: what is wrong"
            names, _, problem = message.removeprefix("argument --").partition(":")
            message = f"{names.split('/')[0].replace(f'{SECTION}_', f'{SECTION}.', 1)}:{problem}"
        raise QKGuardError(message)


def parse(arguments: Sequence[str], recipe: Path | None = None) -> Settings:
    """Settings from a recipe (YAML) and `--key value` arguments, which win.

    A recipe is read as if its keys had been typed, so both accept the same values. Keys are the fields of
    DataArguments, SFTConfig and ModelConfig, in the section `qkguard` (`--qkguard.KEY`) those of QKGuardConfig;
    `env` sets environment variables that are not set yet.

    Raises:
        QKGuardError: an unknown key (with the nearest known one), a value of the wrong type, a missing key.
    """
    values = _read(recipe) if recipe else {}
    for name, value in (values.pop("env", None) or {}).items():
        os.environ.setdefault(str(name), str(value))
    guard_arguments = _guard_arguments()
    kinds: Any = (DataArguments, SFTConfig, ModelConfig, guard_arguments)
    parser = _Parser(kinds, allow_abbrev=False, add_help=False)
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    typed = _as_typed(parser, _flat(values), hints, f"{recipe}: ")
    try:
        parser.parse_known_args(typed)
    except QKGuardError as error:
        raise QKGuardError(f"{recipe}: {error}") from None
    given, unknown = parser.parse_known_args([*typed, *arguments])
    if unknown:
        option = next((u for u in unknown if u.startswith("--")), None)
        if option is None:
            raise QKGuardError(f"unexpected argument {unknown[0]!r}; settings are given as --key value")
        raise QKGuardError(_unknown(option[2:].split("=")[0], hints, dash="--"))
    for key, what in REQUIRED.items():
        if not getattr(given, key):
            raise QKGuardError(
                f"{key} is missing: {what}; give it in a recipe (--config FILE.yaml) or as --{key} VALUE"
            )
    try:
        parsed: Any = parser.parse_args_into_dataclasses(
            [*typed, *_defaults_of_this_machine(typed, arguments), *arguments], look_for_args_file=False
        )
        data, training, model, guard = parsed
        guard = QKGuardConfig(
            **{f.name: _mapping(getattr(guard, f"{SECTION}_{f.name}")) for f in fields(QKGuardConfig)}
        )
    except (ValueError, ImportError, TypeError) as error:
        raise QKGuardError(str(error)) from error
    settings = Settings(data, training, model, guard)
    _check_data(settings)
    return settings


def _mapping(value: Any) -> Any:
    """JSON objects typed on the command line, layer numbers as numbers; anything else as it is."""
    if isinstance(value, str) and value.startswith("{"):
        return {int(key) if key.isdigit() else key: item for key, item in json.loads(value).items()}
    return value


def _read(recipe: Path) -> dict[str, Any]:
    try:
        values = yaml.load(recipe.read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.YAMLError as error:
        raise QKGuardError(f"{recipe} is not valid YAML: {error}") from None
    except OSError as error:
        raise QKGuardError(
            f"{recipe} cannot be read ({error.strerror}); `qkguard recipes` lists the bundled ones"
        ) from None
    if not isinstance(values, dict):
        raise QKGuardError(f"{recipe} holds no settings; expected lines of `key: value`")
    return values


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not a silent choice of the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise QKGuardError(f"{twice!r} is given twice, the second time before line {node.end_mark.line + 1}")
        return super().construct_mapping(node, deep)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    section = values.pop(SECTION, None) or {}
    if not isinstance(section, dict):
        raise QKGuardError(f"{SECTION}: expected a section of settings, found {section!r}")
    return values | {f"{SECTION}_{key}": value for key, value in section.items()}


def _as_typed(parser: _Parser, values: dict[str, Any], hints: dict[str, Any], where: str) -> list[str]:
    """A recipe's values as command-line arguments; those that cannot be typed (mappings, null) become defaults."""
    typed: list[str] = []
    actions = {action.dest: action for action in parser._actions}
    for key, value in values.items():
        if key not in hints:
            raise QKGuardError(where + _unknown(str(key), hints))
        kinds = _kinds(hints[key])
        if value is None:
            if type(None) not in kinds:
                raise QKGuardError(f"{where}{_shown(key)} has no value; give one or leave the key out")
            parser.set_defaults(**{key: None})
        elif isinstance(value, dict) or (isinstance(value, list) and actions[key].nargs != "+"):
            if type(value) not in kinds:
                raise QKGuardError(f"{where}{_shown(key)}: expected one value, found {value!r}")
            parser.set_defaults(**{key: value})
        elif isinstance(value, list):
            typed += [f"--{key}", *map(str, value)]
        else:
            typed.append(f"--{key}={value}")
    return typed


def _kinds(hint: Any) -> set[type]:
    """The plain types a hint allows: `dict[str, int] | None` -> {dict, NoneType}."""
    members: Iterable[Any] = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {get_origin(member) or member for member in members}


def _unknown(key: str, hints: dict[str, Any], dash: str = "") -> str:
    shown = {_shown(name): name for name in hints}
    guard = {f.name for f in fields(QKGuardConfig)}
    if key.replace("-", "_") in guard:
        near: list[str] = [_shown(f"{SECTION}_{key.replace('-', '_')}")]
    else:
        near = difflib.get_close_matches(_shown(key).replace("-", "_"), shown, 1, 0.75)
    if not near:
        return f"unknown key {dash}{_shown(key)}; no known key is like it"
    hint = f"; in a recipe it goes into the section `{SECTION}:`" if near[0].startswith(f"{SECTION}.") else ""
    return f"unknown key {dash}{_shown(key)}; did you mean {dash}{near[0]}?{hint if not dash else ''}"


def _shown(key: str) -> str:
    return key.replace(f"{SECTION}_", f"{SECTION}.", 1) if key.startswith(f"{SECTION}_") else key


def _defaults_of_this_machine(typed: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """`--use_cpu true` where there is nothing else: distributed CPU processes would not find each other without."""
    import torch

    given = any(a.startswith(("--use_cpu", "--use-cpu")) for a in (*typed, *arguments))
    return [] if given or torch.accelerator.is_available() else ["--use_cpu=true"]


def _check_data(settings: Settings) -> None:
    settings.data.sources()
    if settings.training.eval_strategy != "no" and settings.data.dataset_test_split is None:
        raise QKGuardError(
            f"eval_strategy={settings.training.eval_strategy} needs rows to evaluate on; name their split with "
            "dataset_test_split, or set eval_strategy: no"
        )
