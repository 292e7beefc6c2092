"""Dataclasses that check themselves (pydantic's, strict), and what is wrong with a value in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qkguard.errors import QKGuardError

STRICT = ConfigDict(
    strict=True,  # pydantic's lax mode would take strict="no" for False and probe_samples=2.0 for 2
    extra="forbid",
    use_attribute_docstrings=True,  # the help of a field stands under it
    allow_inf_nan=False,
)
_WORDS = {"integer": "a whole number", "number": "a number", "boolean": "True or False"}
_RANGES = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def helps(kind: Any) -> dict[str, str]:
    """Field -> help, on one line, of a checked dataclass and those it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for name, field in getattr(base, "__pydantic_fields__", {}).items():
            found[name] = " ".join((field.description or found.get(name, "")).split())
    return found


def refusal(kind: Any, error: ValidationError, given: Mapping[str, Any]) -> QKGuardError:
    """The first thing that is wrong with the arguments `given` to a checked dataclass, in one sentence."""
    found = error.errors(include_url=False)[0]
    name, known = str(found["loc"][0]), list(kind.__pydantic_fields__)
    if name not in given:
        return QKGuardError(f"{kind.__name__} takes keyword arguments only; found {found['input']!r}.")
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.6)
        hint = f"Did you mean {near[0]}?" if near else f"Known settings: {', '.join(known)}."
        return QKGuardError(f"Unknown setting {name}={given[name]!r}. {hint}")
    value = str(given[name]) if isinstance(given[name], Path) else given[name]
    if found["type"] == "value_error":
        return QKGuardError(f"Invalid {name}={value!r}: {found['ctx']['error']}.")
    # JSON Schema says in one place what types and ranges a field takes
    expected = _expected(TypeAdapter(kind).json_schema()["properties"][name])
    return QKGuardError(f"Invalid {name}={value!r}: expected {expected}.")


def _expected(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words: "a whole number >= 1"."""
    if "anyOf" in schema:
        options = [option for option in schema["anyOf"] if option != {"type": "null"}]
        return _any_of([_expected(option) for option in options]) + ", or None" * (options != schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return _any_of([f'"{value}"' for value in schema.get("enum", [schema.get("const")])])
    match schema["type"]:
        case "array":
            items = _expected(schema["items"]).removeprefix("a ").replace("number", "numbers")
            return f"a {'non-empty ' if 'minItems' in schema else ''}list of {items}"
        case "object":
            return "a mapping of layers to numbers, such as {3: 0.5}"
        case "string":
            return "a path" if schema.get("format") == "path" else "text"
    limits = [f"{sign} {schema[key]:g}" for key, sign in _RANGES.items() if key in schema]
    return f"{_WORDS[schema['type']]} {' and '.join(limits)}".rstrip()


def _any_of(options: list[str]) -> str:
    *first, last = options
    return f"{', '.join(first)} or {last}" if first else last
