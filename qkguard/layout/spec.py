"""Which rows of which parameters make queries and keys: the one description everything downstream reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkguard.arrays import Array, along, library
from qkguard.errors import QKGuardError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, order=True)
class Block:
    """Rows `start:stop` (columns, where `ParamMap.dim` is 1) of one parameter and what they feed.

    `role` is the letters of everything the rows feed, in the order "qkv": "q" and "k" can be restored; a role with
    a "v" in it is *shared* (MLA's latent): restoring it would also change the values. `head` is the query
    head for "q", the key-value head for "k", None where the rows serve several heads.
    """

    start: int
    stop: int
    role: str
    head: int | None = None

    @property
    def shared(self) -> bool:
        return "v" in self.role


class RoleSlice(NamedTuple):
    """Elements of one role in a flat shard: `shard[flat]` are `piece[compact]` of the shard's compact piece."""

    role: str
    flat: slice | Tensor
    compact: slice | Tensor


@dataclass(frozen=True)
class ParamMap:
    """The query and key rows of one parameter.

    `name` is the name in `model.named_parameters()`, `shape` the full (unsharded) shape, `dim` the dimension that
    `blocks` index: 0 for `nn.Linear.weight` and biases, 1 for GPT-2's transposed Conv1D. Blocks are sorted, do not
    overlap and never cover rows that feed nothing but values, gates or other things.

    The *compact* tensor of a parameter holds only the selected rows, in order: shape `compact_shape`.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    kind: str  # "weight", "bias" or "norm"
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        previous = 0
        for block in self.blocks:
            if not previous <= block.start < block.stop <= self.shape[self.dim]:
                raise QKGuardError(
                    f"{self.name}: block {block.start}:{block.stop} overlaps its neighbour or leaves dimension "
                    f"{self.dim} of shape {self.shape}; blocks must be sorted and disjoint"
                )
            previous = block.stop

    def only(self, keep: Callable[[Block], bool]) -> ParamMap:
        """The same parameter with the blocks that `keep` accepts."""
        return replace(self, blocks=tuple(b for b in self.blocks if keep(b)))

    @property
    def pure(self) -> ParamMap:
        """The same parameter without the rows that feed values too."""
        return replace(self, blocks=tuple(b for b in self.blocks if not b.shared))

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Half-open ranges along `dim`, neighbouring blocks joined."""
        return join_ranges((b.start, b.stop) for b in self.blocks)

    @property
    def whole(self) -> bool:
        return self.ranges == ((0, self.shape[self.dim]),)

    @property
    def compact_shape(self) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.dim] = sum(b.stop - b.start for b in self.blocks)
        return tuple(shape)

    @property
    def numel(self) -> int:
        """Number of selected elements."""
        return prod(self.compact_shape)

    @property
    def full_numel(self) -> int:
        return prod(self.shape)

    def take(self, full: Array) -> Array:
        """Full tensor -> compact tensor (a view where the selection is one range)."""
        self._check(full)
        parts = [along(full, self.dim, lo, hi) for lo, hi in self.ranges]
        return parts[0] if len(parts) == 1 else library(full).concat(parts, self.dim)

    def put(self, full: Tensor, compact: Tensor) -> None:
        """Write a compact tensor into the selected rows of a full one, in place."""
        self._check(full)
        offset = 0
        for lo, hi in self.ranges:
            full.narrow(self.dim, lo, hi - lo).copy_(compact.narrow(self.dim, offset, hi - lo))
            offset += hi - lo

    def compact_blocks(self) -> list[tuple[Block, int, int]]:
        """Every block with its half-open range along `dim` of the compact tensor."""
        out, offset = [], 0
        for block in self.blocks:
            size = block.stop - block.start
            out.append((block, offset, offset + size))
            offset += size
        return out

    def role_slices(self, start: int, stop: int) -> list[RoleSlice]:
        """The selected elements within `start:stop` of the flattened parameter, role by role.

        Taken in order, their compact positions are exactly `compact_offset(start):compact_offset(stop)`: a flat shard
        of the parameter holds one contiguous piece of the flattened compact tensor.
        """
        if prod(self.shape[: self.dim]) > 1:
            return self._role_positions(start, stop)
        inner = prod(self.shape[self.dim + 1 :])
        origin = self.compact_offset(start)
        found: list[tuple[str, int, int, int]] = []  # role, first and last flat position, what leads to compact ones
        for block, first, _ in self.compact_blocks():
            lo, hi = max(block.start * inner, start), min(block.stop * inner, stop)
            if lo >= hi:
                continue
            if found and found[-1][0] == block.role and found[-1][2] == lo:  # heads that lie side by side
                lo = found.pop()[1]
            found.append((block.role, lo, hi, (first - block.start) * inner - origin))
        return [
            RoleSlice(role, slice(lo - start, hi - start), slice(lo + shift, hi + shift))
            for role, lo, hi, shift in found
        ]

    def _role_positions(self, start: int, stop: int) -> list[RoleSlice]:
        """`role_slices` of a transposed Conv1D, by positions: its rows are columns, one short run on every line."""
        import torch  # the shards of a live model are torch's

        inner = prod(self.shape[self.dim + 1 :])
        roles = list(dict.fromkeys(block.role for block in self.blocks))
        role_at = torch.full((self.shape[self.dim],), -1)
        for block in self.blocks:
            role_at[block.start : block.stop] = roles.index(block.role)
        role = role_at[torch.arange(start, stop) // inner % self.shape[self.dim]]
        position = (role >= 0).cumsum(0) - 1
        out = []
        for number, name in enumerate(roles):
            flat = (role == number).nonzero()[:, 0]
            if len(flat):
                out.append(RoleSlice(name, flat, position[flat]))
        return out

    def flat_ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """`role_slices` without roles, as half-open ranges from `start` on, in the order of the compact tensor."""
        inner = prod(self.shape[self.dim + 1 :])
        period = self.shape[self.dim] * inner  # one line of a transposed Conv1D, else the whole parameter
        out = []
        for line in range(start // period, -(-stop // period)):
            for lo, hi in self.ranges:
                first, last = max(line * period + lo * inner, start), min(line * period + hi * inner, stop)
                if first < last:
                    out.append((first - start, last - start))
        return out

    def take_flat(self, flat: Tensor, start: int) -> Tensor:
        """Elements of a flat shard that begins at `start` of the parameter -> its 1-D piece of the compact tensor."""
        if self.whole:
            return flat
        stop = start + flat.numel()
        piece = flat.new_empty(self.compact_offset(stop) - self.compact_offset(start))
        for part in self.role_slices(start, stop):
            piece[part.compact] = flat[part.flat]
        return piece

    def compact_offset(self, position: int) -> int:
        """How many selected elements lie before flat element `position` of the full parameter."""
        inner = prod(self.shape[self.dim + 1 :])
        lines, rest = divmod(position, self.shape[self.dim] * inner)
        selected = sum(hi - lo for lo, hi in self.ranges) * inner
        before = sum(max(0, min(rest, hi * inner) - lo * inner) for lo, hi in self.ranges)
        return lines * selected + before

    def _check(self, full: Array) -> None:
        if tuple(full.shape) != self.shape:
            raise QKGuardError(
                f"{self.name}: expected shape {self.shape}, found {tuple(full.shape)}; "
                "the layout belongs to another model"
            )


@dataclass(frozen=True)
class AttentionSpec:
    """One softmax-attention layer: where its queries and keys come from, and their geometry.

    `layer` counts decoder layers of any kind from 0 (None where the module is outside the layer list); `module` is
    the attention module's name; `kind` follows `config.layer_types` ("full_attention", "sliding_attention", ...).
    `rotary` is "half", "interleaved", "none" (NoPE, or positions added elsewhere) or None where unknown;
    `rotary_dim` is the number of rotated channels per head, `rotary_start` the first of them (as rows of the head).
    Under grouped-query attention query head h reads key head `h // (num_heads // num_kv_heads)`; `shares_keys` says
    that keys of the model may serve more layers than the one that makes them.
    """

    layer: int | None
    module: str
    kind: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    params: tuple[ParamMap, ...]
    rotary: str | None = None
    rotary_dim: int = 0
    rotary_start: int = 0
    shares_keys: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def sliding(self) -> bool:
        return "sliding" in self.kind or "chunked" in self.kind


def specs_to_json(specs: Iterable[AttentionSpec]) -> list[dict[str, Any]]:
    """A layout as JSON values, for `specs_from_json`; what people write and read is `spec_file`."""
    return [asdict(spec) for spec in specs]


def specs_from_json(values: Iterable[dict[str, Any]]) -> list[AttentionSpec]:
    """The layout again, every field as it was."""
    specs = []
    for value in values:
        params = []
        for param in value["params"]:
            blocks = tuple(Block(**block) for block in param["blocks"])
            params.append(ParamMap(**param | {"shape": tuple(param["shape"]), "blocks": blocks}))
        specs.append(AttentionSpec(**value | {"params": tuple(params), "notes": tuple(value["notes"])}))
    return specs


def join_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted half-open ranges with overlapping and touching ones joined."""
    out: list[tuple[int, int]] = []
    for lo, hi in sorted(ranges):
        if out and lo <= out[-1][1]:
            out[-1] = (out[-1][0], max(hi, out[-1][1]))
        else:
            out.append((lo, hi))
    return tuple(out)


def true_ranges(flags: Array) -> list[tuple[int, int]]:
    """Half-open ranges of the True values of a 1-D array or CPU tensor."""
    steps = np.diff(np.asarray(flags).astype(np.int8), prepend=0, append=0)
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True))
