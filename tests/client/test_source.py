"""A daemon that comes back is asked again; what was mapped stays what it was."""

from __future__ import annotations

import os
import shutil
import socket
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import cached
from cached.client.connection import Connection
from cached.client.dialing import connect
from cached.core import wire
from cached.core.errors import DaemonUnavailable, Stale, TimedOut, VersionUnknown
from tests.fakes.local_daemon import (
    WAIT_S,
    GatedStore,
    LocalDaemon,
    ScriptedDaemon,
    open_descriptors,
    padded,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fakes.local_daemon import Calls

A, B = b"a" * 5000, b"b" * 5000
FILES = {"a.safetensors": padded("a", A), "b.safetensors": padded("b", B), "empty.txt": b""}
HELD = ("a.safetensors", "b.safetensors")


class Restarts:
    """Daemons one after the other, on the same socket; each with a segment root of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self.daemon: LocalDaemon | None = None

    def __call__(
        self, *held: str, files: dict[str, bytes] = FILES, is_same_root: bool = False
    ) -> LocalDaemon:
        """Kill the one that runs, and start the next."""
        self.kill()
        self._count += not is_same_root
        store = GatedStore(files, held)
        self.daemon = LocalDaemon(self._directory, store, root=f"root-{self._count}")
        return self.daemon

    def kill(self) -> None:
        if self.daemon is not None:
            self.daemon.stop()
            self.daemon = None


@pytest.fixture
def restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restarts]:
    monkeypatch.setenv("CACHED_SOCKET", str(tmp_path / "cached.sock"))
    restarts = Restarts(tmp_path)
    yield restarts
    restarts.kill()


def test_what_was_not_there_comes_from_the_daemon_that_is_back(restart: Restarts):
    restart(*HELD)
    with cached.open("m", timeout_s=WAIT_S) as model:
        early = model["a.pad"]
        restart()
        assert bytes(model["a"]) == A
        assert bytes(model["b"]) == B
        assert not np.shares_memory(early, model["a.pad"])
        assert early.tobytes() == model["a.pad"].tobytes()
        assert not model.is_stale


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.wait(),
        lambda model: model.path,
        lambda model: dict(model.items(order="arrival")),
        lambda model: model.file("b.safetensors"),
        lambda model: model.wait(["a", "b"]),
        lambda model: model.is_stale,
    ],
    ids=["all", "path", "arrival", "file", "tensors", "stale"],
)
def test_whatever_is_asked_first_finds_the_daemon_again(
    restart: Restarts, ask: Callable[[cached.Model], object]
):
    restart(*HELD)
    with cached.open("m", timeout_s=WAIT_S) as model:
        daemon = restart()
        ask(model)
        assert daemon.leases == 1
        assert bytes(model["a"]) == A
        with open(f"{model.path}/b.safetensors", "rb") as file:
            assert file.read() == FILES["b.safetensors"]


def test_what_was_there_before_is_waited_for_where_the_files_are_others(restart: Restarts):
    restart("a.safetensors")
    with cached.open("m", timeout_s=WAIT_S) as model:
        early = model["b"]
        daemon = restart("b.safetensors")
        assert bytes(model["a"]) == A  # from here on the files are those of the new daemon
        with pytest.raises(TimedOut):
            model.wait(["b"], timeout_s=0.05)
        daemon.store.release("b.safetensors")
        assert bytes(model["b"]) == bytes(early) == B
        assert not np.shares_memory(model["b"], early)


def test_a_model_that_is_complete_asks_nobody(restart: Restarts):
    restart()
    with cached.open("m", until="ready") as model:
        early = model["a"]
        daemon = restart()
        assert dict(model.items()).keys() == {"a", "a.pad", "b", "b.pad"}
        assert bytes(model["b"]) == B
        assert np.shares_memory(model["a"], early)
        assert daemon.leases == 0


def test_a_daemon_that_took_over_the_files_gives_the_same_memory(restart: Restarts):
    restart(is_same_root=True)
    with cached.open("m", until="ready") as model:
        early, before = model["a"], model.path
        daemon = restart(is_same_root=True)
        assert not model.is_stale
        assert daemon.leases == 1
        assert daemon.store.gets == []
        assert np.shares_memory(model["a"], early)
        with cached.open("m", until="ready") as other:
            assert other.path == before
            assert bytes(other["b"]) == B


def test_a_directory_that_is_gone_is_asked_for_again(restart: Restarts):
    restart()
    with cached.open("m", until="ready") as model:
        shutil.rmtree(model.path)
        daemon = restart()
        assert os.path.exists(f"{model.path}/a.safetensors")
        assert daemon.leases == 1


def test_a_daemon_that_is_not_back_is_unavailable_at_once(restart: Restarts):
    restart(*HELD)
    with cached.open("m") as model:
        restart.kill()
        for _ in range(2):
            with pytest.raises(DaemonUnavailable, match="the daemon has gone: cannot connect to"):
                model["a"]
        restart()
        assert bytes(model["a"]) == A


def test_another_version_is_stale_and_views_stay(restart: Restarts):
    restart(*HELD)
    with cached.open("m", timeout_s=WAIT_S) as model:
        early = model["a.pad"]
        daemon = restart(files={"a.safetensors": padded("a", B)})
        with pytest.raises(Stale, match="open the model again: the views that you have stay valid"):
            model["a"]
        assert not early.any()
        daemon.wait_for_leases(0)


def test_many_threads_make_one_new_lease(
    restart: Restarts, call: Calls, monkeypatch: pytest.MonkeyPatch
):
    connected = []

    def counted(*arguments: Any) -> Connection:
        connected.append(arguments)
        return connect(*arguments)

    monkeypatch.setattr("cached.client.source.connect", counted)
    restart(*HELD)
    with cached.open("m", timeout_s=WAIT_S) as model:
        daemon = restart(*HELD)
        waits = [call(lambda name=name: bytes(model[name])) for name in "ab" * 8]
        while daemon.leases == 0:
            pass
        daemon.store.release(*HELD)
        for wait, content in zip(waits, (A, B) * 8, strict=True):
            assert wait.result(WAIT_S) == content
        assert daemon.leases == 1
        assert len(connected) == 1


def test_restarts_leave_no_descriptor(restart: Restarts):
    restart(*HELD)
    with cached.open("m", timeout_s=WAIT_S) as model:
        counts = []
        for _ in range(3):
            restart(*HELD)
            assert not model.is_stale
            counts.append(len(open_descriptors()))
        assert counts[0] == counts[-1]


def test_the_lease_of_the_new_daemon_ends_with_the_model_and_its_views(restart: Restarts):
    restart(*HELD)
    model = cached.open("m", timeout_s=WAIT_S)
    early = model["a.pad"]
    daemon = restart()
    late = model["a"]
    model.close()
    assert daemon.leases == 1
    del early
    assert daemon.leases == 1
    del late
    daemon.wait_for_leases(0)


def test_a_model_that_is_closed_does_not_come_back(restart: Restarts):
    restart(*HELD)
    model = cached.open("m", timeout_s=WAIT_S)
    view = model["a.pad"]
    daemon = restart()
    model.close()
    with pytest.raises(cached.ModelClosed):
        model["a"]
    assert daemon.leases == 0
    del view


def test_a_child_of_fork_finds_the_daemon_that_is_back(restart: Restarts):
    restart(*HELD)
    with cached.open("m", timeout_s=WAIT_S) as model:
        restart()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if bytes(model["a"]) == A and bytes(model["b"]) == B else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert bytes(model["a"]) == A


# --- against a script: what today's daemon does not say


class Scripts:
    """Two daemons of one script each, at one address."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(WAIT_S)
        self._listener.bind(path)
        self._listener.listen()

    def accept(self) -> ScriptedDaemon:
        daemon = ScriptedDaemon(self._listener.accept()[0])
        daemon.greet()
        return daemon

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripts]:
    path = str(tmp_path / "scripted.sock")
    monkeypatch.setenv("CACHED_SOCKET", path)
    made = Scripts(path)
    yield made
    made.close()


@pytest.fixture
def content() -> Iterator[int]:
    descriptor = os.memfd_create("test")
    os.write(descriptor, FILES["a.safetensors"])
    yield descriptor
    os.close(descriptor)


def grant(daemon: ScriptedDaemon, content: int, **members: object) -> dict[str, Any]:
    request = daemon.expect("open")
    grant_reply(daemon, request, content, **members)
    return request


def grant_reply(
    daemon: ScriptedDaemon, request: dict[str, Any], content: int, **members: object
) -> None:
    size = len(FILES["a.safetensors"])
    header = int.from_bytes(FILES["a.safetensors"][:8], "little") + 8
    daemon.send(
        {
            "id": request["id"],
            "fds": 1,
            "name": "m",
            "version": "v1",
            "complete": False,
            "path": None,
            "files": [{"path": "a.safetensors", "size": size, "header_bytes": header}],
            **members,
        },
        (content,),
    )


def test_files_that_were_adopted_stay_mapped_as_they_are(
    scripts: Scripts, call: Calls, content: int
):
    opening = call(cached.open, "m", timeout_s=WAIT_S)
    daemon = scripts.accept()
    grant(daemon, content)
    model = opening.result(WAIT_S)
    waiting = call(lambda: model["a.pad"])
    daemon.send({"id": daemon.expect("wait")["id"], "complete": False})
    early = waiting.result(WAIT_S)
    daemon.close()
    waiting = call(lambda: model["a"])
    daemon = scripts.accept()
    again = grant(daemon, content)
    assert again["version"] == "v1"
    daemon.send({"id": daemon.expect("wait")["id"], "complete": False})
    assert bytes(waiting.result(WAIT_S)) == A
    assert np.shares_memory(early, model["a.pad"])
    model.close()
    daemon.close()


def test_a_version_that_is_not_to_be_had_any_more_is_stale(
    scripts: Scripts, call: Calls, content: int
):
    opening = call(cached.open, "m", timeout_s=WAIT_S)
    daemon = scripts.accept()
    grant(daemon, content)
    model = opening.result(WAIT_S)
    daemon.close()
    waiting = call(lambda: model["a"])
    daemon = scripts.accept()
    error = VersionUnknown("m has no version v1: there is v2", hint="open v2")
    daemon.send({"id": daemon.expect("open")["id"], **wire.error_body(error)})
    with pytest.raises(Stale, match="there is v2; open the model again"):
        waiting.result(WAIT_S)
    assert daemon.is_hung_up()
    model.close()
    daemon.close()


def test_a_daemon_that_dies_while_it_is_asked_again_is_unavailable_and_the_next_is_asked(
    scripts: Scripts, call: Calls, content: int
):
    opening = call(cached.open, "m", timeout_s=WAIT_S)
    daemon = scripts.accept()
    grant(daemon, content)
    model = opening.result(WAIT_S)
    daemon.close()
    waiting = call(lambda: model.is_stale)
    daemon = scripts.accept()
    daemon.expect("open")
    daemon.close()
    with pytest.raises(DaemonUnavailable, match="closed the connection"):
        waiting.result(WAIT_S)
    waiting = call(lambda: model.is_stale)
    daemon = scripts.accept()
    grant(daemon, content)
    daemon.send({"id": daemon.expect("check")["id"], "stale": False, "current": "v1"})
    assert waiting.result(WAIT_S) is False
    model.close()
    daemon.close()


def test_a_call_that_waits_for_another_to_find_the_daemon_keeps_its_deadline(
    scripts: Scripts, call: Calls, content: int
):
    opening = call(cached.open, "m", timeout_s=WAIT_S)
    daemon = scripts.accept()
    grant(daemon, content)
    model = opening.result(WAIT_S)
    daemon.close()
    first = call(lambda: model.is_stale)
    daemon = scripts.accept()
    daemon.expect("open")  # the first is finding it
    with pytest.raises(TimedOut):
        model.wait(["a"], timeout_s=0.05)
    daemon.close()
    with pytest.raises(DaemonUnavailable):
        first.result(WAIT_S)
    model.close()


def test_a_model_that_is_closed_while_the_daemon_is_found_again_keeps_no_lease(
    scripts: Scripts, call: Calls, content: int
):
    opening = call(cached.open, "m", timeout_s=WAIT_S)
    daemon = scripts.accept()
    grant(daemon, content)
    model = opening.result(WAIT_S)
    daemon.close()
    asking = call(lambda: model.is_stale)
    daemon = scripts.accept()
    request = daemon.expect("open")
    model.close()
    grant_reply(daemon, request, content)
    daemon.send({"id": daemon.expect("check")["id"], "stale": False, "current": "v1"})
    asking.result(WAIT_S)
    assert daemon.is_hung_up()
    assert repr(model)  # it is still there
    daemon.close()


def test_ranges_are_waited_for_again_when_the_daemon_was_another_half_way(
    scripts: Scripts, call: Calls, content: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cached.core.wire.MAX_RANGES", 1)
    opening = call(cached.open, "m", timeout_s=WAIT_S)
    daemon = scripts.accept()
    grant(daemon, content)
    model = opening.result(WAIT_S)
    ranges = [(0, 0, 1), (0, 5, 6)]
    deadline = model._deadline()
    waiting = call(model._source.wait, ranges, deadline, "two ranges")
    request = daemon.expect("wait")
    lost = Connection.is_lost
    monkeypatch.setattr(Connection, "is_lost", property(lambda self: self.pid and True))
    daemon.send({"id": request["id"], "complete": False})
    second = scripts.accept()
    monkeypatch.setattr(Connection, "is_lost", lost)
    grant(second, content)
    asked = []
    for _ in range(3):
        request = second.expect("wait")
        asked += request["ranges"]
        second.send({"id": request["id"], "complete": False})
    assert asked == [[0, 5, 6], [0, 0, 1], [0, 5, 6]]
    waiting.result(WAIT_S)
    model.close()
    daemon.close()
    second.close()
