"""Proof of a layout on the model's own code: other numbers in the rows, and what becomes of q, k and v.

Every comparison is bit for bit: the same code runs on the same inputs, so what does not depend on a row cannot change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.errors import UnknownLayoutError
from qkguard.layout.architecture import build_meta, find_architecture, plain_torch
from qkguard.layout.discover import find_attention
from qkguard.layout.gradients import distinct_heads
from qkguard.layout.layers import by_owner, feeding, program
from qkguard.layout.names import bare_name
from qkguard.layout.observe import observed
from qkguard.layout.replay import Operands, operands, stop_after
from qkguard.layout.spec import AttentionSpec, Block, ParamMap
from qkguard.layout.trace import Call
from qkguard.layout.weightless import Fill, materialised

NUDGE = 1e-5  # of the way from base to tuned: too little to turn a choice (top-k), enough to show in float32


@dataclass
class Proof:
    """What came of checking one layer's map, and with it that of all `layers` that run the same program on it.

    `partial` says why taking the rows back does not bring back queries and keys whole although the map is right;
    `problems` say where it is wrong.
    """

    module: str
    layers: list[int | None] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def prove_layout(
    model_or_config: Any, specs: Sequence[AttentionSpec] | None = None, *, trust_remote_code: bool = False
) -> list[Proof]:
    """Check a layout (by default the one that `find_attention` gives) on random weights, one module per program.

    Other numbers in the rows of one role move exactly what the role says, and already the first and the last row of a
    block do so, in their own head. With the mapped rows of a base and everything else of a tuned model, q and k are
    the base's and v is the tuned model's (with shared rows left tuned, v still is).

    Raises:
        UnknownLayoutError: the model does not run, or an entry's module does not attend.
    """
    specs = find_attention(model_or_config, trust_remote_code=trust_remote_code) if specs is None else specs
    architecture = find_architecture(model_or_config, trust_remote_code=trust_remote_code)
    if architecture.model_class is None:
        raise UnknownLayoutError(
            f"The code of {architecture.config.model_type} is not imported, so its layout, which comes from a fixed "
            "rule, cannot be proven here"
        )
    left = {bare_name(spec.module): spec for spec in specs}
    proofs: dict[Any, Proof] = {}
    with plain_torch():
        model = build_meta(architecture)
        with observed(model) as (trace, attentions):
            for call, own in by_owner(trace, attentions):
                spec = left.pop(call.name, None)
                if spec is None:
                    continue
                reached = feeding(trace, model, call, own)  # name in the module -> name in the model
                maps = {bare_name(param.name): param for param in spec.params}
                local = {name: maps[full] for name, full in reached.items() if full in maps}
                key = program(trace, call, own), tuple((name, m.dim, m.blocks) for name, m in local.items())
                if key not in proofs:
                    proofs[key] = Proof(spec.module)
                    missing = sorted(maps.keys() - reached.values())
                    if missing:
                        proofs[key].problems.append(
                            f"{call.name}: {missing[0]} does not lead to its queries, keys or values"
                        )
                    else:
                        _prove(proofs[key], call, local, set(reached), stop_after(own))
                proofs[key].layers.append(spec.layer)
    if left:
        raise UnknownLayoutError(
            f"{next(iter(left))} is in the layout but does not attend in {type(model).__name__} "
            f"({len(left)} of {len(specs)} entries); correct the spec file"
        )
    return list(proofs.values())


def _prove(proof: Proof, call: Call, maps: dict[str, ParamMap], names: set[str], enough: int | None) -> None:
    """Check one layer's maps, by the parameters' names in the module; `names` are all that feed q, k or v."""
    with materialised(call.module, names, Fill()) as params:
        for name, mapped in maps.items():
            if tuple(params[name].shape) != mapped.shape:
                proof.problems.append(f"{call.name}: {name} has shape {tuple(params[name].shape)} in the model")
                return
        module = _Module(call, params, enough)
        _check_roles(proof, module, maps)
        _check_edges(proof, module, maps)
        _check_restored(proof, module, maps)


class _Module:
    """A replayed module with two sets of numbers for its parameters, `base` and `tuned`."""

    def __init__(self, call: Call, params: dict[str, nn.Parameter], enough: int | None) -> None:
        self._call, self._params, self._enough = call, params, enough
        fill = Fill(5)
        self.base = {name: param.detach() for name, param in params.items()}
        self.tuned = {name: fill.parameter(param).data for name, param in params.items()}
        self.before, self.after = self.attend(self.base), self.attend(self.tuned)

    @property
    def name(self) -> str:
        return self._call.name

    def attend(
        self,
        values: Mapping[str, Tensor],
        rows: Mapping[str, Tensor] | None = None,
        maps: Mapping[str, ParamMap] | None = None,
    ) -> list[Operands]:
        """q, k and v of every attention with `values` as parameters, but with the mapped rows of `rows`."""
        for name, param in self._params.items():
            mixed = values[name]
            if rows is not None and maps is not None and name in maps and maps[name].blocks:
                mixed = mixed.clone()
                maps[name].put(mixed, maps[name].take(rows[name]))
            param.data = mixed
        return operands(self._call, self._enough)


def _check_roles(proof: Proof, module: _Module, maps: dict[str, ParamMap]) -> None:
    """The rows of one role move what the role says and nothing else."""
    for role in sorted(_roles(maps)):
        moved = _moved(module.before, module.attend(module.base, module.tuned, _with_role(maps, role)))
        if moved != role:
            proof.problems.append(f"{module.name}: the rows said to feed {role} move {moved or 'nothing'}")


def _check_edges(proof: Proof, module: _Module, maps: dict[str, ParamMap]) -> None:
    """No row too many: already the first and the last row of a block move their own head."""
    for name, mapped in maps.items():
        first = [replace(block, stop=block.start + 1) for block in mapped.blocks]
        last = [replace(block, start=block.stop - 1) for block in mapped.blocks]
        for edge, blocks in (("first", first), ("last", last)):
            rows = replace(mapped, blocks=tuple(blocks))
            after = module.attend(module.base, module.tuned, {name: rows})
            for block in rows.blocks:
                if not _moves_own(block, module.before, after):
                    proof.problems.append(
                        f"{module.name}: {name}, block {block.start}:{block.stop}: its {edge} row is idle"
                    )


def _check_restored(proof: Proof, module: _Module, maps: dict[str, ParamMap]) -> None:
    """No row too few: with the base's rows a tuned module has the base's q and k and, shared rows left, its own v."""
    base, tuned = module.base, module.tuned
    lost = _moved(module.before, module.attend(tuned, base, maps)).replace("v", "")
    if lost:
        # Rows that are missing show under the smallest change; a choice (a top-k of tokens) takes a large one.
        nudged = {name: value + NUDGE * (tuned[name] - value) for name, value in base.items()}
        by_rows = bool(_moved(module.before, module.attend(nudged, base, maps)).replace("v", ""))
        where, on = (proof.problems, "rows") if by_rows else (proof.partial, "choices")
        where.append(f"{module.name}: {' and '.join(lost)} also depend on {on} not mapped")
    pure = {name: mapped.pure for name, mapped in maps.items()}
    if "v" in _moved(module.after, module.attend(tuned, base, pure)):
        proof.problems.append(f"{module.name}: taking back rows that feed no values moves the values")
    if any("v" in role for role in _roles(maps)):
        proof.partial.append("some rows feed keys and values alike")


def _roles(maps: Mapping[str, ParamMap]) -> set[str]:
    return {block.role for mapped in maps.values() for block in mapped.blocks}


def _with_role(maps: Mapping[str, ParamMap], role: str) -> dict[str, ParamMap]:
    def has_role(block: Block) -> bool:
        return block.role == role

    return {name: mapped.only(has_role) for name, mapped in maps.items()}


def _moves_own(block: Block, before: list[Operands], after: list[Operands]) -> bool:
    """Whether a block moved something of its own: its head of the queries or keys, where it has one."""
    for old, new in zip(before, after, strict=True):
        for role in block.role:
            a, b = old["qkv".index(role)], new["qkv".index(role)]
            if block.head is not None:
                heads = list(range(a.shape[1])) if role == "q" else distinct_heads(a)
                own = [i for i, head in enumerate(heads) if head == block.head]
                a, b = a[:, own], b[:, own]
            if not torch.equal(a, b):
                return True
    return False


def _moved(before: list[Operands], after: list[Operands]) -> str:
    """The letters of what is not bit for bit the same in every attention."""
    moved = ""
    for place, role in enumerate("qkv"):
        pairs = zip(before, after, strict=True)
        if not all(torch.equal(old[place], new[place]) for old, new in pairs):
            moved += role
    return moved
