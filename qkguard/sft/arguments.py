"""From a recipe and a command line to typed settings; a key that nothing reads is refused."""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import ModelConfig, SFTConfig, TrlParser

from qkguard.errors import QKGuardError, current_names
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


def parse(arguments: Sequence[str], recipe: Path | None = None) -> Settings:
    """Settings from a recipe (YAML) and `--key value` arguments, which win.

    Keys are the fields of DataArguments, SFTConfig and ModelConfig, and in the section `qkguard` (`--qkguard.KEY`)
    those of QKGuardConfig; `env` sets environment variables that are not set yet.

    Raises:
        QKGuardError: an unknown key (with the nearest known one), a value of the wrong type, a missing key.
    """
    values = _read(recipe) if recipe else {}
    for name, value in (values.pop("env", None) or {}).items():
        os.environ.setdefault(str(name), str(value))
    guard, others = _guard_settings(values.pop(SECTION, None) or {}, arguments, recipe)
    data, training, model = _trl_settings(values, others, recipe)
    settings = Settings(data, training, model, guard)
    settings.data.sources()
    if training.eval_strategy != "no" and data.dataset_test_split is None:
        raise QKGuardError(
            f"With eval_strategy={training.eval_strategy} there must be rows to evaluate on; name their split with "
            "dataset_test_split, or set eval_strategy: no"
        )
    return settings


# -- the file -----------------------------------------------------------------------------------------------------


class _StrictYaml(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not a silent choice of the last, and 1e-5 is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise QKGuardError(f"{key!r} is given twice, the second time in line {key_node.start_mark.line + 1}")
            keys.append(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in it (1.0e-5); YAML 1.2 and everyone who types a learning rate do not
_StrictYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def _read(recipe: Path) -> dict[str, Any]:
    try:
        values = yaml.load(recipe.read_text(encoding="utf-8"), _StrictYaml)
    except QKGuardError as error:
        raise QKGuardError(f"{recipe}: {error}") from None
    except yaml.YAMLError as error:
        raise QKGuardError(f"{recipe} is not valid YAML: {error}") from None
    except OSError as error:
        raise QKGuardError(
            f"{recipe} cannot be read ({error.strerror}); `qkguard recipes` lists the bundled ones"
        ) from None
    if not isinstance(values, dict):
        raise QKGuardError(f"{recipe} holds no settings; expected lines of `key: value`")
    return values


# -- the guard's settings: checked by QKGuardConfig itself ----------------------------------------------------------


def _guard_settings(section: Any, arguments: Sequence[str], recipe: Path | None) -> tuple[QKGuardConfig, list[str]]:
    """The guard's settings from the recipe's section and the command line, and the other arguments."""
    if not isinstance(section, dict):
        raise QKGuardError(f"{recipe}: {SECTION}: expected a section of settings, found {section!r}")
    hints = get_type_hints(QKGuardConfig)
    typed: dict[str, Any] = {}
    others: list[str] = []
    for words in _options(arguments):
        option, _, value = words[0].partition("=")
        if option.startswith(f"--{SECTION}."):
            key = option.removeprefix(f"--{SECTION}.").replace("-", "_")
            typed[key] = _value([value, *words[1:]] if "=" in words[0] else words[1:], hints.get(key))
        else:
            others += words
    section, typed = current_names(section), current_names(typed)
    for where, given in ((f"{recipe}: ", section), ("", typed)):
        for key in given.keys() - hints.keys():
            raise QKGuardError(where + _unknown(f"{SECTION}.{key}", {}, dash="" if where else "--"))
        for key in given.keys() & hints.keys():
            if list in _kinds(hints[key]) and isinstance(given[key], str | int | float):
                given[key] = [given[key]]  # `layers: 3` for `layers: [3]`
    try:
        QKGuardConfig(**section)
    except QKGuardError as error:
        raise QKGuardError(f"{recipe}: {SECTION}: {error}") from None
    return QKGuardConfig(**section | typed), others


def _options(arguments: Sequence[str]) -> list[list[str]]:
    """A command line cut before every option: [["--layers", "3", "7"], ["--strict"]]."""
    groups: list[list[str]] = []
    for word in arguments:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def _value(words: Sequence[str], hint: Any) -> Any:
    """What was typed as the value a recipe would have; text and paths as they are, though they look like numbers."""
    if not words:
        return True
    if _kinds(hint) <= {str, Path, type(None)}:
        return " ".join(words)
    try:
        values = [yaml.load(word, _StrictYaml) for word in words]
    except yaml.YAMLError:
        values = list(words)
    return values[0] if len(values) == 1 else values


# -- all other settings: TRL's parser -------------------------------------------------------------------------------


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("argument --"):  # "--a/--b: what is wrong" -> "a: what is wrong"
            names, _, problem = message.removeprefix("argument --").partition(":")
            message = f"{names.split('/')[0]}:{problem}"
        raise QKGuardError(message)


def _trl_settings(values: dict[str, Any], arguments: list[str], recipe: Path | None) -> Any:
    """(DataArguments, SFTConfig, ModelConfig).

    A recipe is read as if its keys had been typed, so both accept the same values. TRL's own `parse_args_and_config`
    (1.16) makes them the parser's defaults instead, which argparse holds against no choices and no number of values,
    and overwrites environment variables.
    """
    kinds: Any = (DataArguments, SFTConfig, ModelConfig)
    parser = _Parser(kinds, allow_abbrev=False, add_help=False)
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    try:
        typed = _as_typed(parser, values, hints)
        parser.parse_known_args(typed)
    except QKGuardError as error:
        raise QKGuardError(f"{recipe}: {error}") from None
    given, unknown = parser.parse_known_args([*typed, *arguments])
    for word in unknown:
        if word.startswith("--"):
            raise QKGuardError(_unknown(word[2:].split("=")[0], hints, dash="--"))
    if unknown:
        raise QKGuardError(f"Unexpected argument {unknown[0]!r}: settings are given as --key value.")
    for key, what in REQUIRED.items():
        if not getattr(given, key):
            raise QKGuardError(
                f"{key} is missing: {what}; give it in a recipe (--config FILE.yaml) or as --{key} VALUE"
            )
    try:
        return parser.parse_args_into_dataclasses(
            [*typed, *_defaults_of_this_machine([*typed, *arguments]), *arguments], look_for_args_file=False
        )
    except (ValueError, ImportError, TypeError) as error:
        raise QKGuardError(str(error)) from error


def _as_typed(parser: _Parser, values: dict[str, Any], hints: dict[str, Any]) -> list[str]:
    """A recipe's values as command-line arguments; those that cannot be typed (mappings, null) become defaults."""
    typed: list[str] = []
    take_several = {action.dest for action in parser._actions if action.nargs == "+"}  # argparse has no public way
    for key, value in values.items():
        if key not in hints:
            raise QKGuardError(_unknown(str(key), hints))
        kinds = _kinds(hints[key])
        if isinstance(value, list) and key in take_several:
            typed += [f"--{key}", *map(str, value)]
        elif value is not None and not isinstance(value, list | dict):
            typed.append(f"--{key}={value}")
        elif type(value) in kinds:
            parser.set_defaults(**{key: value})
        elif value is None:
            raise QKGuardError(f"{key} has no value; give one or leave the key out")
        else:
            raise QKGuardError(f"{key}: expected one value, found {value!r}")
    return typed


def _kinds(hint: Any) -> set[Any]:
    """The plain types a hint allows: `dict[str, int] | None` -> {dict, NoneType}."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {get_origin(member) or member for member in members}


def _unknown(key: str, hints: dict[str, Any], dash: str = "") -> str:
    """What to say of a key that nothing reads, with the nearest known one."""
    sectioned = [f"{SECTION}.{name}" for name in get_type_hints(QKGuardConfig)]
    plain = key.replace("-", "_")
    near = [f"{SECTION}.{plain}"] if f"{SECTION}.{plain}" in sectioned else []
    near = near or difflib.get_close_matches(plain, [*hints, *sectioned], 1, 0.75)
    if not near:
        return f"Unknown key {dash}{key}: no known key resembles it."
    in_section = near[0].startswith(f"{SECTION}.") and not key.startswith(f"{SECTION}.") and not dash
    hint = f" In a recipe it goes into the section `{SECTION}:`." if in_section else ""
    return f"Unknown key {dash}{key}: did you mean {dash}{near[0]}?{hint}"


def _defaults_of_this_machine(given: Sequence[str]) -> list[str]:
    """`--use_cpu true` where there is nothing else: distributed CPU processes would not find each other without."""
    import torch

    if any(word.startswith(("--use_cpu", "--use-cpu")) for word in given) or torch.accelerator.is_available():
        return []
    return ["--use_cpu=true"]
