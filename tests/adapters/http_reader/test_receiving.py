"""Bytes go from a socket into a sink on every way alike; every wait ends, and can be cut."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import ssl
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from cached.adapters.http_reader import receiving
from cached.adapters.http_reader.mover import Mover
from cached.adapters.http_reader.receiving import Receiver
from cached.adapters.segments.part_sink import OpenFile, PartSink
from cached.core.errors import CachedError, OutOfSpace, StoreUnavailable
from tests.fakes import tls

if TYPE_CHECKING:
    from collections.abc import Iterator

BODY = random.Random(1).randbytes(3_000_001)
START = 4099
WAYS = ("spliced", "copied", "tls 1.2", "tls 1.3")


class Pair:
    """A receiver and the other end of its connection."""

    def __init__(self, way: str, *, receive_timeout_s: float = 10.0) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            near = socket.create_connection(listening.getsockname())
            self.far, _ = listening.accept()
        self.far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        again: tuple[type[Exception], ...] = (BlockingIOError,)
        if way.startswith("tls"):
            again += (ssl.SSLWantReadError, ssl.SSLWantWriteError)
            near = self._secure(way, near)
        self.receiver = Receiver(
            near,
            "store:80",
            receive_timeout_s=receive_timeout_s,
            mover=None if way.startswith("tls") else Mover(),
            again=again,
        )
        self.fd = os.memfd_create("target")
        self.part = PartSink(OpenFile(self.fd, "a", START + len(BODY)), START, START + len(BODY))

    def _secure(self, way: str, near: socket.socket) -> ssl.SSLSocket:
        most = ssl.TLSVersion.TLSv1_2 if way == "tls 1.2" else ssl.TLSVersion.TLSv1_3
        plain = self.far

        def greet() -> None:
            self.far = tls.server_context(most).wrap_socket(plain, server_side=True)

        thread = threading.Thread(target=greet)
        thread.start()
        context = ssl.create_default_context(cafile=tls.AUTHORITY)
        secured = context.wrap_socket(near, server_hostname="127.0.0.1")
        thread.join()
        return secured

    def move_all(self) -> int:
        """Move up to the end of the body or of the connection; return where that was."""
        at = self.part.watermark
        while at < START + len(BODY):
            moved_bytes = self.receiver.move(at, START + len(BODY) - at, self.part)
            if not moved_bytes:
                break
            at += moved_bytes
        return at - START

    def there(self) -> bytes:
        return os.pread(self.fd, len(BODY), START)

    def reset(self) -> None:
        """Close the other end with RST."""
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.far.close()

    def close(self) -> None:
        self.receiver.close()
        self.far.close()
        os.close(self.fd)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen: str = request.param
    if chosen == "copied":
        monkeypatch.setattr(receiving, "MIN_PIPE_BYTES", 1 << 40)
    return chosen


@pytest.fixture
def pair(way: str) -> Iterator[Pair]:
    with contextlib.closing(Pair(way)) as made:
        yield made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits end after 2 ms, and a receiver gives up after 3 of them."""
    monkeypatch.setattr(receiving, "TICK_S", 0.002)


def test_a_body_arrives_whole(pair: Pair):
    sending = threading.Thread(target=pair.far.sendall, args=(BODY,))
    sending.start()
    assert pair.move_all() == len(BODY)
    sending.join()
    assert pair.there() == BODY


def test_only_plain_http_is_spliced_and_only_with_a_large_pipe(pair: Pair, way: str):
    class Seen:
        watermark = 0
        checksum = None

        def __init__(self, *, sees_bytes: bool = False) -> None:
            self.sees_bytes = sees_bytes
            self.ways: list[str] = []

        def accept(self, offset: int, view: memoryview) -> None:
            self.ways.append("copied")

        def accept_from_pipe(self, pipe_fd: int, offset: int, size_bytes: int) -> None:
            os.read(pipe_fd, size_bytes)
            self.ways.append("spliced")

    seen = Seen()
    pair.far.sendall(b"x")
    assert pair.receiver.move(0, 1, seen) == 1
    assert seen.ways == [way if way == "spliced" else "copied"]
    seen = Seen(sees_bytes=True)
    pair.far.sendall(b"x")
    assert pair.receiver.move(0, 1, seen) == 1
    assert seen.ways == ["copied"]


def test_what_another_attempt_wrote_is_not_spliced_over(pair: Pair):
    pair.part.accept(START, memoryview(b"winner"))
    pair.far.sendall(b"loser, and then more")
    moved = 0
    while moved < 20:
        moved += pair.receiver.move(START + moved, 20 - moved, pair.part)
    assert pair.there()[:20] == b"winner and then more"


def test_a_wait_that_another_attempt_overtakes_goes_on(pair: Pair, quick: None):
    overtaken: list[float] = []

    def overtake(idle_s: float) -> None:
        if not overtaken:
            overtaken.append(idle_s)
            pair.part.accept(START, memoryview(b"winner"))
            pair.far.sendall(b"loser, and then more")

    pair.receiver.on_idle = overtake
    steps: list[int] = []
    while sum(steps) < 20:
        steps.append(pair.receiver.move(START + sum(steps), 20 - sum(steps), pair.part))
    assert 0 not in steps, "which would be the end of the connection"
    assert pair.there()[:20] == b"winner and then more"


def test_bytes_that_come_one_by_one_arrive(pair: Pair, quick: None):
    def send() -> None:
        for byte in BODY[:50]:
            pair.far.sendall(bytes((byte,)))

    sending = threading.Thread(target=send)
    sending.start()
    at = 0
    while at < 50:
        at += pair.receiver.move(START + at, 50 - at, pair.part)
    sending.join()
    assert pair.there()[:50] == BODY[:50]


def test_a_rest_below_the_low_water_mark_does_not_hang(pair: Pair):
    size_bytes = receiving.LOWAT_BYTES * 3 // 2
    sending = threading.Thread(target=pair.far.sendall, args=(BODY[:size_bytes],))
    sending.start()
    idle: list[float] = []
    pair.receiver.on_idle = idle.append
    at = 0
    while at < size_bytes:
        at += pair.receiver.move(START + at, size_bytes - at, pair.part)
    sending.join()
    assert idle == []


def test_receive_returns_what_is_there_and_nothing_at_the_end(pair: Pair):
    pair.far.sendall(b"hello")
    assert pair.receiver.receive(3) == b"hel"
    assert pair.receiver.receive(100) == b"lo"
    pair.far.close()
    assert pair.receiver.receive(100) == b""


def test_the_end_of_the_connection_ends_the_moving(pair: Pair):
    pair.far.sendall(BODY[:1000])
    pair.far.close()
    assert pair.move_all() == 1000
    assert pair.there()[:1000] == BODY[:1000]


def test_a_reset_is_an_error_or_the_end_and_the_sink_keeps_what_came(pair: Pair, way: str):
    pair.far.sendall(BODY[:1000])
    assert pair.receiver.move(START, 1000, pair.part) == 1000
    pair.reset()
    if way.startswith("tls"):  # Python reports it as the end
        assert pair.receiver.move(START + 1000, len(BODY) - 1000, pair.part) == 0
    else:
        with pytest.raises(StoreUnavailable, match="to store:80 broke: connection reset"):
            pair.receiver.move(START + 1000, len(BODY) - 1000, pair.part)
    assert pair.part.watermark == START + 1000


def test_who_watches_hears_of_silence_at_every_tick_and_moving_goes_on_after_it(
    pair: Pair, quick: None
):
    heard: list[float] = []

    def hear(idle_s: float) -> None:
        heard.append(idle_s)
        if len(heard) == 3:
            pair.far.sendall(BODY[:10])

    pair.receiver.on_idle = hear
    assert pair.receiver.move(START, 10, pair.part) == 10
    assert heard[:3] == pytest.approx([0.002, 0.004, 0.006])
    assert pair.there()[:10] == BODY[:10]


def test_who_watches_may_give_up(pair: Pair, quick: None):
    class GivenUp(Exception):
        pass

    def give_up(idle_s: float) -> None:
        raise GivenUp

    pair.receiver.on_idle = give_up
    with pytest.raises(GivenUp):
        pair.receiver.move(START, len(BODY), pair.part)


def test_silence_ends_in_a_typed_error(way: str, quick: None):
    with contextlib.closing(Pair(way, receive_timeout_s=0.01)) as pair:
        with pytest.raises(StoreUnavailable, match=r"nothing was received for 0\.0 s") as caught:
            pair.receiver.receive(10)
        assert caught.value.transient
        pair.far.sendall(b"late")
        assert pair.receiver.receive(10) == b"late", "the connection can still be read"


def test_a_peer_that_takes_nothing_ends_in_a_typed_error(way: str):
    with (
        contextlib.closing(Pair(way, receive_timeout_s=0.01)) as pair,
        pytest.raises(StoreUnavailable, match="nothing was sent"),
    ):
        pair.receiver.send(bytes(50 << 20))


def test_sending_on_a_broken_connection_is_a_typed_error(pair: Pair):
    pair.reset()
    with pytest.raises(StoreUnavailable, match="broke"):
        pair.receiver.send(b"x" * (64 << 20))


def test_a_request_longer_than_the_sockets_buffer_is_sent_whole(pair: Pair):
    got: list[bytes] = []

    def take() -> None:
        while sum(map(len, got)) < len(BODY):
            got.append(pair.far.recv(1 << 20))

    taking = threading.Thread(target=take)
    taking.start()
    pair.receiver.send(BODY)
    taking.join()
    assert b"".join(got) == BODY


def test_cancelling_wakes_a_waiting_reader(pair: Pair):
    errors: list[CachedError] = []
    waiting = threading.Event()
    pair.receiver.on_idle = lambda _: waiting.set()

    def read() -> None:
        try:
            pair.receiver.move(START, len(BODY), pair.part)
        except CachedError as error:
            errors.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    assert waiting.wait(5)
    pair.receiver.cancel()
    reading.join(5)
    assert [str(error) for error in errors] == ["the request to store:80 was cancelled"]
    assert isinstance(errors[0], StoreUnavailable)
    assert pair.there().strip(b"\0") == b""


def test_what_came_before_a_cancel_never_reaches_the_sink_after_it(pair: Pair):
    pair.far.sendall(BODY[:1000])
    pair.receiver.cancel()
    with pytest.raises(StoreUnavailable, match="cancelled"):
        pair.receiver.move(START, len(BODY), pair.part)
    assert pair.part.watermark == START


def test_cancelling_after_closing_does_nothing(pair: Pair):
    pair.receiver.close()
    pair.receiver.cancel()
    pair.receiver.close()


def test_an_idle_connection_is_quiet_until_something_comes_or_it_is_closed(pair: Pair):
    pair.far.sendall(b"x")
    pair.receiver.receive(1)  # and with it the session tickets of TLS 1.3
    assert pair.receiver.is_quiet()
    pair.far.close()
    assert not pair.receiver.is_quiet()


def test_untouched_means_that_no_byte_came_since_the_last_request(pair: Pair):
    pair.receiver.send(b"request")
    seen = [pair.receiver.is_untouched]
    pair.far.sendall(b"x")
    pair.receiver.receive(1)
    seen.append(pair.receiver.is_untouched)
    pair.receiver.send(b"request")
    seen.append(pair.receiver.is_untouched)
    assert seen == [True, False, True]


def test_a_sink_that_fails_leaves_nothing_open_and_nothing_in_the_pipe(way: str):
    class Full:
        watermark = START
        sees_bytes = False
        checksum = None

        def accept(self, offset: int, view: memoryview) -> None:
            raise OutOfSpace("full")

        def accept_from_pipe(self, pipe_fd: int, offset: int, size_bytes: int) -> None:
            raise OutOfSpace("full")

    before = len(os.listdir("/proc/self/fd"))
    with contextlib.closing(Pair(way)) as pair:
        pair.far.sendall(BODY[:1000])
        with pytest.raises(OutOfSpace):
            pair.receiver.move(START, len(BODY), Full())
        pair.far.sendall(BODY[1000:2000])
        pair.receiver.move(START, 1000, pair.part)
        assert pair.there()[:1000] == BODY[1000:2000], "not what the failed sink left"
    for thread in threading.enumerate():
        if thread.name == "mover":
            thread.join(1)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("way", ["spliced"], indirect=True)
def test_a_kernel_that_cannot_splice_copies(pair: Pair, monkeypatch: pytest.MonkeyPatch, way: str):
    def refuse(*_: object, **__: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "splice", refuse)
    sending = threading.Thread(target=pair.far.sendall, args=(BODY,))
    sending.start()
    assert pair.move_all() == len(BODY)
    sending.join()
    assert pair.there() == BODY
