"""Daemons for the tests of the client."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from cached.client.connection import Connection
from tests.fakes.local_daemon import Calls, LocalDaemon, ScriptedDaemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fakes.local_daemon import GatedStore

    class Serve(Protocol):
        def __call__(self, store: GatedStore, **options: Any) -> LocalDaemon: ...


@pytest.fixture
def torch() -> Any:
    """Return torch; without it ``model.torch()`` stays untested, and the summary says so."""
    why = "NOT TESTED without torch: make bench-setup installs it; then make test ARGS='-k torch'"
    return pytest.importorskip("torch", reason=why)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a real daemon over a store; ``cached.open`` finds it."""
    started: list[LocalDaemon] = []

    def start(store: GatedStore, **options: Any) -> LocalDaemon:
        daemon = LocalDaemon(tmp_path, store, **options)
        started.append(daemon)
        monkeypatch.setenv("CACHED_SOCKET", daemon.address)
        return daemon

    yield start
    for daemon in started:
        daemon.stop()


@pytest.fixture
def call() -> Iterator[Calls]:
    """Run calls in other threads; the test ends when they have."""
    calls = Calls()
    yield calls
    calls.close()


@pytest.fixture
def pair() -> Iterator[tuple[Connection, ScriptedDaemon]]:
    """A connection and what it is connected to."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection, daemon = Connection(ours, "/the/socket"), ScriptedDaemon(theirs)
    daemon.greet()
    yield connection, daemon
    connection.close()
    daemon.close()
