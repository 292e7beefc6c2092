"""The import of torch and of transformers' model code: without the garbage collector, and only where it is needed."""

from __future__ import annotations

import gc
import sys

import pytest

from qkguard.layout import model_code


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_rests_during_the_import(was_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is afterwards as it was, also where the import fails."""
    seen: list[tuple[str, bool]] = []

    def import_module(name: str) -> None:
        seen.append((name, gc.isenabled()))
        raise ImportError(name)

    monkeypatch.setattr(model_code, "import_module", import_module)
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", sys)
    model_code.import_model_code()
    assert seen == [], "it is there"
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    try:
        (gc.enable if was_on else gc.disable)()
        with pytest.raises(ImportError):
            model_code.import_model_code()
        assert seen == [("transformers.modeling_utils", False)]
        assert gc.isenabled() == was_on
    finally:
        gc.enable()
