"""What holds for every test: its time limit, how hypothesis runs, and that movers have ended."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from cached.adapters.http_reader import mover

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SLOW_TIMEOUT_S = 120

# The time limit of the whole test is the deadline: a busy machine must not fail single examples.
settings.register_profile("cached", deadline=None, print_blob=True)
settings.load_profile("cached")


@pytest.fixture(autouse=True, scope="session")
def movers_rest_shortly() -> Iterator[None]:
    """What the next test finds open must be its own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mover, "REST_S", 0.005)
        yield


@pytest.fixture(autouse=True)
def no_mover_stays() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "mover":
            thread.join(1)


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
