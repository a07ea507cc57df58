"""Descriptors count for their process until they are received, over all its connections."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

from cached.adapters.unix_socket.connection import Connection
from cached.adapters.unix_socket.in_flight import InFlight
from cached.adapters.unix_socket.processes import Hooks, Process
from cached.core.objects import PeerId
from cached.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Connect = Callable[[Process], tuple[Connection, socket.socket]]


def process(pid: int) -> Process:
    return Process((os.geteuid(), pid), HOOKS)


HOOKS = Hooks(Mailbox().lane, lambda turn: None, lambda process: None, lambda: 0.0)


@pytest.fixture
def connect() -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:

        def connected(of: Process) -> tuple[Connection, socket.socket]:
            near, far = (stack.enter_context(each) for each in socket.socketpair())
            near.setblocking(False)
            return Connection(near, PeerId(1), of), far

        yield connected


def received(far: socket.socket) -> int:
    descriptors = socket.recv_fds(far, 1, 200)[1]
    for each in descriptors:
        os.close(each)
    return len(descriptors)


def test_they_count_until_they_are_received(connect: Connect):
    in_flight = InFlight(100)
    made, far = connect(process(1))
    for _ in range(5):
        assert in_flight.take(made, 10)
        assert made.send(b"x", (0,) * 10)
    assert not in_flight.take(made, 1)
    assert not in_flight.has_received(made)
    for _ in range(5):
        assert received(far) == 10
    assert in_flight.has_received(made)
    assert in_flight.take(made, 50)


def test_what_another_connection_has_received_since_is_seen_when_it_matters(connect: Connect):
    in_flight = InFlight(100)
    of = process(1)
    (first, far), (second, _) = connect(of), connect(of)
    assert in_flight.take(first, 50)
    assert first.send(b"x", (0,) * 50)
    assert not in_flight.take(second, 1)
    assert received(far) == 50
    assert in_flight.take(second, 50)


def test_another_process_has_its_own_share(connect: Connect):
    in_flight = InFlight(100)
    (hoarder, _), (other, _) = connect(process(1)), connect(process(2))
    assert in_flight.take(hoarder, 50)
    assert hoarder.send(b"x", (0,) * 50)
    assert in_flight.take(other, 25)


def test_who_has_gone_has_received_all(connect: Connect):
    in_flight = InFlight(100)
    made, far = connect(process(1))
    assert in_flight.take(made, 50)
    assert made.send(b"x", (0,) * 50)
    assert not in_flight.has_received(made)
    far.close()
    assert in_flight.has_received(made)
