"""A request can be cut at any moment, from outside or by its own wait; then it is over."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from cached.adapters.s3.faults import Asked
from cached.adapters.s3.requests import Call
from cached.adapters.s3.running import Running
from cached.cancellation import NEVER, Token
from cached.core.errors import StoreUnavailable
from tests.adapters.s3.composed import requests
from tests.fakes.store_faults import Stall
from tests.fakes.store_server import StoreServer

if TYPE_CHECKING:
    from collections.abc import Iterator

GET = Call("GET", Asked("s3:GetObject", "models", "a"), "a")
FOREVER = float("inf")


@pytest.fixture
def server() -> Iterator[StoreServer]:
    with StoreServer({"a": b"abc"}) as started:
        yield started


@pytest.fixture
def running(server: StoreServer) -> Iterator[Running]:
    made = Running(requests(server))
    yield made
    made.close()


def body(running: Running, token: Token | None = None) -> bytes:
    with running.sent(GET, token or NEVER) as (connection, _):
        return connection.read(99)


def test_requests_follow_each_other_on_one_connection(server: StoreServer, running: Running):
    token = Token()
    assert body(running, token) == body(running, token) == b"abc"
    token.cancel()  # of a call that has ended: its connection serves another one now
    assert body(running) == b"abc"
    assert server.connections == 1


def test_what_was_cancelled_before_is_never_sent(server: StoreServer, running: Running):
    token = Token()
    token.cancel()
    with pytest.raises(StoreUnavailable, match="cancelled"):
        body(running, token)
    assert server.seen == []


@pytest.mark.parametrize("sent_bytes", [-1, 0, 2])
def test_what_waits_is_cut_and_its_connection_not_used_again(
    server: StoreServer, running: Running, sent_bytes: int
):
    server.faults = {0: Stall(FOREVER, sent_bytes)}
    token = Token()

    def cancel() -> None:
        assert server.stalled.wait(5)
        token.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(StoreUnavailable, match="cancelled"):
        body(running, token)
    thread.join()
    assert body(running) == b"abc"
    assert server.connections == 2


def test_a_cancel_of_one_leaves_the_others_alone(server: StoreServer, running: Running):
    token = Token()
    with running.sent(GET, token) as (first, _), running.sent(GET, NEVER) as (second, _):
        token.cancel()
        assert first.is_cancelled
        assert second.read(99) == b"abc"


def test_who_waits_may_give_up(server: StoreServer, running: Running):
    server.faults = {0: Stall(FOREVER, -1)}
    waits: list[float] = []

    def give_up(idle_s: float) -> None:
        waits.append(idle_s)
        raise StoreUnavailable("enough")

    with pytest.raises(StoreUnavailable, match="enough"), running.sent(GET, NEVER, give_up):
        pass
    assert len(waits) == 1
    assert body(running) == b"abc"


def test_a_block_that_fails_ends_the_connection(server: StoreServer, running: Running):
    with pytest.raises(ZeroDivisionError), running.sent(GET, NEVER):
        raise ZeroDivisionError
    assert body(running) == b"abc"
    assert server.connections == 2


def test_close_cuts_what_runs_and_lets_nothing_begin(server: StoreServer, running: Running):
    with running.sent(GET, NEVER) as (connection, _):
        running.close()
        assert connection.is_cancelled
    with pytest.raises(StoreUnavailable, match="cancelled"):
        body(running)
    assert server.count("GET") == 1
