"""Trainings without pictures, but for the tests that look at them (marked `pictures`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from tests.support.pictures import small_pictures


@pytest.fixture(autouse=True)
def quick_pages(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if request.node.get_closest_marker("pictures") else small_pictures():
        yield
