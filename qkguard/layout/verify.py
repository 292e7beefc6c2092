"""Proof of a layout on the model's own code: other numbers in the rows, and what becomes of q, k and v."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qkguard.errors import UnknownLayoutError
from qkguard.layout import build
from qkguard.layout.discover import find_attention
from qkguard.layout.forward import attended
from qkguard.layout.materialise import Fill, inputs_like, materialised
from qkguard.layout.owners import by_owner, feeding, program
from qkguard.layout.replay import Operands, distinct_heads, operands
from qkguard.layout.spec import AttentionSpec, Block, ParamMap
from qkguard.layout.trace import Call

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What came of checking one layer's map, and with it that of all `layers` that run the same program on it.

    `partial` says why taking the rows back does not bring back queries and keys whole although the map is right;
    `problems` say where it is wrong.
    """

    module: str
    layers: tuple[int | None, ...]
    partial: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_layout(
    model_or_config: Any, specs: Sequence[AttentionSpec] | None = None, *, trust_remote_code: bool = False
) -> list[Verdict]:
    """Check a layout (by default the one that `find_attention` gives) on random weights, one module per program.

    Every comparison is bit for bit. Other numbers in the rows of one role move exactly what the role says, and already
    the first and the last row of a block do so, in their own head. With the mapped rows of a base and everything else
    of a tuned model, q and k are the base's and v is the tuned model's (with shared rows left tuned, v still is).

    Raises:
        UnknownLayoutError: the model does not run, or an entry's module does not attend.
    """
    specs = find_attention(model_or_config, trust_remote_code=trust_remote_code) if specs is None else specs
    source = build.resolve(model_or_config, trust_remote_code=trust_remote_code)
    if source.model_class is None:
        raise UnknownLayoutError(
            f"the code of {source.config.model_type} is not imported, so its layout, which comes from a fixed rule, "
            "cannot be proven here"
        )
    left = {build.bare_name(spec.module): spec for spec in specs}
    checked: dict[Any, tuple[AttentionSpec, list[int | None], tuple[list[str], list[str]]]] = {}
    with build.undisturbed():
        model = build.build_meta(source)
        with attended(model) as (trace, seen):
            for call, found in by_owner(trace, seen):
                spec = left.pop(call.name, None)
                if spec is None:
                    continue
                reached = feeding(trace, model, call, found)
                maps = {build.bare_name(param.name): param for param in spec.params}
                of_layer = {local: maps[full] for local, full in reached.items() if full in maps}
                key = (program(trace, call, found), tuple((local, m.dim, m.blocks) for local, m in of_layer.items()))
                if key not in checked:
                    direct = all(one.scores is None for one in found)
                    missing = sorted(maps.keys() - reached.values())
                    outcome = (
                        ([], [f"{call.name}: {missing[0]} does not lead to its queries, keys or values"])
                        if missing
                        else _check(call, of_layer, set(reached), len(found) if direct else None)
                    )
                    checked[key] = spec, [], outcome
                checked[key][1].append(spec.layer)
    if left:
        raise UnknownLayoutError(
            f"{next(iter(left))} is in the layout but does not attend in {type(model).__name__} "
            f"({len(left)} of {len(specs)} entries); correct the spec file"
        )
    return [
        Verdict(spec.module, tuple(layers), tuple(partial), tuple(problems))
        for spec, layers, (partial, problems) in checked.values()
    ]


def _check(
    call: Call, maps: dict[str, ParamMap], reached: set[str], enough: int | None
) -> tuple[list[str], list[str]]:
    """(why partial, problems) of one layer. `maps` and `reached` go by the parameters' names in the module."""
    with materialised(call.module, reached, Fill()) as params:
        misfit = [name for name, m in maps.items() if tuple(params[name].shape) != m.shape]
        if misfit:
            return [], [f"{call.name}: {misfit[0]} has shape {tuple(params[misfit[0]].shape)} in the model"]
        base = {name: param.detach().clone() for name, param in params.items()}
        fill = Fill(5)
        tuned = {name: fill.parameter(param).data for name, param in params.items()}

        def attend(
            values: Values, rows: Values, keep: Callable[[Block], bool], maps: dict[str, ParamMap] = maps
        ) -> list[Operands]:
            """q, k and v of every attention with `values`, but with the chosen mapped rows of `rows`."""
            for name, param in params.items():
                param.data.copy_(values[name])
                if name in maps and (chosen := maps[name].only(keep)).blocks:
                    chosen.put(param.data, chosen.take(rows[name]))
            args, kwargs = inputs_like((call.args, call.kwargs), Fill(1))  # afresh: caches are written to
            return operands(call.module, args, kwargs, enough=enough)

        first, last = (attend(values, values, lambda _: False) for values in (base, tuned))
        problems: list[str] = []
        partial: list[str] = []
        roles = {block.role for m in maps.values() for block in m.blocks}
        for role in sorted(roles):
            moved = _moved(first, attend(base, tuned, lambda block: block.role == role))  # noqa: B023
            if moved != role:
                problems.append(f"{call.name}: the rows said to feed {role} move {moved or 'nothing'}")
        for name, mapped in maps.items():  # no row too many: the first and the last of every block count
            for edge, only in (("first", _first_row), ("last", _last_row)):
                edges = replace(mapped, blocks=tuple(only(block) for block in mapped.blocks))
                idle = _idle(edges, first, attend(base, tuned, lambda _: True, {name: edges}))
                problems += [f"{call.name}: {name}, block {b.start}:{b.stop}: its {edge} row is idle" for b in idle]
        restored = attend(tuned, base, lambda _: True)
        if lost := _moved(first, restored).replace("v", ""):
            nudged = {name: value + 1e-5 * (tuned[name] - value) for name, value in base.items()}
            smooth = _moved(first, attend(nudged, base, lambda _: True)).replace("v", "")
            where = problems if smooth else partial
            where.append(
                f"{call.name}: {' and '.join(lost)} also depend on {'rows' if smooth else 'choices'} not mapped"
            )
        pure = attend(tuned, base, lambda block: not block.shared)
        if "v" in _moved(last, pure):
            problems.append(f"{call.name}: taking back rows that feed no values moves the values")
        if any("v" in role for role in roles):
            partial.append("some rows feed keys and values alike")
    return partial, problems


def _first_row(block: Block) -> Block:
    return replace(block, stop=block.start + 1)


def _last_row(block: Block) -> Block:
    return replace(block, start=block.stop - 1)


def _idle(param: ParamMap, before: list[Operands], after: list[Operands]) -> list[Block]:
    """Blocks that moved nothing of theirs: their own head of the queries or keys where they have one."""
    idle = []
    for block in param.blocks:
        still = True
        for old, new in zip(before, after, strict=True):
            for role in block.role:
                a, b = old["qkv".index(role)], new["qkv".index(role)]
                if block.head is not None:
                    heads = range(a.shape[1]) if role == "q" else distinct_heads(a)
                    its = [i for i, head in enumerate(heads) if head == block.head]
                    a, b = a[:, its], b[:, its]
                still &= torch.equal(a, b)
        if still:
            idle.append(block)
    return idle


def _moved(before: list[Operands], after: list[Operands]) -> str:
    """The letters of what is not bit for bit the same in every attention."""
    pairs = [(role, a, b) for x, y in zip(before, after, strict=True) for role, a, b in zip("qkv", x, y, strict=True)]
    return "".join(role for role in "qkv" if any(not torch.equal(a, b) for r, a, b in pairs if r == role))
