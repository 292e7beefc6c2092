"""What a layout file may hold, as pydantic models; the format is explained in `spec_file`.

Imported when a file is read, because importing pydantic takes a while.
"""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from operator import attrgetter
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from qkguard.errors import QKGuardError
from qkguard.layout.spec import AttentionSpec, Block, ParamMap


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class BlockEntry(NamedTuple):
    """[first row, row after the last, what they feed, head]."""

    start: NonNegativeInt
    stop: NonNegativeInt
    role: Literal["q", "k", "qk", "qv", "kv", "qkv"]
    head: NonNegativeInt | None = None


class ParamEntry(_Strict):
    """One parameter of a layer."""

    name: str
    shape: Annotated[list[NonNegativeInt], Field(min_length=1)]
    blocks: Annotated[list[BlockEntry], Field(min_length=1)]
    dim: NonNegativeInt = 0
    kind: Literal["weight", "bias", "norm"] | None = None

    def param(self) -> ParamMap:
        """The parameter, with {layer} in its name where the file has it."""
        kind = self.kind or ("bias" if self.name.endswith("bias") else "weight")
        blocks = sorted((Block(*block) for block in self.blocks), key=attrgetter("start", "stop"))
        return ParamMap(self.name, tuple(self.shape), self.dim, kind, tuple(blocks))

    @model_validator(mode="after")
    def _blocks_fit(self) -> ParamEntry:
        if self.dim >= len(self.shape):
            raise ValueError(f"dim {self.dim} is not a dimension of shape {self.shape}")
        try:
            self.param()
        except QKGuardError as error:
            raise ValueError(error) from None
        return self


class LayerEntry(_Strict):
    """One kind of layer; the fields of `AttentionSpec`, but for the numbers of all layers of this kind."""

    layers: Annotated[list[NonNegativeInt | None], Field(min_length=1)] = [None]
    module: str
    kind: str
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    params: Annotated[list[ParamEntry], Field(min_length=1)]
    rotary: Literal["half", "interleaved", "none"] | None = None
    rotary_dim: NonNegativeInt = 0
    rotary_start: NonNegativeInt = 0
    shares_keys: bool = False
    notes: list[str] = []

    def specs(self) -> list[AttentionSpec]:
        """Every layer of this kind, with its own number in the place of {layer}."""
        values = self.model_dump(exclude={"layers", "params", "notes"})
        params = tuple(entry.param() for entry in self.params)
        template = AttentionSpec(layer=None, params=params, notes=tuple(self.notes), **values)
        return [template if layer is None else _numbered(template, layer) for layer in self.layers]


class LayoutFile(_Strict):
    """A whole file."""

    version: Literal[1]
    attention: Annotated[list[LayerEntry], Field(min_length=1)]


def read_layout(data: Any, where: str) -> list[AttentionSpec]:
    """The layout in a file's values, in the order of the layers; `where` names the file in errors.

    Raises:
        QKGuardError: the first thing that is wrong with it: the place, what was expected, what was found.
    """
    try:
        entries = LayoutFile.model_validate(data).attention
    except ValidationError as error:
        raise QKGuardError(f"{where}: {_first_slip(error)}") from None
    return sorted((spec for entry in entries for spec in entry.specs()), key=_layer_order)


def _numbered(template: AttentionSpec, layer: int) -> AttentionSpec:
    number = str(layer)
    params = tuple(replace(param, name=param.name.replace("{layer}", number)) for param in template.params)
    return replace(template, layer=layer, module=template.module.replace("{layer}", number), params=params)


def _layer_order(spec: AttentionSpec) -> tuple[bool, int]:
    return spec.layer is None, spec.layer or 0


def _first_slip(error: ValidationError) -> str:
    """Of several slips an unknown key, as a missing one may be that, misspelt."""
    slips = error.errors(include_url=False)
    slip = next((slip for slip in slips if slip["type"] == "extra_forbidden"), slips[0])
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in slip["loc"]).removeprefix(".")
    expected = (
        slip["msg"].replace("Input should be ", "expected ").replace("expected greater", "expected a number greater")
    )
    match slip["type"]:
        case "extra_forbidden":
            known = [*LayoutFile.model_fields, *LayerEntry.model_fields, *ParamEntry.model_fields]
            near = get_close_matches(str(slip["loc"][-1]), known, 1)
            return f"{place}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
        case "missing":
            return f"{place} is missing"
        case "value_error":
            return f"{place}: {slip['ctx']['error']}"
        case "model_type":
            expected = "expected keys with values"
        case "too_short":
            expected = "expected at least one entry"
        case "too_long" | "named_tuple_type":
            expected = f"expected {BlockEntry.__doc__}".removesuffix(".")
    return f"{place or 'the file'}: {expected}, found {repr(slip['input'])[:80]}"
