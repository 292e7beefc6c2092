"""Row maps: compact tensors, flat shards and selections against plain indexing."""

import pytest
import torch

from qkguard.errors import QKGuardError
from qkguard.layout.rows import RowSelection
from qkguard.layout.selection import select, show_layers
from qkguard.layout.spec import AttentionSpec, Block, ParamMap

ROWS = (Block(0, 2, "q", 0), Block(2, 3, "k", 0), Block(5, 7, "q", 1), Block(7, 8, "kv", None))
MAPS = {
    "rows": ParamMap("w", (9, 4), 0, "weight", ROWS),
    "columns": ParamMap("w", (4, 9), 1, "weight", ROWS),
    "bias": ParamMap("b", (9,), 0, "bias", ROWS),
    "stacked": ParamMap("e", (3, 9, 2), 1, "weight", ROWS),
    "whole": ParamMap("w", (6, 3), 0, "weight", (Block(0, 3, "q", 0), Block(3, 6, "q", 1))),
}


@pytest.mark.parametrize("name", MAPS)
def test_take_and_put_match_plain_indexing(name):
    pmap = MAPS[name]
    full = torch.arange(float(pmap.full_numel)).view(pmap.shape)
    rows = [r for b in pmap.blocks for r in range(b.start, b.stop)]
    compact = pmap.take(full)
    assert torch.equal(compact, full.index_select(pmap.dim, torch.tensor(rows)))
    assert compact.shape == pmap.compact_shape and compact.numel() == pmap.numel
    other = torch.full(pmap.shape, -1.0)
    pmap.put(other, compact)
    assert torch.equal(pmap.take(other), compact)
    assert (other == -1).sum() == pmap.full_numel - pmap.numel


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("name", MAPS)
def test_flat_shards_hold_contiguous_compact_pieces(name, ranks):
    pmap = MAPS[name]
    flat = torch.randn(pmap.full_numel)
    compact = pmap.take(flat.view(pmap.shape)).reshape(-1)
    per = -(-pmap.full_numel // ranks)
    pieces, by_role = [], {}
    for r in range(ranks):
        start, stop = min(r * per, len(flat)), min((r + 1) * per, len(flat))
        piece = pmap.take_flat(flat[start:stop], start)
        assert torch.equal(piece, compact[pmap.compact_offset(start) : pmap.compact_offset(stop)])
        shard = flat[start:stop]
        assert torch.equal(torch.cat([shard[:0], *(shard[a:b] for a, b in pmap.flat_ranges(start, stop))]), piece)
        for run in pmap.role_slices(start, stop):
            assert torch.equal(flat[start:stop][run.flat], piece[run.compact])
            by_role.setdefault(run.role, []).append(piece[run.compact])
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces), compact)
    for role in {b.role for b in pmap.blocks}:
        expected = pmap.only(lambda b, role=role: b.role == role).take(flat.view(pmap.shape))
        assert torch.equal(torch.cat(by_role[role]).sort().values, expected.reshape(-1).sort().values)


def test_overlapping_or_outlying_blocks_are_refused():
    with pytest.raises(QKGuardError, match="overlaps"):
        ParamMap("w", (9, 4), 0, "weight", (Block(0, 3, "q"), Block(2, 4, "k")))
    with pytest.raises(QKGuardError, match="leaves dimension"):
        ParamMap("w", (9, 4), 0, "weight", (Block(8, 10, "q"),))


def test_take_of_another_shape_is_refused():
    with pytest.raises(QKGuardError, match="expected shape"):
        MAPS["rows"].take(torch.zeros(8, 4))


def _specs():
    norm = ParamMap("n", (4,), 0, "norm", (Block(0, 4, "q"),))
    first = AttentionSpec(1, "a", "full_attention", 2, 1, 2, (MAPS["rows"], norm))
    shared = AttentionSpec(3, "b", "sliding_attention", 2, 1, 2, (MAPS["rows"], MAPS["bias"]))
    return [first, shared]


def test_select_projections_layers_norms_and_shared_rows():
    def names(**options):
        return [(s.layer, [p.name for p in maps]) for s, maps in select(_specs(), RowSelection.of(options))]

    assert names() == [(1, ["w"]), (3, ["b"])], "a shared parameter belongs to its first layer"
    assert names(include_norms=True)[0] == (1, ["w", "n"])
    assert names(include_sliding_window=False) == [(1, ["w"])]
    assert names(layers=[3]) == [(3, ["w", "b"])]
    with pytest.raises(QKGuardError, match=r"Layers \[2\] have no softmax attention; those that have it: 1, 3"):
        select(_specs(), RowSelection(layers=(2, 3)))

    def roles(**options):
        return {b.role for _, maps in select(_specs(), RowSelection.of(options)) for p in maps for b in p.blocks}

    assert roles() == {"q", "k"} and roles(projections=("k",)) == {"k"} and roles(shared="restore") == {"q", "k", "kv"}
    with pytest.raises(QKGuardError, match="feed keys and values alike"):
        select(_specs(), RowSelection(shared="refuse"))


def test_layers_for_people():
    assert show_layers(range(80)) == "0-79" and show_layers([3, 7, 11]) == "3, 7, 11"
    assert show_layers([0, 1, 2, None, 7, 9, 10]) == "0-2, 7, 9-10"
    assert show_layers([0, 1, 2, 7, 9, 10], most=2) == "0-2, 7, ... (6 layers)"
    assert show_layers([0, 1, 2, 7], most=2) == "0-2, 7" and show_layers([None]) == ""
