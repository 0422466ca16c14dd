"""No process outlives the test that started it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults.trainings import STARTED, kill


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    while STARTED:
        kill(STARTED.pop())
