"""A root for each back end, and the stores on it."""

from __future__ import annotations

import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.adapters.segments.versions import STORES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cached.adapters.segments import Segments

    Opened = Callable[..., Segments]

SHM = "/dev/shm"


@pytest.fixture(params=["tmpfs", "file", "memfd"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def root(kind: str, tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "root")
    if kind == "tmpfs":
        try:
            path = tempfile.mkdtemp(prefix="cached-test-", dir=SHM)
        except OSError:
            pytest.skip(f"NOT PROVEN HERE: there is no {SHM} to write to")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def opened(kind: str, root: str) -> Iterator[Opened]:
    """Open the root; what was opened before is closed, as by a daemon that ended."""
    stores: list[Segments] = []

    def again(**more: int) -> Segments:
        while stores:
            stores.pop().close()
        stores.append(STORES[kind](root, **more))
        return stores[0]

    yield again
    while stores:
        stores.pop().close()


@pytest.fixture
def segments(opened: Opened) -> Segments:
    return opened()
