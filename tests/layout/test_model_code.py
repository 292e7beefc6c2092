"""The import of torch and of transformers' model code: with few garbage collections, and only where it is needed."""

from __future__ import annotations

import gc
import sys

import pytest

from qkguard.layout import model_code


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
