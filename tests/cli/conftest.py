"""A real daemon in this process for the commands that talk to one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cached.core.header import write
from tests.fakes.local_daemon import LocalDaemon
from tests.fakes.store import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OBJECTS = {"a.safetensors": write([("t", "U8", (5,))]) + b"12345", "config.json": b"{}"}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalDaemon]:
    daemon = LocalDaemon(tmp_path, MemoryStore(OBJECTS))
    monkeypatch.setenv("CACHED_SOCKET", daemon.address)
    yield daemon
    daemon.stop()
