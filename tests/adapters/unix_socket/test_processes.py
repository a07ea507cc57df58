"""Who asks much waits for his turn, and comes to it; who has gone is forgotten."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from cached.adapters.unix_socket.connection import Connection
from cached.adapters.unix_socket.processes import (
    BURST_S,
    LONG_S,
    MAX_AHEAD,
    REST,
    RESUME_AT,
    Hooks,
    Process,
    Processes,
)
from cached.core import events
from cached.core.objects import PeerId
from cached.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KEY = (1000, 4711)


class Bench:
    """The processes of one socket; ``woken`` are connections whose turn it is.

    That an event was handled is told when the next is taken.
    """

    def __init__(self, stack: ExitStack) -> None:
        self.mailbox = Mailbox()
        self.woken: list[Connection] = []
        self.rested: list[Process] = []
        self.now_s = 100.0
        self.processes = Processes(
            Hooks(self.mailbox.lane, self.wake, self.rested.append, lambda: self.now_s)
        )
        self._stack = stack

    def wake(self, turn: Sequence[Connection]) -> None:
        self.woken += turn

    def joined(self, *, uid: int = KEY[0], pid: int = KEY[1]) -> Connection:
        process = self.processes.of(uid, pid)
        ours, theirs = socket.socketpair()
        self._stack.callback(ours.close)
        self._stack.callback(theirs.close)
        connection = Connection(ours, PeerId(1), process)
        self.processes.joined(process)
        return connection

    def fill(self, process: Process, count: int = MAX_AHEAD) -> None:
        for _ in range(count):
            process.lane.post(events.Ticked())


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack)


def test_connections_are_counted_by_process_and_by_user(bench):
    first, second, third = bench.joined(), bench.joined(), bench.joined(pid=5)
    assert first.process is second.process is not third.process
    assert (first.process.connections, bench.processes.of_uid(KEY[0])) == (2, 3)
    bench.processes.left(second)
    assert (first.process.connections, bench.processes.of_uid(KEY[0])) == (1, 2)


def test_who_comes_again_while_its_events_wait_is_the_same_process(bench):
    connection = bench.joined()
    bench.fill(connection.process, 1)
    bench.processes.left(connection)
    bench.joined(pid=5)
    assert bench.processes.of(*KEY) is connection.process

    bench.mailbox.take(0)
    bench.joined(pid=6)
    assert bench.processes.of(*KEY) is not connection.process


def test_connections_wait_until_little_is_left_and_are_let_in_together(bench):
    held = [bench.joined() for _ in range(MAX_AHEAD)]
    process = held[0].process
    bench.fill(process)
    assert not process.has_room
    for connection in held:
        process.hold(connection)
        process.hold(connection)
    assert process.is_crowded
    for _ in range(MAX_AHEAD - RESUME_AT):
        bench.mailbox.take(0)
    assert bench.woken == []
    bench.mailbox.take(0)
    assert bench.woken == held[: MAX_AHEAD - RESUME_AT]
    assert [connection.is_parked for connection in held] == [False] * 12 + [True] * 4


def test_no_more_are_let_in_before_those_whose_turn_it_is_were_looked_at(bench):
    held = [bench.joined() for _ in range(2 * MAX_AHEAD)]
    process = held[0].process
    for connection in held:
        process.hold(connection)
    process.resume()
    process.resume()
    assert bench.woken == held[:MAX_AHEAD]
    for connection in held[: MAX_AHEAD - RESUME_AT]:
        process.took_turn(connection)
        process.took_turn(connection)
    process.resume()
    assert bench.woken == held[: 2 * MAX_AHEAD - RESUME_AT]


def test_who_leaves_gives_its_turn_and_its_place_back(bench):
    held = [bench.joined() for _ in range(MAX_AHEAD + 2)]
    process = held[0].process
    for connection in held:
        process.hold(connection)
    process.resume()
    process.forget(held[-1])
    bench.processes.left(held[-1])
    for connection in bench.woken:
        process.forget(connection)
        bench.processes.left(connection)
    process.resume()
    assert bench.woken == held[:-1]
    assert not process.is_crowded


def test_who_asks_for_what_takes_long_rests_three_times_as_long(bench):
    held = bench.joined()
    process = held.process
    process.spent(0.002)
    process.spent(0.001)
    assert not process.has_room
    process.hold(held)
    process.resume()
    assert (bench.woken, bench.rested) == ([], [process])
    assert process.rest_s == pytest.approx((1 + REST) * 0.003 - BURST_S)
    bench.now_s += 0.012
    process.resume()
    assert bench.woken == [held]


def test_what_was_handled_counts_as_well(bench, monkeypatch):
    cost_s = iter([0.0, 0.002])
    monkeypatch.setattr(time, "thread_time", lambda: next(cost_s))
    process = bench.joined().process
    bench.fill(process, 1)
    bench.mailbox.take(0)
    bench.mailbox.take(0)
    assert process.rest_s == pytest.approx((1 + REST) * 0.002 - BURST_S)


def test_what_is_short_adds_up_to_half_of_the_time(bench):
    process = bench.joined().process
    for _ in range(9):
        process.spent(0.0001)
    assert process.has_room  # a burst
    for _ in range(1000):
        process.spent(LONG_S)
        bench.now_s += 2 * LONG_S
    assert process.has_room
    for _ in range(1000):
        process.spent(LONG_S)
        bench.now_s += LONG_S
    assert process.rest_s == pytest.approx(1000 * LONG_S, rel=0.02)
