"""What holds for every test: its time limit, and how hypothesis runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterable

SLOW_TIMEOUT_S = 120

# The time limit of the whole test is the deadline: a busy machine must not fail single examples.
settings.register_profile("cached", deadline=None, print_blob=True)
settings.load_profile("cached")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
