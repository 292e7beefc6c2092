"""Runs' pages without pictures, for tests about other things: a page takes longer than a tiny run's steps."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from PIL import Image


def _none(run: object) -> dict[str, object]:
    return {}


def _one_pixel(*args: object, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "png")
    return file.getvalue()


@contextmanager
def small_pictures() -> Iterator[None]:
    """Inside the block the pages of runs have no pictures, and all others pictures of one pixel."""
    from qkguard.report import page, run_page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_page, "run_figures", _none)
        patch.setattr(page, "themed_png", _one_pixel)
        yield
