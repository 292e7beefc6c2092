"""Pictures of one pixel, for trainings in tests about other things: a run's page takes longer than its steps."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from PIL import Image


def _one_pixel(*args: object, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "png")
    return file.getvalue()


@contextmanager
def small_pictures() -> Iterator[None]:
    """Inside the block nothing is drawn; pages have their pictures all the same, and files are PNGs."""
    from qkguard.report import page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "themed_png", _one_pixel)
        yield
