"""A daemon that commands talk to, and scripts of what a real one never says."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from cached.client.deadline import Deadline
from tests.fakes.commands import HELD, WEIGHTS
from tests.fakes.local_daemon import GatedStore, LocalDaemon, ScriptedDaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def hold() -> None:
    """Let nothing past the first GET come, until ``store.release``."""


@pytest.fixture
def store(request: pytest.FixtureRequest) -> GatedStore:
    return GatedStore({HELD: WEIGHTS}, {HELD} if "hold" in request.fixturenames else ())


@pytest.fixture
def daemon(
    tmp_path: Path, store: GatedStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalDaemon]:
    started = LocalDaemon(tmp_path, store, names=("m", "clip"))
    monkeypatch.setenv("CACHED_SOCKET", started.address)
    yield started
    store.release(HELD)
    started.stop()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Do these one after the other instead of sleeping; then Ctrl-C."""
    doings: list[Callable[[], object]] = []

    def sleep(deadline: Deadline, seconds: float) -> None:
        if not doings:
            raise KeyboardInterrupt
        doings.pop(0)()

    monkeypatch.setattr(Deadline, "sleep", sleep)
    return doings


@pytest.fixture
def scripted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[ScriptedDaemon], None]], None]]:
    """Return a function that plays a script to the next command."""
    address = str(tmp_path / "scripted.sock")
    monkeypatch.setenv("CACHED_SOCKET", address)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    threads = []

    def play(script: Callable[[ScriptedDaemon], None]) -> None:
        def serve() -> None:
            connected, _ = listener.accept()
            daemon = ScriptedDaemon(connected)
            try:
                script(daemon)
            finally:
                daemon.close()

        threads.append(threading.Thread(target=serve))
        threads[-1].start()

    yield play
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    listener.close()
