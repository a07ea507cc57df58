"""A daemon is found if it listens in time; else the error says what is wrong, who may mend it."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import select
import signal
import socket
import tempfile
from typing import TYPE_CHECKING

import pytest

from cached.client.deadline import Deadline
from cached.client.dialing import connect
from cached.core.errors import DaemonUnavailable
from tests.fakes.local_daemon import open_descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fakes.local_daemon import Calls

NEVER = Deadline(None)
NOBODY = 65534


def test_connecting_to_nobody_says_what_to_do(tmp_path: Path):
    before = open_descriptors()
    with pytest.raises(DaemonUnavailable, match=r"nothing is there; start it \(cached serve\)"):
        connect(str(tmp_path / "none"), NEVER)
    with pytest.raises(DaemonUnavailable, match="nobody listens on it"):
        connect("@cached-test-of-nobody", Deadline(0), is_patient=True)
    with pytest.raises(DaemonUnavailable, match="too long"):
        connect("/" + "x" * 200, NEVER, is_patient=True)
    assert open_descriptors() == before


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Take from this thread root's right to any file, if it has that: setfsuid(2)."""
    libc = ctypes.CDLL(None)
    before = libc.setfsuid(NOBODY)
    yield
    libc.setfsuid(before)


@pytest.fixture
def closed_socket() -> Iterator[str]:
    """A socket that nobody but root may connect to, in a directory that all may enter."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        os.chmod(directory, 0o755)
        listener.bind(f"{directory}/s")
        os.chmod(f"{directory}/s", 0)
        listener.listen()
        yield f"{directory}/s"
        os.chmod(directory, 0o700)


def test_a_socket_that_this_user_may_not_connect_to_says_who_may(
    closed_socket: str, as_nobody: None
):
    user = pwd.getpwuid(os.getuid()).pw_name
    group = grp.getgrgid(os.getgid()).gr_name
    with pytest.raises(DaemonUnavailable, match="this user may not connect to it") as caught:
        connect(closed_socket, NEVER)
    assert caught.value.hint == (
        f"it is of user {user} and group {group}, with mode 0000: be one of these, or start the "
        "daemon with another --socket-mode"
    )


def test_a_socket_in_a_closed_directory_says_that(
    closed_socket: str, request: pytest.FixtureRequest
):
    os.chmod(os.path.dirname(closed_socket), 0)
    request.getfixturevalue("as_nobody")
    with pytest.raises(DaemonUnavailable) as caught:
        connect(closed_socket, NEVER)
    assert caught.value.hint.startswith("a directory on the way to it is closed to this user")


def test_patience_waits_for_a_daemon_that_starts_later(tmp_path: Path, call: Calls):
    path = str(tmp_path / "later.sock")
    connecting = call(connect, path, Deadline(10), is_patient=True)
    with pytest.raises(TimeoutError):
        connecting.result(timeout=0.01)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    connection = connecting.result(timeout=5)
    assert connection.address == path
    connection.close()
    listener.close()


def test_a_full_backlog_is_waited_for(tmp_path: Path, call: Calls):
    path = str(tmp_path / "full.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(0)
    first = connect(path, NEVER)
    with pytest.raises(DaemonUnavailable, match="too many others wait to be accepted; try again"):
        connect(path, Deadline(0.01))
    with pytest.raises(DaemonUnavailable):
        connect(path, Deadline(0))
    second = call(connect, path, NEVER)
    while not second.done():
        if select.select([listener], [], [], 0.01)[0]:
            listener.accept()[0].close()
    second.result().close()
    first.close()
    listener.close()


def test_a_signal_while_it_waits_changes_nothing(tmp_path: Path):
    """The kernel ends the wait: connect(2), EINTR."""
    path = str(tmp_path / "full.sock")
    rung: list[int] = []

    def accept(signum: int, frame: object) -> None:
        rung.append(signum)
        listener.accept()[0].close()

    before = signal.signal(signal.SIGALRM, accept)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        first = connect(path, NEVER)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        second = connect(path, Deadline(10))
        assert len(rung) == 1
        assert select.select([listener], [], [], 0)[0], "it is connected indeed"
        second.close()
        first.close()
    signal.signal(signal.SIGALRM, before)


def test_an_abstract_name_is_connected_to():
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0cached-test-{os.getpid()}")
        listener.listen()
        connection = connect(f"@cached-test-{os.getpid()}", NEVER)
        connection.close()
