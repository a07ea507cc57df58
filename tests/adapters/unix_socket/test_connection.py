"""What a peer does not take is kept in order, up to a limit; a frame is a request or an error."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from cached.adapters.unix_socket import connection as module
from cached.adapters.unix_socket.connection import (
    MAX_WAITING_BYTES,
    Connection,
    reply_frame,
    request_of,
)
from cached.adapters.unix_socket.processes import Hooks, Process
from cached.core.effects import Reply
from cached.core.errors import FrameError, LoadFailed
from cached.core.objects import PeerId
from cached.core.wire import MAX_OUTSTANDING, FrameBuffer
from cached.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Iterator

PEER = PeerId(1)
HOOKS = Hooks(Mailbox().lane, lambda turn: None, lambda process: None, lambda: 0.0)


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    process = Process((os.geteuid(), os.getpid()), HOOKS)
    made = Connection(near, PEER, process)
    yield made, far
    made.close()
    far.close()


def fill(made: Connection) -> bytes:
    """Send until the kernel takes no more; return all that was sent."""
    sent = b""
    while not made.unsent:
        frame = bytes([len(sent) % 251]) * 100_000
        assert made.send(frame, ())
        sent += frame
    return sent


def test_what_the_kernel_does_not_take_is_sent_later_in_order(pair):
    made, far = pair
    wanted = fill(made)
    assert made.send(b"last", ())
    wanted += b"last"
    got = b""
    while len(got) < len(wanted):
        got += far.recv(1 << 20)
        made.flush()
    assert got == wanted
    assert not made.unsent


def test_who_does_not_read_is_kept_up_to_a_limit(pair):
    made, _ = pair
    fill(made)
    frame = bytes(MAX_WAITING_BYTES // 4)
    kept = [made.send(frame, ()) for _ in range(8)]
    assert kept == [True] * 5 + [False] * 3


def test_no_request_is_taken_while_too_many_are_outstanding(pair):
    made, _ = pair
    made.outstanding = MAX_OUTSTANDING
    assert made.is_full


def test_a_reply_over_the_limit_becomes_an_error(monkeypatch):
    monkeypatch.setattr(module, "MAX_REPLY_BYTES", 100)
    frame, descriptors = reply_frame(Reply(PEER, 3, "status", {"text": "x" * 200}, ()), (7, 8))
    buffer = FrameBuffer(1000)
    buffer.feed(frame)
    body = buffer.next_frame()
    assert body is not None
    assert (body["id"], descriptors) == (3, ())
    assert LoadFailed.code in str(body["error"])


@pytest.mark.parametrize(
    "frame", [{}, {"id": -1, "op": "x"}, {"id": True, "op": "x"}, {"id": 2**53, "op": "x"}]
)
def test_a_frame_without_a_whole_number_as_id_is_no_request(frame):
    with pytest.raises(FrameError, match="id must be"):
        request_of(PEER, frame)


def test_a_frame_is_a_request_of_its_members():
    found = request_of(PEER, {"id": 5, "op": "open", "model": "m"})
    assert (found.peer, found.request_id, found.op, found.fields) == (
        PEER,
        5,
        "open",
        {"model": "m"},
    )
    with pytest.raises(FrameError, match="op must be"):
        request_of(PEER, {"id": 5})
