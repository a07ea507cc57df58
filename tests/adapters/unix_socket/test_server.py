"""Workers are read and answered in order, and none can hold up, starve or outlast another.

Every test runs the real thread over real sockets.
"""

from __future__ import annotations

import array
import errno
import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.adapters.clock import SystemClock
from cached.adapters.listening_socket import listen
from cached.adapters.unix_socket import UnixSocket, connection, processes, server
from cached.adapters.unix_socket.processes import MAX_AHEAD
from cached.core.effects import Reply
from cached.core.events import Connected, Disconnected, Requested
from cached.core.objects import PeerId
from cached.core.shares import Shares
from cached.core.wire import MAX_OUTSTANDING, MAX_REQUEST_BYTES, FrameBuffer, encode
from cached.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cached.core.events import Event

WAIT_S = 10.0  # a wait that ends by its time-out is a failure


def dial(path: str) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(path)  # waits; with a time-out it would not: docs/wire.md
    return connected


class Worker:
    """A worker's end: blocking, as docs/wire.md has it."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(WAIT_S)
        self.frames = FrameBuffer(64 << 20)
        self.descriptors: list[int] = []

    def ask(self, request_id: int = 1, op: str = "status", **fields: object) -> None:
        self.socket.sendall(encode({"id": request_id, "op": op, **fields}))

    def reply(self) -> dict[str, object] | None:
        """Return the next reply; None if the daemon has closed the connection."""
        while (frame := self.frames.next_frame()) is None:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(1 << 16, socket.CMSG_SPACE(4 * 128))
            except ConnectionResetError:
                return None
            if not data:
                return None
            for _, _, raw in ancillary:
                received = array.array("i")
                received.frombytes(raw)
                self.descriptors += received
            self.frames.feed(data)
        return frame

    def close(self) -> None:
        self.socket.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


class Served:
    """A UnixSocket with its mailbox, and the workers of one test."""

    def __init__(self, directory: str, **options: object) -> None:
        self.path = f"{directory}/cached.sock"
        self.mailbox = Mailbox()
        self.server = UnixSocket(listen(self.path), self.mailbox.lane, SystemClock(), **options)  # type: ignore[arg-type]
        self.server.start()
        self.workers: list[Worker] = []

    def worker(self) -> tuple[Worker, PeerId]:
        """Return a new worker and its id."""
        worker = self.knock()
        event = self.event()
        assert isinstance(event, Connected)
        return worker, event.peer

    def knock(self) -> Worker:
        worker = Worker(dial(self.path))
        self.workers.append(worker)
        return worker

    def worker_of_another_process(self) -> tuple[Worker, PeerId]:
        """Return one whose connection a child made: the kernel says so as long as it is open."""
        ours, theirs = socket.socketpair()
        code = (
            "import socket, sys; own, path = socket.socket(fileno=int(sys.argv[1])), sys.argv[2];"
            "made = socket.socket(socket.AF_UNIX); made.connect(path);"
            "socket.send_fds(own, [b'.'], [made.fileno()])"
        )
        with ours, theirs:
            child = [sys.executable, "-c", code, str(theirs.fileno()), self.path]
            subprocess.run(child, pass_fds=[theirs.fileno()], check=True)
            _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        worker = Worker(socket.socket(fileno=fd))
        self.workers.append(worker)
        event = self.event()
        assert isinstance(event, Connected)
        assert event.pid != os.getpid()
        return worker, event.peer

    def event(self) -> Event:
        event = self.mailbox.take(WAIT_S)
        assert event is not None
        return event

    def request(self) -> Requested:
        event = self.event()
        assert isinstance(event, Requested)
        return event

    def is_quiet(self) -> bool:
        """Return whether nothing is posted until the thread has gone round once more.

        Whatever the thread was woken for before this worker's knock is handled before it.
        """
        worker, peer = self.worker()
        worker.close()
        event = self.event()
        assert event == Disconnected(peer)
        return self.mailbox.count() == 0

    def answer(self, request: Requested, *descriptors: int, **body: object) -> None:
        self.server.send(Reply(request.peer, request.request_id, request.op, body), descriptors)

    def stop(self) -> None:
        self.server.stop()
        for worker in self.workers:
            worker.close()


@pytest.fixture
def directory() -> Iterator[str]:
    """Return a directory with a short name: pytest's own may be over the kernel's limit."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield name


@pytest.fixture
def served(directory: str) -> Iterator[Served]:
    served = Served(directory)
    yield served
    served.stop()


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def a_file(text: bytes = b"weights") -> int:
    into = os.memfd_create("test")
    os.write(into, text)
    return into


# --- events in, replies out


def test_a_worker_is_announced_with_its_uid_and_pid(served: Served):
    served.knock()
    assert served.event() == Connected(PeerId(1), os.geteuid(), os.getpid())


def test_a_request_becomes_an_event_and_its_reply_comes_back(served: Served):
    worker, peer = served.worker()
    worker.ask(7, "open", model="llm", tensors=["w"])
    request = served.request()
    assert request == Requested(peer, 7, "open", {"model": "llm", "tensors": ["w"]})
    served.answer(request, name="llm")
    assert worker.reply() == {"id": 7, "name": "llm"}


def test_replies_go_out_in_any_order_and_only_to_the_one_who_asked(served: Served):
    (one, _), (two, _) = served.worker(), served.worker()
    one.ask(1, "a")
    one.ask(2, "b")
    first, second = served.request(), served.request()
    two.ask(1, "c")
    third = served.request()
    for request in (third, second, first):
        served.answer(request, op=request.op)
    assert one.reply() == {"id": 2, "op": "b"}
    assert one.reply() == {"id": 1, "op": "a"}
    assert two.reply() == {"id": 1, "op": "c"}


def test_a_request_may_come_byte_by_byte_or_many_at_once(served: Served):
    worker, _ = served.worker()
    for byte in encode({"id": 1, "op": "slow"}):
        worker.socket.sendall(bytes([byte]))
    assert served.request().op == "slow"
    more = range(MAX_OUTSTANDING - 1)  # the slow one is not answered
    worker.socket.sendall(b"".join(encode({"id": n, "op": "fast"}) for n in more))
    assert [served.request().request_id for _ in more] == list(more)


def test_a_request_of_one_mebibyte_is_taken(served: Served):
    worker, _ = served.worker()
    filler = "x" * (MAX_REQUEST_BYTES - len('{"id":1,"op":"open","x":""}'))
    worker.ask(1, "open", x=filler)
    assert served.request().fields == {"x": filler}


def test_peer_ids_are_never_used_again(served: Served):
    peers = []
    for _ in range(50):
        worker, peer = served.worker()
        worker.close()
        assert served.event() == Disconnected(peer)
        peers.append(peer)
    assert peers == list(range(1, 51))


def test_thousands_of_workers_come_ask_and_go(served: Served):
    for n in range(1, 2001):
        worker = Worker(dial(served.path))
        worker.ask(n)
        assert isinstance(served.event(), Connected)
        served.answer(served.request())
        assert worker.reply() == {"id": n}
        worker.close()
        assert served.event() == Disconnected(PeerId(n))
    assert served.server.counts().connections == 0


def test_what_a_worker_sent_before_it_left_is_heard(served: Served):
    worker, peer = served.worker()
    worker.ask(1, "prefetch", model="llm")
    worker.close()
    assert served.request().op == "prefetch"
    assert served.event() == Disconnected(peer)


def test_a_worker_that_closes_its_sending_side_is_gone(served: Served):
    worker, peer = served.worker()
    worker.ask()
    worker.socket.shutdown(socket.SHUT_WR)
    served.request()
    assert served.event() == Disconnected(peer)
    assert worker.reply() is None


def test_a_forked_workers_connection_lives_until_both_have_closed(served: Served):
    worker, peer = served.worker()
    other = worker.socket.dup()
    worker.close()
    assert served.is_quiet()
    other.close()
    assert served.event() == Disconnected(peer)


# --- descriptors


def test_descriptors_arrive_with_their_frame_and_are_closed_here(served: Served):
    worker, _ = served.worker()
    worker.ask(1, "open")
    worker.ask(2, "descriptors")
    first, second = served.request(), served.request()
    before = open_descriptors()
    served.answer(first, a_file(b"one"), a_file(b"two"), name="llm")
    served.answer(second, a_file(b"three"))
    assert open_descriptors() == before
    assert worker.reply() == {"id": 1, "name": "llm", "fds": 2}
    assert worker.reply() == {"id": 2, "fds": 1}
    texts = [os.pread(descriptor, 10, 0) for descriptor in worker.descriptors]
    assert texts == [b"one", b"two", b"three"]


def test_the_descriptors_of_a_long_reply_come_with_its_first_byte(served: Served):
    worker, _ = served.worker()
    worker.ask(1, "open")
    served.answer(served.request(), a_file(), text="x" * (5 << 20))
    worker.frames.feed(worker.socket.recv(0))
    data, ancillary, _, _ = worker.socket.recvmsg(1, socket.CMSG_SPACE(4 * 128))
    assert len(ancillary) == 1
    worker.descriptors += array.array("i", ancillary[0][2])
    worker.frames.feed(data)
    reply = worker.reply()
    assert reply is not None
    assert len(str(reply["text"])) == 5 << 20


def test_descriptors_for_a_worker_that_has_gone_are_closed(served: Served):
    worker, peer = served.worker()
    worker.close()
    assert served.event() == Disconnected(peer)
    before = open_descriptors()
    served.server.send(Reply(peer, 1, "open", {}), (a_file(), a_file()))
    assert open_descriptors() == before


def test_a_worker_that_does_not_receive_descriptors_loses_its_connection(directory: str):
    served = Served(directory, max_in_flight=1024)
    worker, peer = served.worker()
    before = open_descriptors()
    for n in range(5):
        worker.ask(n, "descriptors")
        served.answer(served.request(), *[a_file() for _ in range(128)])
    assert served.event() == Disconnected(peer)
    assert served.server.counts().unread == 1
    assert len(open_descriptors()) < len(before) + 2
    served.stop()


def test_who_gets_no_files_because_others_do_not_receive_theirs_is_told_so(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    def full(descriptors: tuple[int, ...]) -> list[object]:
        if descriptors:  # what sendmsg raises: unix(7)
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        return []

    worker, peer = served.worker()
    monkeypatch.setattr(connection, "_ancillary", full)
    worker.ask(1, "open")
    served.answer(served.request(), a_file())

    reply = worker.reply()

    assert reply is not None
    assert reply["id"] is None
    assert "daemon_unavailable" in str(reply["error"])
    assert "ulimit -n" in str(reply["error"])
    assert worker.reply() is None
    assert served.event() == Disconnected(peer)  # and with it goes the lease


def test_a_worker_that_receives_its_descriptors_may_have_any_number(served: Served):
    worker, _ = served.worker()
    for n in range(20):
        worker.ask(n, "descriptors")
        served.answer(served.request(), *[a_file() for _ in range(128)])
        assert worker.reply() == {"id": n, "fds": 128}
        while worker.descriptors:
            os.close(worker.descriptors.pop())


def test_descriptors_are_not_kept_for_a_worker_that_is_slow_to_read(served: Served):
    worker, peer = served.worker()
    worker.ask(1, "open")
    worker.ask(2, "descriptors")
    first, second = served.request(), served.request()
    served.answer(first, text="x" * (1 << 20))
    before = open_descriptors()
    served.answer(second, a_file())
    assert served.event() == Disconnected(peer)
    assert len(open_descriptors()) <= len(before)


def test_descriptors_that_a_worker_sends_are_dropped(served: Served):
    worker, _ = served.worker()
    mine = a_file()
    socket.send_fds(worker.socket, [encode({"id": 1, "op": "status"})], [mine])
    before = open_descriptors()
    served.request()
    assert open_descriptors() == before
    os.close(mine)


# --- what breaks the protocol


MALFORMED = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n",
    "a frame that is too long": struct.pack(">I", MAX_REQUEST_BYTES + 1),
    "no JSON": struct.pack(">I", 3) + b"{]}",
    "no UTF-8": struct.pack(">I", 9) + b'{"a":"\xff"}',
    "an empty body": struct.pack(">I", 0),
    "no object": encode([1, 2]),  # type: ignore[arg-type]  # on purpose
    "endless nesting": struct.pack(">I", 200_000) + b"[" * 200_000,
    "an endless number": struct.pack(">I", 100_000) + b"1" * 100_000,
    "no id": encode({"op": "open"}),
    "no op": encode({"id": 1}),
    "an id that is text": encode({"id": "1", "op": "open"}),
    "an id that is a truth": encode({"id": True, "op": "open"}),
    "a negative id": encode({"id": -1, "op": "open"}),
    "an id that JavaScript cannot count to": encode({"id": 2**53, "op": "open"}),
    "an op that is a number": encode({"id": 1, "op": 2}),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_frame_that_breaks_the_protocol_ends_the_connection_with_a_reason(
    served: Served, case: str
):
    (worker, peer), (other, _) = served.worker(), served.worker()
    worker.socket.sendall(encode({"id": 1, "op": "fine"}) + MALFORMED[case])
    assert served.request().op == "fine"
    assert served.event() == Disconnected(peer)
    reply = worker.reply()
    assert reply is not None
    assert reply["id"] is None
    error = reply["error"]
    assert isinstance(error, dict)
    assert error["code"] == "bad_request"
    assert error["message"]
    assert worker.reply() is None
    assert served.server.counts().malformed == 1
    other.ask()
    assert served.request().op == "status"


def test_a_frame_that_never_ends_is_no_event(served: Served):
    worker, peer = served.worker()
    worker.socket.sendall(struct.pack(">I", 100) + b'{"id":')
    assert served.is_quiet()
    worker.close()
    assert served.event() == Disconnected(peer)
    assert served.server.counts().malformed == 0


def test_unfinished_requests_of_one_process_are_bounded_and_others_are_not_closed_for_them(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    unfinished = struct.pack(">I", MAX_REQUEST_BYTES) + b"x" * (MAX_REQUEST_BYTES - 1)
    other, _ = served.worker_of_another_process()
    other.socket.sendall(unfinished[:60_000])
    count = processes.MAX_BUFFERED_BYTES // 2 // len(unfinished) + 1
    workers = [served.worker() for _ in range(count)]
    for worker, _ in workers:
        worker.socket.sendall(unfinished)
    event = served.event()
    (closed,) = [worker for worker, peer in workers if event == Disconnected(peer)]
    assert "not whole" in str(closed.reply())
    other.socket.sendall(unfinished[60_000:])
    assert served.is_quiet()
    assert served.server.counts() == (len(workers), 0, 1, 0)


def test_small_pieces_of_requests_on_many_connections_count_as_well(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    served.server._processes._buffered = Shares(300)
    piece = struct.pack(">I", 100) + b"x" * 46
    workers = [served.worker() for _ in range(4)]
    for worker, _ in workers[:3]:
        worker.socket.sendall(piece)
    assert served.is_quiet()
    workers[3][0].socket.sendall(piece)
    assert served.event() == Disconnected(workers[3][1])
    for worker, peer in workers[:3]:
        worker.close()
        assert served.event() == Disconnected(peer)
    assert served.server._processes._buffered.free == 300


requests = st.builds(
    lambda request_id, op, fields: encode({**fields, "id": request_id, "op": op}),
    st.integers(0, 100),
    st.text(max_size=5),
    st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=5)),
)
pieces = st.one_of(
    requests,
    requests,
    requests,
    st.binary(max_size=20),
    st.binary(max_size=20).map(lambda raw: struct.pack(">I", len(raw)) + raw),
    st.sampled_from(list(MALFORMED.values())[:5]),
)


def expected(stream: bytes) -> list[tuple[int, str, dict[str, object]]]:
    """Return the requests in a stream, read naively, up to the first thing that is none."""
    found: list[tuple[int, str, dict[str, object]]] = []
    while len(stream) >= 4 and len(found) < MAX_OUTSTANDING:
        size = int.from_bytes(stream[:4], "big")
        if size > MAX_REQUEST_BYTES or len(stream) < 4 + size:
            break
        try:
            body = json.loads(stream[4 : 4 + size])
        except ValueError:
            break
        stream = stream[4 + size :]
        if not isinstance(body, dict):
            break
        fields = {key: value for key, value in body.items() if key not in {"id", "op"}}
        request_id, op = body.get("id"), body.get("op")
        if type(request_id) is not int or request_id < 0 or not isinstance(op, str):
            break
        found.append((request_id, op, fields))
    return found


def heard(served: Served, stream: bytes, cuts: list[int]) -> list[object]:
    """Send bytes in pieces; return what became of them."""
    worker, peer = served.worker()
    bounds = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    with suppress(BrokenPipeError):  # refused before the rest was sent
        for start, stop in pairwise(bounds):
            worker.socket.sendall(stream[start:stop])
    worker.close()
    found: list[object] = []
    while (event := served.event()) != Disconnected(peer):
        assert isinstance(event, Requested)
        assert event.peer == peer
        found.append((event.request_id, event.op, event.fields))
    return found


@given(chosen=st.lists(pieces, max_size=12), cuts=st.lists(st.integers(0, 400), max_size=6))
def test_any_bytes_become_the_requests_that_are_in_them_and_nothing_else(
    served_by_all: Served, chosen: list[bytes], cuts: list[int]
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "BURST_S", 1e9)  # who goes while it rests is not heard
        found = heard(served_by_all, b"".join(chosen), cuts)
    assert found == expected(b"".join(chosen))


@pytest.fixture(scope="module")
def served_by_all() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        served = Served(directory)
        yield served
        served.stop()


# --- no peer holds up another


def test_at_most_64_requests_of_a_worker_are_outstanding(served: Served):
    worker, _ = served.worker()
    count = 1000
    worker.socket.sendall(b"".join(encode({"id": n, "op": "a"}) for n in range(count)))
    waiting = [served.request() for _ in range(MAX_OUTSTANDING)]
    assert served.is_quiet()
    for n in range(MAX_OUTSTANDING, count):
        served.answer(waiting.pop(0))
        assert worker.reply() == {"id": n - MAX_OUTSTANDING}
        waiting.append(served.request())
        assert waiting[-1].request_id == n


def test_a_worker_that_is_held_back_wakes_nobody(served: Served):
    worker, _ = served.worker()
    worker.socket.sendall(encode({"id": 1, "op": "a"}) * 10_000)
    waiting = [served.request() for _ in range(MAX_OUTSTANDING)]
    assert served.is_quiet()
    (fd,) = served.server._by_fd
    watched = Path(f"/proc/self/fdinfo/{served.server._epoll.fileno()}").read_text()
    (mask,) = re.findall(rf"^tfd: +{fd} events: +(\w+)", watched, re.MULTILINE)
    assert not int(mask, 16) & (select.EPOLLIN | select.EPOLLOUT)
    served.answer(waiting[0])
    served.request()


def test_a_worker_may_send_any_amount_of_finished_requests(served: Served):
    worker, _ = served.worker()
    for n in range(processes.MAX_BUFFERED_BYTES // MAX_REQUEST_BYTES + 2):
        worker.ask(n, "open", filler="x" * (MAX_REQUEST_BYTES - 100))
        served.answer(served.request())
        assert worker.reply() == {"id": n}


def test_a_worker_that_floods_does_not_delay_another(served: Served):
    (flooding, peer), (other, _) = served.worker(), served.worker()
    flooding.socket.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            flooding.socket.send(encode({"id": 1, "op": "open"}) * 100)
    other.ask(2, "mine")
    before = 0
    while (request := served.request()).op != "mine":
        assert request.peer == peer
        before += 1
    assert before <= MAX_OUTSTANDING
    served.answer(request)
    assert other.reply() == {"id": 2}


def waiting_in(served: Served) -> int:
    """How many connections of this process wait for their turn."""
    return len(served.server._processes.of(os.geteuid(), os.getpid())._held)


def test_the_connections_of_a_process_that_floods_are_answered_in_turn(served: Served):
    workers = [served.worker()[0] for _ in range(41)]
    first = workers.pop()
    first.socket.sendall(encode({"id": 0, "op": "first"}) * MAX_AHEAD)
    while served.mailbox.count() < MAX_AHEAD:
        pass
    for worker in workers:
        worker.socket.sendall(b"".join(encode({"id": n, "op": "a"}) for n in range(5)))
    while waiting_in(served) < len(workers):
        pass
    most = 0
    turns = []
    for _ in range(MAX_AHEAD + len(workers) * 5):
        most = max(most, served.mailbox.count())
        request = served.request()
        turns.append(request.peer)
        served.answer(request)
    assert most <= MAX_AHEAD
    for at in range(MAX_AHEAD, len(turns), len(workers)):
        assert len(set(turns[at : at + len(workers)])) == len(workers)
    for worker in workers:
        assert [worker.reply() for _ in range(5)] == [{"id": n} for n in range(5)]
    assert served.is_quiet()


def test_newcomers_of_a_process_that_floods_come_in_turn(served: Served):
    worker, _ = served.worker()
    worker.socket.sendall(encode({"id": 1, "op": "a"}) * MAX_OUTSTANDING)
    while served.mailbox.count() < MAX_AHEAD:
        pass
    newcomers = [served.knock() for _ in range(30)]
    for newcomer in newcomers[1::2]:
        newcomer.ask(2, "b")
    for newcomer in newcomers[::2]:
        newcomer.close()
    while len(served.server._peers) != 1 + 15 or waiting_in(served) != 15:
        pass  # who has gone gives its place back before its turn
    for _ in range(MAX_OUTSTANDING):
        assert served.request().op == "a"
    events = [served.event() for _ in range(15 + 15)]
    came, asked = (
        [event.peer for event in events if isinstance(event, kind)]
        for kind in (Connected, Requested)
    )
    assert sorted(asked) == sorted(came)
    assert len(came) == 15
    assert served.is_quiet()


def test_who_rests_is_heard_again_when_nothing_else_happens(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    """Its request waits unread, and no poll sees the end of the rest."""
    monkeypatch.setattr(processes, "REST", 50)
    worker, _ = served.worker()
    worker.ask(1, "a", more=[[]] * 4000)
    worker.ask(2, "b")
    began_s = time.monotonic()
    assert served.request().op == "a"
    assert served.request().op == "b"
    assert time.monotonic() - began_s > 50 * processes.LONG_S


def test_a_rest_that_is_prolonged_while_its_end_is_noted_ends_as_well(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    """Nobody woke the thread then: it slept until somebody else did something."""
    worker, _ = served.worker()
    (connection,) = served.server._peers.values()
    process = connection.process
    looked = vars(processes.Process)["rest_s"].fget

    def rest_s(self: processes.Process) -> float:
        left_s: float = looked(self)
        if not left_s and self in served.server._resting:
            monkeypatch.setattr(processes.Process, "rest_s", property(looked))
            self.spent(0.02)  # as the mailbox's thread may, in this moment
        return left_s

    process.spent(0.02)
    worker.ask(1, "a")
    monkeypatch.setattr(processes.Process, "rest_s", property(rest_s))
    assert served.request().op == "a"


def test_who_trickles_unfinished_requests_on_many_connections_rests(served: Served):
    """Nothing of it was ever a request, so it had no turn to wait for."""
    workers = [served.worker()[0] for _ in range(20)]
    for worker in workers:
        worker.socket.sendall(struct.pack(">I", MAX_REQUEST_BYTES))
    process = next(iter(served.server._peers.values())).process
    began_s = time.monotonic()
    while not process.rest_s:
        for worker in workers:
            worker.socket.sendall(b"x")
        assert time.monotonic() - began_s < WAIT_S


def test_many_closed_connections_are_let_go_of_at_once_when_their_process_goes(directory: str):
    """Each is named only once by the poll, also where others of its process were looked at."""
    served = Served(directory)
    count = server.LOOKS_PER_ROUND + 20
    workers = [served.worker()[0] for _ in range(count)]
    for worker in workers:
        worker.ask(1, "descriptors")
        served.answer(served.request(), a_file())
    for worker in workers:
        worker.socket.sendall(b"\xff" * 8)
    for _ in workers:
        assert isinstance(served.event(), Disconnected)
    assert len(served.server._by_fd) == count
    for worker in workers:
        worker.close()
    began_s = time.monotonic()
    while served.server._by_fd:
        assert time.monotonic() - began_s < WAIT_S
    served.stop()


def test_who_receives_what_was_sent_before_it_was_closed_lets_go_of_it(directory: str):
    served = Served(directory)
    worker, peer = served.worker()
    assert sent(served, worker, 5)
    worker.socket.sendall(b"\xff" * 8)
    assert served.event() == Disconnected(peer)
    while worker.reply() is not None:
        pass
    began_s = time.monotonic()
    while served.server._by_fd:
        assert time.monotonic() - began_s < WAIT_S
    served.stop()


def test_who_rests_for_what_was_handled_while_others_waited_for_their_turn_is_heard_again(
    served: Served,
):
    worker, _ = served.worker()
    other, _ = served.worker()
    worker.socket.sendall(encode({"id": 1, "op": "a"}) * MAX_AHEAD)
    while served.mailbox.count() < MAX_AHEAD:
        pass
    other.ask(2, "b")
    while not any(each.is_parked for each in list(served.server._peers.values())):
        pass
    for _ in range(MAX_AHEAD):
        served.request()
        began_s = time.thread_time()
        while time.thread_time() - began_s < 2 * processes.LONG_S:
            pass
    assert served.request().op == "b"


def test_connections_that_wait_for_their_turn_do_not_wait_for_one_that_is_silent(served: Served):
    worker, _ = served.worker()
    worker.socket.sendall(encode({"id": 1, "op": "a"}) * MAX_OUTSTANDING)
    while served.mailbox.count() < MAX_AHEAD:
        pass
    for _ in range(2 * MAX_AHEAD):
        served.knock()  # and says nothing
    other = served.knock()
    other.ask(2, "b")
    event = served.event()
    while not (isinstance(event, Requested) and event.op == "b"):
        event = served.event()
    served.answer(event)
    assert other.reply() == {"id": 2}


def test_a_worker_that_leaves_while_it_may_not_send_more_is_noticed(served: Served):
    worker, peer = served.worker()
    worker.socket.sendall(encode({"id": 1, "op": "a"}) * (MAX_OUTSTANDING + 1))
    for _ in range(MAX_OUTSTANDING):
        served.request()
    worker.close()
    assert served.event() == Disconnected(peer)


def test_a_worker_that_never_reads_loses_its_connection_and_no_other_is_held_up(served: Served):
    (deaf, peer), (other, _) = served.worker(), served.worker()
    answered = 0
    body = {"text": "x" * 1000}
    deaf.socket.setblocking(False)
    while True:
        with suppress(BlockingIOError, BrokenPipeError):
            deaf.ask(1, "deaf")
        event = served.event()
        if event == Disconnected(peer):
            break
        assert isinstance(event, Requested)
        served.answer(event, **body)
        answered += 1
        if answered % 50 == 0:
            other.ask(2, "other")
            served.answer(served.request())
            assert other.reply() == {"id": 2}
    kept_bytes = answered * 1000
    assert kept_bytes < 2 << 20
    assert served.server.counts().unread == 1


def test_a_worker_that_reads_slowly_gets_everything_in_order(served: Served):
    worker, _ = served.worker()
    for n in range(3):
        worker.ask(n, "open")
    asked = [served.request() for _ in range(3)]
    served.answer(asked[0], text="x" * (3 << 20))
    served.answer(asked[1])  # has to wait behind the rest of the first
    first = worker.reply()
    assert first is not None
    assert len(str(first["text"])) == 3 << 20
    assert worker.reply() == {"id": 1}
    served.answer(asked[2], a_file())
    assert worker.reply() == {"id": 2, "fds": 1}


def test_a_worker_that_reads_slowly_again_and_again_stays(served: Served):
    worker, _ = served.worker()
    for n in range(0, 8, 2):
        worker.ask(n)
        worker.ask(n + 1)
        asked = [served.request(), served.request()]
        for request in asked:
            served.answer(request, text="x" * (1 << 20))
        for request in asked:
            assert (worker.reply() or {})["id"] == request.request_id


def test_nothing_more_is_heard_of_a_worker_that_lost_its_connection(directory: str):
    served = Served(directory, max_in_flight=1024)
    worker, peer = served.worker()
    answers = 1024 // 2 // 128 + 1
    worker.socket.sendall(encode({"id": 1, "op": "descriptors"}) * (MAX_OUTSTANDING + 2 * answers))
    waiting = [served.request() for _ in range(MAX_OUTSTANDING)]
    for request in waiting[: answers - 1]:
        served.answer(request, *[a_file() for _ in range(128)])
        served.request()
        assert served.is_quiet()
    served.answer(waiting[answers - 1], *[a_file() for _ in range(128)])
    assert served.event() == Disconnected(peer)
    served.stop()


def sent(served: Served, worker: Worker, count: int) -> bool:
    """Answer a worker with descriptors; return whether its connection bore it."""
    worker.ask(1, "descriptors")
    served.answer(served.request(), *[a_file() for _ in range(count)])
    return served.is_quiet()


def test_descriptors_that_one_process_does_not_receive_count_over_all_its_connections(
    directory: str,
):
    """The kernel counts those of all: four connections with as many each shut everybody out."""
    served = Served(directory, max_in_flight=100)
    (first, _), (second, peer), (third, _) = (served.worker() for _ in range(3))
    other, _ = served.worker_of_another_process()
    assert sent(served, first, 25)
    assert sent(served, second, 25)
    third.ask(1, "descriptors")
    served.answer(served.request(), a_file())
    assert isinstance(served.event(), Disconnected)
    assert "nobody received" in str(third.reply())
    assert served.server.counts().unread == 1
    assert sent(served, other, 25)
    assert first.reply() is not None  # receives all of them
    assert sent(served, second, 1)
    assert (len(first.descriptors), peer) == (25, PeerId(2))
    served.stop()


def test_a_closed_connection_counts_until_its_descriptors_are_received(directory: str):
    """Else a process would fill one, have it closed for garbage, and fill the next."""
    served = Served(directory, max_in_flight=100)
    worker, peer = served.worker()
    before = open_descriptors()
    assert sent(served, worker, 50)
    worker.socket.sendall(b"\xff" * 8)
    assert served.event() == Disconnected(peer)
    second, _ = served.worker()
    second.ask(1, "descriptors")
    served.answer(served.request(), a_file())
    assert isinstance(served.event(), Disconnected)
    assert worker.reply() is not None
    worker.close()
    third, _ = served.worker()
    assert sent(served, third, 50)
    second.close()
    third.close()
    assert served.event() == Disconnected(PeerId(4))
    served.stop()
    assert len(open_descriptors() - before) == 0


def test_a_closed_connection_is_let_go_of_when_the_process_goes(directory: str):
    served = Served(directory, max_connections=4)
    worker, peer = served.worker()
    assert sent(served, worker, 5)
    worker.socket.sendall(b"\xff" * 8)
    assert served.event() == Disconnected(peer)
    assert [each.peer for each in served.server._by_fd.values()] == [peer]
    worker.close()
    assert served.is_quiet()
    assert not served.server._by_fd
    served.stop()


def test_a_worker_that_left_too_much_unread_loses_its_connection(served: Served):
    worker, peer = served.worker()
    for n in range(4):
        worker.ask(n)
    asked = [served.request() for _ in range(4)]
    for request in asked[:3]:  # a long one, one that waits behind it, one too much
        served.answer(request, text="x" * (1 << 20))
    assert served.event() == Disconnected(peer)
    assert served.server.counts().unread == 1
    served.answer(asked[3])


def test_what_the_workers_of_a_process_leave_unread_is_bounded(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server, "MAX_UNSENT_BYTES", 6 << 20)
    workers = [served.worker() for _ in range(3)]
    for worker, _ in workers[:2]:
        worker.ask()
        served.answer(served.request(), text="x" * (2 << 20))
    assert served.event() == Disconnected(workers[1][1])
    assert workers[0][0].reply() is not None
    workers[2][0].ask()
    served.answer(served.request(), text="x" * (2 << 20))
    assert workers[2][0].reply() is not None


def test_who_keeps_replies_unread_leaves_as_much_for_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    """It was the next one to be answered whose connection was closed, whoever that was."""
    monkeypatch.setattr(server, "MAX_UNSENT_BYTES", 6 << 20)
    hoarder, _ = served.worker()
    other, _ = served.worker_of_another_process()
    for worker, size_bytes in ((hoarder, 5 << 19), (other, 3 << 19)):
        worker.ask()
        served.answer(served.request(), text="x" * size_bytes)
    assert served.is_quiet()
    assert other.reply() is not None


def test_a_reply_over_the_limit_becomes_an_error_without_descriptors(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connection, "MAX_REPLY_BYTES", 1000)
    worker, _ = served.worker()
    worker.ask(1, "open")
    served.answer(served.request(), a_file(), text="x" * 1000)
    reply = worker.reply()
    assert reply is not None
    assert reply["id"] == 1
    assert "at most 1000 are allowed" in str(reply["error"])
    assert "fds" not in reply
    assert worker.descriptors == []


def test_a_reply_to_a_worker_that_has_just_died_is_no_error(served: Served):
    worker, peer = served.worker()
    worker.ask(1)
    request = served.request()
    worker.socket.shutdown(socket.SHUT_RD)
    for _ in range(3):
        served.answer(request)
    assert served.event() == Disconnected(peer)
    assert served.server.counts().unread == 0


# --- who may connect


def test_more_connections_than_allowed_are_told_so(directory: str):
    served = Served(directory, max_connections=2)
    (first, peer), _ = served.worker(), served.worker()
    refused = served.knock()
    reply = refused.reply()
    assert reply is not None
    assert reply["id"] is None
    error = reply["error"]
    assert isinstance(error, dict)
    assert error["code"] == "daemon_unavailable"
    assert error["message"].startswith(
        "too many connections are open: 2 in all, of one process fewer"
    )
    assert refused.reply() is None
    first.close()
    assert served.event() == Disconnected(peer)
    assert served.worker()[1] == 3
    assert served.server.counts() == (2, 1, 0, 0)
    served.stop()


class Strict:
    """A listening socket that admits nobody."""

    def __init__(self, path: str) -> None:
        self._inner = listen(path)
        self.socket = self._inner.socket

    def admits(self, uid: int, gid: int) -> bool:
        assert (uid, gid) == (os.geteuid(), os.getegid())
        return False

    def has_place(self, uid: int, count: int, of_uid: int, of_process: int, most: int) -> bool:
        raise AssertionError("asked for somebody who may not connect")

    def close(self) -> None:
        self._inner.close()


def test_a_peer_that_is_not_admitted_is_told_so(directory: str):
    path = f"{directory}/cached.sock"
    mailbox = Mailbox()
    server = UnixSocket(Strict(path), mailbox.lane, SystemClock())
    server.start()
    worker = Worker(dial(path))
    reply = worker.reply()
    assert reply is not None
    assert "not_permitted" in str(reply["error"])
    assert worker.reply() is None
    worker.close()
    server.stop()
    assert mailbox.count() == 0


class OutOfDescriptors(socket.socket):
    """Fails to accept as a process does that has no descriptor left."""

    failures = 2

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_a_process_without_a_free_descriptor_accepts_later(directory: str):
    listening = listen(f"{directory}/cached.sock")
    listening.socket = OutOfDescriptors(fileno=listening.socket.detach())
    mailbox = Mailbox()
    server = UnixSocket(listening, mailbox.lane, SystemClock())
    server.start()
    worker = Worker(dial(f"{directory}/cached.sock"))
    assert isinstance(mailbox.take(WAIT_S), Connected)
    assert listening.socket.failures == 0
    worker.close()
    server.stop()


# --- the end


def test_stop_ends_the_thread_closes_all_and_removes_the_socket(directory: str):
    before, threads = open_descriptors(), set(threading.enumerate())
    served = Served(directory)
    (worker, _), _ = served.worker(), served.worker()
    (thread,) = set(threading.enumerate()) - threads
    assert thread.name == "cached-epoll"
    served.server.stop()
    served.server.stop()
    assert worker.reply() is None
    assert not thread.is_alive()
    assert list(Path(directory).iterdir()) == []
    served.stop()
    assert open_descriptors() == before
    assert served.mailbox.count() == 0


def test_what_was_sent_before_the_stop_can_still_be_read(served: Served):
    worker, _ = served.worker()
    worker.ask(1)
    served.answer(served.request(), last=True)
    served.server.stop()
    assert worker.reply() == {"id": 1, "last": True}
    assert worker.reply() is None


def test_a_reply_after_the_stop_closes_its_descriptors(served: Served):
    worker, peer = served.worker()
    served.server.stop()
    before = open_descriptors()
    served.server.send(Reply(peer, 1, "open", {}), (a_file(),))
    assert open_descriptors() == before
    assert worker.reply() is None


def test_a_socket_that_was_never_started_can_be_stopped(directory: str):
    before = open_descriptors()
    UnixSocket(listen(f"{directory}/cached.sock"), Mailbox().lane, SystemClock()).stop()
    assert open_descriptors() == before


def work(path: str, name: int) -> list[object]:
    """Ask more at each of 10 connections; return the replies that are not one's own."""
    wrong: list[object] = []
    for turn in range(10):
        worker = Worker(dial(path))
        asked = [[name, turn, n] for n in range(10 * turn)]
        for n, what in enumerate(asked):
            worker.ask(n, "echo", what=what)
        if name % 4:  # the others leave early
            replies = [worker.reply() for _ in asked]
            if replies != [{"id": n, "what": what} for n, what in enumerate(asked)]:
                wrong.append(replies)
        worker.close()
    return wrong


def test_many_workers_at_once_get_their_own_replies(served: Served):
    present: set[PeerId] = set()
    gone: set[PeerId] = set()
    with ThreadPool(16) as pool:
        working = pool.starmap_async(work, [(served.path, name) for name in range(16)])
        while not (working.ready() and present == gone and served.server.counts().connections == 0):
            event = served.mailbox.take(0.01)
            if event is None:
                continue
            if isinstance(event, Connected):
                present.add(event.peer)
            elif isinstance(event, Disconnected):
                gone.add(event.peer)
            else:
                assert isinstance(event, Requested)
                assert event.peer in present - gone
                served.answer(event, what=event.fields["what"])
        assert working.get(WAIT_S) == [[]] * 16
    assert len(present) >= 12 * 9, "all who asked and waited; who left early may not be noticed"


def test_it_is_light():
    code = (
        "import sys, cached.adapters.unix_socket, cached.adapters.listening_socket\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"asyncio", "logging", "dataclasses", "http.client", "urllib.request", "aiohttp"}
    assert heavy & set(done.stdout.split()) == set()
