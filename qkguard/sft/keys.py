"""What is typed and written for a training, checked as far as that goes before TRL and torch are imported.

The guard's settings are checked whole, by QKGuardConfig; of all others the names, against what TRL's source takes.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from qkguard.errors import QKGuardError, current_names
from qkguard.sft.data import DataArguments
from qkguard.sft.trl_keys import trl_keys
from qkguard.training.config import QKGuardConfig

SECTION = "qkguard"  # the recipe's section for the guard's settings, and their prefix on the command line
REQUIRED = {
    "model_name_or_path": "the model to train: a folder or a hub id",
    "output_dir": "where the run's files go",
}


def known_keys() -> set[str] | None:
    """What a recipe may hold beside the guard's section; None where only TRL's parser can tell."""
    found = trl_keys()
    return None if found is None else {*get_type_hints(DataArguments), *found}


def check_settings(arguments: Sequence[str], recipe: Path | None) -> None:
    """Refuse what can be refused without TRL.

    Raises:
        QKGuardError: a recipe that is none, an unknown key, a wrong setting of the guard's, a missing key.
    """
    values = read_recipe(recipe) if recipe else {}
    values.pop("env", None)
    _, others = guard_settings(values.pop(SECTION, None) or {}, arguments, recipe)
    known = known_keys()
    groups = split_options(others)
    if known is not None:
        for key in values:
            if key not in known:
                raise QKGuardError(f"{recipe}: {unknown_key(str(key), known)}")
        for words in groups:
            option = words[0].partition("=")[0]
            key = option.removeprefix("--").replace("-", "_")
            if option.startswith("--") and not known & {key, key.removeprefix("no_")}:  # --no_bf16; TRL checks of what
                raise QKGuardError(unknown_key(option[2:], known, dash="--"))
    typed = {words[0].partition("=")[0].removeprefix("--").replace("-", "_") for words in groups}
    check_required({key for key, value in values.items() if value} | typed)


def check_required(given: set[str]) -> None:
    """Refuse settings without what no training can do without."""
    for key, what in REQUIRED.items():
        if key not in given:
            raise QKGuardError(
                f"{key} is missing: {what}; give it in a recipe (--config FILE.yaml) or as --{key} VALUE"
            )


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


def read_recipe(recipe: Path) -> dict[str, Any]:
    """The values of a recipe.

    Raises:
        QKGuardError: not readable, not YAML, no settings, or a key given twice.
    """
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


def guard_settings(section: Any, arguments: Sequence[str], recipe: Path | None) -> tuple[QKGuardConfig, list[str]]:
    """The guard's settings from the recipe's section and the command line, and the other arguments."""
    if not isinstance(section, dict):
        raise QKGuardError(f"{recipe}: {SECTION}: expected a section of settings, found {section!r}")
    hints = get_type_hints(QKGuardConfig)
    typed: dict[str, Any] = {}
    others: list[str] = []
    for words in split_options(arguments):
        option, _, value = words[0].partition("=")
        if option.startswith(f"--{SECTION}."):
            key = option.removeprefix(f"--{SECTION}.").replace("-", "_")
            typed[key] = _value([value, *words[1:]] if "=" in words[0] else words[1:], hints.get(key))
        else:
            others += words
    section, typed = current_names(section), current_names(typed)
    for where, given in ((f"{recipe}: ", section), ("", typed)):
        for key in given.keys() - hints.keys():
            raise QKGuardError(where + unknown_key(f"{SECTION}.{key}", (), dash="" if where else "--"))
        for key in given.keys() & hints.keys():
            is_word = given[key] in words_of(hints[key])
            if list in kinds_of(hints[key]) and isinstance(given[key], str | int | float) and not is_word:
                given[key] = [given[key]]  # `layers: 3` for `layers: [3]`
    try:
        QKGuardConfig(**section)
    except QKGuardError as error:
        raise QKGuardError(f"{recipe}: {SECTION}: {error}") from None
    return QKGuardConfig(**section | typed), others


def split_options(arguments: Sequence[str]) -> list[list[str]]:
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
    if kinds_of(hint) <= {str, Path, type(None)}:
        return " ".join(words)
    try:
        if words[0].startswith(("[", "{")):  # as YAML has it, in one word or several: [256, 512]
            return yaml.load(" ".join(words), _StrictYaml)
        values = [yaml.load(word, _StrictYaml) for word in words]
    except yaml.YAMLError:
        values = list(words)
    return values[0] if len(values) == 1 else values


def plain_lists(arguments: Sequence[str], several: set[str]) -> list[str]:
    """Arguments in which lists as YAML has them, `--key [a, b]`, are words, for options that take several."""
    out: list[str] = []
    for option, *words in split_options(arguments):
        name, equals, value = option.partition("=")
        if equals:
            words = [value, *words]
        if name.lstrip("-").replace("-", "_") in several and words and words[0].startswith("["):
            found = _value(words, list)
            words = list(map(str, found)) if isinstance(found, list) else words
            out += [name, *words]
        else:
            out += [option, *(words[1:] if equals else words)]
    return out


def kinds_of(hint: Any) -> set[Any]:
    """The plain types a hint allows: `dict[str, int] | None` -> {dict, NoneType}."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {get_origin(member) or member for member in members}


def words_of(hint: Any) -> list[Any]:
    """The values that a hint allows by name: `list[int] | Literal["all"]` -> ["all"]."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [word for member in members if get_origin(member) is Literal for word in get_args(member)]


def unknown_key(key: str, known: Iterable[str], dash: str = "") -> str:
    """What to say of a key that nothing reads, with the nearest known one."""
    sectioned = [f"{SECTION}.{name}" for name in get_type_hints(QKGuardConfig)]
    plain = key.replace("-", "_")
    near = [f"{SECTION}.{plain}"] if f"{SECTION}.{plain}" in sectioned else []
    near = near or difflib.get_close_matches(plain, [*known, *sectioned], 1, 0.75)
    if not near:
        return f"Unknown key {dash}{key}: no known key resembles it."
    in_section = near[0].startswith(f"{SECTION}.") and not key.startswith(f"{SECTION}.") and not dash
    hint = f" In a recipe it goes into the section `{SECTION}:`." if in_section else ""
    return f"Unknown key {dash}{key}: did you mean {dash}{near[0]}?{hint}"
