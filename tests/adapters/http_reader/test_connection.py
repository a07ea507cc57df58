"""A reply is read as RFC 9112 frames it, in whatever pieces it comes, or refused."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.adapters.http_reader.connection import Connection
from cached.core.errors import BadReply, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cached.adapters.http_reader.receiving import Receiver
    from cached.ports import Sink

MOST = 1 << 20


class Script:
    """A receiver that was sent certain pieces, and then the end of the connection."""

    peer = "store:80"

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces = [piece for piece in pieces if piece]
        self.on_idle: Callable[[float], None] | None = None
        self.is_untouched = True
        self.is_cancelled = False
        self.is_closed = False
        self.sent = b""
        self.lowat = 1

    def send(self, data: bytes) -> None:
        self.sent += data

    def receive(self, most_bytes: int) -> bytes:
        if not self.pieces:
            return b""
        self.is_untouched = False
        piece, rest = self.pieces[0][:most_bytes], self.pieces[0][most_bytes:]
        self.pieces[:1] = [rest] if rest else []
        return piece

    def move(self, at: int, left_bytes: int, sink: Sink) -> int:
        self.lowat = left_bytes
        piece = self.receive(left_bytes)
        if piece:
            sink.accept(at, memoryview(piece))
        return len(piece)

    def sleep_until(self, size_bytes: int) -> None:
        self.lowat = size_bytes

    def is_quiet(self) -> bool:
        return not self.pieces

    def cancel(self) -> None:
        self.is_cancelled = True

    def close(self) -> None:
        self.is_closed = True


class Bytes:
    """A sink in memory."""

    sees_bytes = False
    checksum = None

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.data = b""

    @property
    def watermark(self) -> int:
        return self.start + len(self.data)

    def accept(self, offset: int, view: memoryview) -> None:
        assert offset == self.watermark
        self.data += view

    def accept_from_pipe(self, pipe_fd: int, offset: int, size_bytes: int) -> None:
        raise AssertionError("nothing is spliced here")


def connected(*pieces: bytes) -> tuple[Connection, Script]:
    script = Script(pieces)
    return Connection(cast("Receiver", script)), script  # the same methods


def reply(body: bytes, *lines: str, status: str = "200 OK") -> bytes:
    head = "\r\n".join((f"HTTP/1.1 {status}", *lines)).encode()
    return head + b"\r\n\r\n" + body


def with_length(body: bytes, status: str = "200 OK") -> bytes:
    return reply(body, f"content-length: {len(body)}", status=status)


def chunked(*chunks: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks if chunk)
    return reply(body + b"0\r\n\r\n", "transfer-encoding: chunked")


@given(st.lists(st.binary(max_size=40), max_size=5), st.booleans(), st.integers(1, 7))
def test_a_reply_is_the_same_whole_and_in_pieces(
    chunks: list[bytes], is_chunked: bool, piece_bytes: int
):
    data = chunked(*chunks) if is_chunked else with_length(b"".join(chunks))
    for step in (len(data), piece_bytes):
        connection, _ = connected(*(data[at : at + step] for at in range(0, len(data), step)))
        connection.send(b"GET")
        assert connection.head().status == 200
        assert connection.read(MOST) == b"".join(chunks)
        assert connection.is_reusable


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", reply(b""), reply(b"", "transfer-encoding: chunked")]),
)
def test_any_bytes_are_a_reply_or_a_typed_error(data: bytes, before: bytes):
    connection, _ = connected(before + data)
    connection.send(b"GET")
    try:
        connection.head()
        body = connection.read(100)
    except StoreError:
        assert not connection.is_reusable
    else:
        assert len(body) <= 100


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_body_goes_into_the_sink_where_it_belongs(body: bytes, data: st.DataObject):
    cut = data.draw(st.integers(0, len(body)))
    raw = with_length(body, "206 x")
    connection, script = connected(raw[: len(raw) - cut], raw[len(raw) - cut :])
    sink = Bytes(5)
    connection.send(b"GET")
    connection.head()
    connection.stream(5, 5 + len(body), sink)
    assert sink.data == body
    assert connection.is_reusable
    assert script.lowat == 1, "the next head is shorter than a body"


def test_several_exchanges_use_one_connection():
    connection, script = connected()
    for body in (b"one", b"", b"three"):
        script.pieces.append(with_length(body))
        connection.send(b"GET")
        assert not connection.is_reusable
        connection.head()
        assert connection.read(MOST) == body
    assert connection.is_reusable


def test_interim_replies_are_skipped_but_not_for_ever():
    interim = b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\n"
    connection, _ = connected(interim * 7 + with_length(b"x"))
    assert connection.head().status == 200
    connection, _ = connected(interim * 8 + with_length(b"x"))
    with pytest.raises(BadReply, match="8 interim"):
        connection.head()


def test_the_reply_to_head_has_no_body_whatever_its_length_says():
    connection, _ = connected(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n")
    connection.send(b"HEAD")
    assert connection.head(has_body=False).headers == {"content-length": "99"}
    assert connection.is_reusable


def test_a_body_without_a_length_ends_with_the_connection():
    connection, _ = connected(reply(b"to "), b"the ", b"end")
    connection.send(b"GET")
    connection.head()
    assert connection.read(MOST) == b"to the end"
    assert not connection.is_reusable


@pytest.mark.parametrize(
    "data", [with_length(b"x" * 101), chunked(b"x" * 50, b"x" * 51), reply(b"x" * 101)]
)
def test_a_body_over_the_limit_is_refused_or_cut(data: bytes):
    connection, _ = connected(data)
    connection.head()
    with pytest.raises(BadReply, match="more than 100 bytes"):
        connection.read(100)
    connection, _ = connected(data)
    connection.send(b"GET")
    connection.head()
    assert connection.read(100, may_cut=True) == b"x" * 100
    assert not connection.is_reusable


@pytest.mark.parametrize("data", [with_length(b"x" * 100), chunked(b"x" * 50, b"x" * 50)])
def test_a_body_at_the_limit_is_read(data: bytes):
    connection, _ = connected(data)
    connection.head()
    assert connection.read(100) == b"x" * 100


def test_an_endless_chunk_costs_no_more_than_the_limit():
    connection, script = connected(
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffff\r\n" + b"x" * (1 << 20)
    )
    connection.head()
    connection.read(100, may_cut=True)
    assert sum(map(len, script.pieces)) > 900_000


@pytest.mark.parametrize(
    "body",
    [
        b"5\r\nhello\r\n",
        b"5\r\nhel",
        b"5\r\nhello!\r\n0\r\n\r\n",
        b"x\r\n",
        b"5",
        b"5\r\nhello\r\n0\r\n",
        b"5;" + b"x" * 70_000,
    ],
)
def test_a_broken_chunked_body_is_refused(body: bytes):
    connection, _ = connected(reply(body, "transfer-encoding: chunked"))
    connection.head()
    with pytest.raises(BadReply):
        connection.read(MOST)
    assert not connection.is_reusable


def test_trailers_and_extensions_are_read_over():
    body = b"3;a=b\r\nabc\r\n0\r\nx-amz-checksum: y\r\n\r\n"
    connection, _ = connected(reply(body, "transfer-encoding: chunked"))
    connection.send(b"GET")
    connection.head()
    assert connection.read(MOST) == b"abc"
    assert connection.is_reusable


def test_a_short_body_is_a_transient_error_and_the_sink_keeps_what_came():
    connection, _ = connected(b"HTTP/1.1 206 x\r\ncontent-length: 10\r\n\r\nabcd", b"e")
    sink = Bytes()
    connection.head()
    with pytest.raises(BadReply, match="cut short at byte 5, 5 before its end") as caught:
        connection.stream(0, 10, sink)
    assert caught.value.transient
    assert sink.data == b"abcde"
    assert not connection.is_reusable


def test_a_small_body_that_is_cut_short_is_refused():
    connection, _ = connected(b"HTTP/1.1 200 x\r\ncontent-length: 10\r\n\r\nabcd")
    connection.head()
    with pytest.raises(BadReply, match="6 bytes before its end"):
        connection.read(MOST)


@pytest.mark.parametrize("data", [with_length(b"abc"), chunked(b"abcd"), reply(b"abcd")])
def test_a_body_of_another_length_than_asked_for_never_reaches_the_sink(data: bytes):
    connection, _ = connected(data)
    sink = Bytes()
    connection.head()
    with pytest.raises(BadReply, match="instead of 4"):
        connection.stream(0, 4, sink)
    assert sink.data == b""


def test_bytes_after_the_reply_end_the_use_of_the_connection():
    connection, _ = connected(with_length(b"abc") + b"HTTP/1.1 200 OK\r\n")
    connection.send(b"GET")
    connection.head()
    sink = Bytes()
    connection.stream(0, 3, sink)
    assert sink.data == b"abc"
    assert not connection.is_reusable


def test_a_connection_that_ends_before_the_reply_is_untouched():
    connection, _ = connected()
    connection.send(b"GET")
    with pytest.raises(StoreUnavailable, match="closed the connection before it had replied"):
        connection.head()
    assert connection.is_untouched
    assert not connection.is_reusable


def test_a_head_without_an_end_is_refused_before_it_fills_the_memory():
    connection, script = connected(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000)
    with pytest.raises(BadReply, match="head of more than 65536 bytes"):
        connection.head()
    assert sum(map(len, script.pieces)) > 500_000


@pytest.mark.parametrize(
    "data", [b"SSH-2.0-x\r\n\r\n", reply(b"", "content-length: 1", "content-length: 1")]
)
def test_what_is_wrong_with_a_head_is_said_with_the_name_of_the_peer(data: bytes):
    connection, _ = connected(data)
    with pytest.raises(BadReply, match="store:80 sent") as caught:
        connection.head()
    assert caught.value.transient
    assert not connection.is_reusable


def test_a_cancelled_connection_is_never_used_again():
    connection, _ = connected(with_length(b""))
    connection.send(b"GET")
    connection.head()
    assert connection.is_reusable
    connection.cancel()
    assert not connection.is_reusable


def test_closing_ends_the_use_and_closes_the_receiver():
    connection, script = connected(with_length(b""))
    connection.send(b"GET")
    connection.head()
    with contextlib.closing(connection):
        assert connection.is_quiet()
    assert script.is_closed
    assert not connection.is_reusable


def test_who_watches_is_told_by_the_receiver():
    connection, script = connected()
    seen: list[float] = []
    connection.watch(seen.append)
    assert script.on_idle is not None
    script.on_idle(0.1)
    assert seen == [0.1]
