"""The import of torch and of transformers' model code, and the numbers that stand in for weights after it."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from qkguard.layout import model_code
from qkguard.layout.weightless import PERIOD, Fill


@pytest.mark.parametrize(("before", "meanwhile"), [(700, 20_000), (50_000, 50_000), (0, 0)])
def test_the_collector_looks_up_rarely_during_the_import(
    before: int, meanwhile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is afterwards as it was, also where the import fails."""
    seen: list[tuple[str, int]] = []

    def import_module(name: str) -> None:
        seen.append((name, gc.get_threshold()[0]))
        raise ImportError(name)

    monkeypatch.setattr(model_code, "import_module", import_module)
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", sys)
    model_code.import_model_code()
    assert seen == [], "it is there"
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    found = gc.get_threshold()
    try:
        gc.set_threshold(before, 7, 5)
        with pytest.raises(ImportError):
            model_code.import_model_code()
        assert seen == [("transformers.modeling_utils", meanwhile)]
        assert gc.get_threshold() == (before, 7, 5)
    finally:
        gc.set_threshold(*found)


def test_matrices_share_their_memory_but_not_their_numbers() -> None:
    shapes = [(80, 100), (3, 100), (9, 100, 100), (50, PERIOD // 10), (9,)]
    shared, alone = Fill(), Fill()
    found = [shared.parameter(torch.empty(shape)) for shape in shapes]
    for shape, one in zip(shapes, found, strict=True):
        wanted = alone.normal(shape, max(shape) ** -0.5) if len(shape) > 1 else alone.normal(shape, 0.1) + 1
        assert torch.equal(one, wanted)
    memory = [one.untyped_storage().data_ptr() for one in found]
    assert memory[0] == memory[1] and len(set(memory)) == 4, "a larger one, one of another scale, a vector"
    assert not torch.equal(found[0][:3], found[1])
