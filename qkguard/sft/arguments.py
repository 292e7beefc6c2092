"""From a recipe and a command line to typed settings; a key that nothing reads is refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from trl import ModelConfig, SFTConfig, TrlParser

from qkguard.errors import QKGuardError
from qkguard.sft.data import DataArguments
from qkguard.sft.keys import (
    REQUIRED,
    SECTION,
    check_required,
    guard_settings,
    kinds_of,
    plain_lists,
    read_recipe,
    unknown_key,
)
from qkguard.training.config import QKGuardConfig


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
    values = read_recipe(recipe) if recipe else {}
    for name, value in (values.pop("env", None) or {}).items():
        os.environ.setdefault(str(name), str(value))
    guard, others = guard_settings(values.pop(SECTION, None) or {}, arguments, recipe)
    data, training, model = _trl_settings(values, others, recipe)
    settings = Settings(data, training, model, guard)
    settings.data.sources()
    if training.eval_strategy != "no" and data.dataset_test_split is None:
        raise QKGuardError(
            f"With eval_strategy={training.eval_strategy} there must be rows to evaluate on; name their split with "
            "dataset_test_split, or set eval_strategy: no"
        )
    return settings


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
    arguments = plain_lists(arguments, _taking_several(parser))
    try:
        typed = _as_typed(parser, values, hints)
        parser.parse_known_args(typed)
    except QKGuardError as error:
        raise QKGuardError(f"{recipe}: {error}") from None
    given, unknown = parser.parse_known_args([*typed, *arguments])
    for word in unknown:
        if word.startswith("--"):
            raise QKGuardError(unknown_key(word[2:].split("=")[0], hints, dash="--"))
    if unknown:
        raise QKGuardError(f"Unexpected argument {unknown[0]!r}: settings are given as --key value.")
    check_required({key for key in REQUIRED if getattr(given, key)})
    try:
        return parser.parse_args_into_dataclasses(
            [*typed, *_defaults_of_this_machine([*typed, *arguments]), *arguments], look_for_args_file=False
        )
    except (ValueError, ImportError, TypeError) as error:
        raise QKGuardError(str(error)) from error


def _taking_several(parser: _Parser) -> set[str]:
    """The keys whose options take several values."""
    return {action.dest for action in parser._actions if action.nargs == "+"}  # argparse has no public way


def _as_typed(parser: _Parser, values: dict[str, Any], hints: dict[str, Any]) -> list[str]:
    """A recipe's values as command-line arguments; those that cannot be typed (mappings, null) become defaults."""
    typed: list[str] = []
    take_several = _taking_several(parser)
    for key, value in values.items():
        if key not in hints:
            raise QKGuardError(unknown_key(str(key), hints))
        kinds = kinds_of(hints[key])
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


def _defaults_of_this_machine(given: Sequence[str]) -> list[str]:
    """`--use_cpu true` where there is nothing else: distributed CPU processes would not find each other without."""
    import torch

    if any(word.startswith(("--use_cpu", "--use-cpu")) for word in given) or torch.accelerator.is_available():
        return []
    return ["--use_cpu=true"]
