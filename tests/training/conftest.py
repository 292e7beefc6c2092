"""Trainings without pictures, but for the tests that look at them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from tests.support.pictures import small_pictures

LOOK = {"test_trackers"}


@pytest.fixture(scope="module", autouse=True)
def quick_pages(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing is drawn, except where a module looks at pictures or pages."""
    module = request.module.__name__.rpartition(".")[2]
    with nullcontext() if module in LOOK else small_pictures():
        yield
