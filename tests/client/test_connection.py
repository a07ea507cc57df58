"""Many threads share a connection; each gets its own reply, or a typed error, in time."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from cached.client.connection import MAX_WAITS, Connection
from cached.client.deadline import Deadline
from cached.core import wire
from cached.core.errors import (
    BadRequest,
    DaemonUnavailable,
    FrameError,
    ModelUnknown,
    NotPermitted,
    ProtocolMismatch,
    TimedOut,
)
from tests.fakes.local_daemon import ScriptedDaemon, open_descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fakes.local_daemon import Calls

    Pair = tuple[Connection, ScriptedDaemon]

NEVER = Deadline(None)
NOBODY = 65534


def descriptors(count: int) -> tuple[int, ...]:
    return tuple(os.open(os.devnull, os.O_RDONLY) for _ in range(count))


def send_and_close(daemon: ScriptedDaemon, body: dict[str, object], sent: tuple[int, ...]) -> None:
    daemon.send(body, sent)
    for descriptor in sent:
        os.close(descriptor)


def test_a_call_returns_the_reply_with_its_descriptors(pair: Pair, call: Calls):
    connection, daemon = pair
    calling = call(connection.call, "open", {"model": "m"}, NEVER)
    request = daemon.expect("open")
    assert request["model"] == "m"
    send_and_close(daemon, {"id": request["id"], "fds": 2, "x": [1]}, descriptors(2))
    reply = calling.result()
    assert reply.body["x"] == [1]
    assert len(reply.descriptors) == 2
    for descriptor in reply.descriptors:
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)


def test_replies_may_come_in_any_order_and_in_pieces(pair: Pair, call: Calls):
    connection, daemon = pair
    callings = [call(connection.call, "wait", {"n": n}, NEVER) for n in range(10)]
    requests = [daemon.expect("wait") for _ in callings]
    for request in sorted(requests, key=lambda request: -request["n"]):
        for byte in wire.encode({"id": request["id"], "n": request["n"]}):
            daemon.send_bytes(bytes([byte]))
    assert [calling.result().body["n"] for calling in callings] == list(range(10))


def test_the_thread_that_has_its_reply_hands_the_reading_over(pair: Pair, call: Calls):
    connection, daemon = pair
    slow = call(connection.call, "slow", {}, NEVER)
    slow_id = daemon.expect("slow")["id"]
    for _ in range(3):  # whoever reads: all but the slow one get on
        quick = call(connection.call, "quick", {}, NEVER)
        daemon.send({"id": daemon.expect("quick")["id"]})
        quick.result()
    assert not slow.done()
    late = call(connection.call, "late", {}, NEVER)
    late_id = daemon.expect("late")["id"]
    daemon.send({"id": slow_id})  # the reader, maybe: then the other must read
    slow.result()
    daemon.send({"id": late_id})
    late.result()


def test_a_reader_that_times_out_hands_the_reading_over(pair: Pair, call: Calls):
    connection, daemon = pair
    with pytest.raises(TimedOut):
        connection.call("first", {}, Deadline(0.01))
    first = daemon.expect("first")
    waiting = call(connection.call, "second", {}, NEVER)
    assert daemon.expect("cancel")["request"] == first["id"]
    daemon.send({"id": daemon.expect("second")["id"], "ok": True})
    assert waiting.result().body["ok"]


def test_a_time_out_says_what_for_and_tells_the_daemon(pair: Pair):
    connection, daemon = pair
    with pytest.raises(TimedOut) as caught:
        connection.call("wait", {}, Deadline(0.01), "tensor 'w' of llm")
    assert caught.value.message == "waited 0.01 s for tensor 'w' of llm in vain"
    assert "timeout_s" in caught.value.hint
    assert isinstance(caught.value, TimeoutError)
    waited = daemon.expect("wait")
    assert daemon.expect("cancel")["request"] == waited["id"]


def test_many_waits_leave_room_for_other_requests_and_take_turns(pair: Pair, call: Calls):
    connection, daemon = pair
    waits = [
        threading.Thread(target=connection.call, args=("wait", {}, NEVER))
        for _ in range(MAX_WAITS + 3)
    ]
    for wait in waits:
        wait.start()
    waiting = [daemon.expect("wait") for _ in range(MAX_WAITS)]
    checking = call(connection.call, "check", {}, NEVER)
    check = daemon.expect("check")
    daemon.send({"id": check["id"], "stale": False})
    assert checking.result().body["stale"] is False
    for request in waiting:
        daemon.send({"id": request["id"]})
    for _ in range(3):
        daemon.send({"id": daemon.expect("wait")["id"]})
    for wait in waits:
        wait.join()


def test_a_wait_whose_turn_does_not_come_ends_in_time_and_costs_no_turn(pair: Pair, call: Calls):
    connection, daemon = pair
    waits = [
        threading.Thread(target=connection.call, args=("arrivals", {}, NEVER))
        for _ in range(MAX_WAITS)
    ]
    for wait in waits:
        wait.start()
    waiting = [daemon.expect("arrivals") for _ in range(MAX_WAITS)]
    with pytest.raises(TimedOut, match=r"waited 0\.01 s for tensor 'w' in vain"):
        connection.call("wait", {}, Deadline(0.01), "tensor 'w'")
    for request in waiting:
        daemon.send({"id": request["id"]})
    for wait in waits:
        wait.join()
    assert daemon.is_quiet()
    last = call(connection.call, "wait", {}, NEVER)
    daemon.send({"id": daemon.expect("wait")["id"], "complete": True})
    assert last.result().body["complete"] is True


def test_all_waits_that_time_out_at_once_are_given_up(pair: Pair):
    connection, daemon = pair

    def wait() -> None:
        with pytest.raises(TimedOut):
            connection.call("wait", {}, Deadline(0.05))

    waits = [threading.Thread(target=wait) for _ in range(MAX_WAITS)]
    for thread in waits:
        thread.start()
    for thread in waits:
        thread.join()
    asked = [daemon.read() for _ in range(2 * MAX_WAITS)]
    given_up = {frame["request"] for frame in asked if frame["op"] == "cancel"}
    assert given_up == {frame["id"] for frame in asked if frame["op"] == "wait"}


def test_a_late_reply_is_dropped_and_its_descriptors_are_closed(pair: Pair, call: Calls):
    connection, daemon = pair
    before = open_descriptors()
    with pytest.raises(TimedOut):
        connection.call("descriptors", {}, Deadline(0.01))
    late = daemon.expect("descriptors")
    daemon.expect("cancel")
    send_and_close(daemon, {"id": late["id"], "fds": 3}, descriptors(3))
    calling = call(connection.call, "next", {}, NEVER)
    daemon.send({"id": daemon.expect("next")["id"], "n": 1})
    assert calling.result().body["n"] == 1
    assert open_descriptors() == before


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt: a shell's job in the background is begun without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_call_is_given_up_like_one_that_timed_out(
    pair: Pair, call: Calls, ctrl_c: None
):
    connection, daemon = pair
    main = threading.get_ident()

    def interrupt() -> int:
        request_id: int = daemon.expect("wait")["id"]
        signal.pthread_kill(main, signal.SIGINT)
        daemon.send({})  # should the signal have come just before the system call
        return request_id

    interrupting = call(interrupt)
    with pytest.raises(KeyboardInterrupt):
        connection.call("wait", {}, NEVER)
    assert daemon.expect("cancel")["request"] == interrupting.result()
    before = open_descriptors()
    send_and_close(daemon, {"id": interrupting.result(), "fds": 1}, descriptors(1))
    calling = call(connection.call, "next", {}, NEVER)
    daemon.send({"id": daemon.expect("next")["id"]})
    calling.result()
    assert open_descriptors() == before


def test_an_error_reply_is_raised_as_its_type(pair: Pair, call: Calls):
    connection, daemon = pair
    calling = call(connection.call, "open", {}, NEVER)
    error = ModelUnknown("no model 'x'", hint="there is 'y'")
    body = {"id": daemon.expect("open")["id"], "fds": 1, **wire.error_body(error)}
    before = open_descriptors()
    send_and_close(daemon, body, descriptors(1))
    with pytest.raises(ModelUnknown, match="no model 'x'; there is 'y'"):
        calling.result()
    assert open_descriptors() == before


@pytest.mark.parametrize("threads", [1, 5])
def test_the_end_of_the_daemon_reaches_all_who_wait_and_all_who_come_later(
    pair: Pair, call: Calls, threads: int
):
    connection, daemon = pair
    callings = [call(connection.call, "wait", {}, NEVER) for _ in range(threads)]
    for _ in callings:
        daemon.expect("wait")
    daemon.close()
    for calling in callings:
        with pytest.raises(DaemonUnavailable, match="at /the/socket closed the connection"):
            calling.result(timeout=5)
    with pytest.raises(DaemonUnavailable, match="open the model again"):
        connection.call("wait", {}, NEVER)


@pytest.mark.parametrize("mine", [2, 0])
def test_another_major_number_of_the_daemon_is_a_mismatch_that_names_both(mine: int):
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection, daemon = Connection(ours, "x"), ScriptedDaemon(theirs)
    daemon.greet(protocol=[mine, 3])
    with pytest.raises(ProtocolMismatch, match=rf"daemon speaks protocol {mine}\.3, the client 1"):
        connection.call("open", {}, NEVER)
    connection.close()
    daemon.close()


def test_a_daemon_that_refuses_our_major_number_is_a_mismatch(call: Calls):
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection, daemon = Connection(ours, "x"), ScriptedDaemon(theirs)
    calling = call(connection.call, "open", {}, NEVER)
    refused = wire.error_body(ProtocolMismatch("1.0 and 2.0", hint="upgrade the client"))
    daemon.send({"id": daemon.expect("hello")["id"], **refused})
    after = wire.error_body(BadRequest("the first request must be hello"))
    daemon.send({"id": daemon.expect("open")["id"], **after})
    with pytest.raises(ProtocolMismatch, match="upgrade the client"):
        calling.result()
    connection.close()
    daemon.close()


def test_the_answer_to_the_greeting_can_be_had(pair: Pair):
    assert pair[0].greeted(NEVER)["daemon"] == "0"


def test_a_daemon_that_closes_at_once_is_heard_out():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    daemon = ScriptedDaemon(theirs)
    daemon.send({"id": None, **wire.error_body(NotPermitted("uid 7 may not connect"))})
    daemon.close()
    connection = Connection(ours, "x")
    with pytest.raises(NotPermitted, match="uid 7"):
        connection.call("open", {}, NEVER)
    connection.close()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (wire.encode({"id": 1, "fds": 1}), "1 descriptors were announced, 0 came"),
        (wire.encode({"id": 1, "fds": -1}), "-1 descriptors were announced"),
        (wire.encode({"id": 1, "fds": "x"}), "'x' descriptors were announced"),
        (b"\xff\xff\xff\xff", "at most"),
        (b"\0\0\0\1{", "is not JSON"),
    ],
)
def test_nonsense_is_a_frame_error_for_all(pair: Pair, call: Calls, said: bytes, reason: str):
    connection, daemon = pair
    calling = call(connection.call, "open", {}, NEVER)
    daemon.expect("open")
    daemon.send_bytes(said)
    for _ in range(2):
        with pytest.raises(FrameError, match=reason):
            calling.result()
        calling = call(connection.call, "open", {}, NEVER)
        assert daemon.expect("open")
    with pytest.raises(FrameError):
        calling.result()


def test_replies_that_nobody_asked_for_are_ignored(pair: Pair, call: Calls):
    connection, daemon = pair
    before = open_descriptors()
    for request_id in (99, "x", [1], None, True):
        send_and_close(daemon, {"id": request_id, "fds": 1}, descriptors(1))
    calling = call(connection.call, "open", {}, NEVER)
    daemon.send({"id": daemon.expect("open")["id"]})
    calling.result()
    assert open_descriptors() == before


def test_closing_closes_descriptors_that_nobody_took():
    before = open_descriptors()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection, daemon = Connection(ours, "x"), ScriptedDaemon(theirs)
    send_and_close(daemon, {"id": 0, "fds": 2, "protocol": [1, 0]}, descriptors(2))
    daemon.send_bytes(b"\0")
    with pytest.raises(TimedOut):
        connection.call("open", {}, Deadline(0.01))
    connection.close()
    daemon.close()
    assert open_descriptors() == before


def test_a_request_that_is_too_long_is_refused_before_it_is_sent(pair: Pair):
    connection, daemon = pair
    with pytest.raises(BadRequest, match="name fewer tensors"):
        connection.call("open", {"tensors": ["x" * wire.MAX_REQUEST_BYTES]}, NEVER)
    assert daemon.is_quiet()


def test_a_daemon_that_does_not_read_cannot_outlast_the_deadline(pair: Pair):
    connection, _ = pair
    long = {"tensors": ["x" * 100_000]}
    with pytest.raises((TimedOut, DaemonUnavailable)):  # noqa: PT012 - one of the calls
        for _ in range(100):
            connection.call("open", long, Deadline(0.02))


def test_a_connection_is_lost_when_the_daemon_has_closed_it(pair: Pair):
    connection, daemon = pair
    connection.greeted(NEVER)
    assert not connection.is_lost
    daemon.send({"id": 99})  # nobody asked
    assert not connection.is_lost
    daemon.close()
    assert connection.is_lost


def test_a_connection_that_has_failed_is_lost(pair: Pair):
    connection, daemon = pair
    daemon.send({"id": None, "error": {"code": "daemon_unavailable", "message": "too many"}})
    with pytest.raises(DaemonUnavailable, match="too many"):
        connection.call("check", {}, NEVER)
    assert connection.is_lost


def test_a_retired_connection_is_closed_when_its_last_call_has_ended(pair: Pair, call: Calls):
    connection, daemon = pair
    callings = [call(connection.call, "wait", {"n": n}, NEVER) for n in range(2)]
    requests = [daemon.expect("wait") for _ in callings]
    connection.retire()
    for request in sorted(requests, key=lambda request: int(request["n"])):
        assert connection.socket.fileno() >= 0
        daemon.send({"id": request["id"]})
        callings[request["n"]].result()
    assert connection.socket.fileno() < 0


def test_a_retired_connection_that_nobody_uses_is_closed_at_once(pair: Pair):
    connection, _ = pair
    connection.retire()
    assert connection.socket.fileno() < 0
