"""Exchanges on one connection: a request out, a head and a body in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.adapters.http_reader import heads
from cached.core.errors import BadReply, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from cached.adapters.http_reader.receiving import Receiver
    from cached.ports import Sink

MAX_INTERIM = 8  # replies 1xx before the real one
HEAD_BLOCK_BYTES = 4 << 10  # most heads come in one; what follows them is copied once more
BODY_BLOCK_BYTES = 16 << 10


class Connection:
    """One exchange after the other, by one thread at a time.

    The order is ``send``, ``head``, then ``read`` or ``stream``; then ``is_reusable`` says
    whether another ``send`` may follow. Whoever holds it closes it. Only ``cancel`` is for
    other threads.

    Attributes:
        peer: ``host:port``, for messages.
    """

    __slots__ = ("_data", "_is_done", "_keeps_alive", "_left", "_receiver", "peer")

    def __init__(self, receiver: Receiver) -> None:
        """Take over a receiver that nothing was received from yet; ``close`` closes it."""
        self.peer = receiver.peer
        self._receiver = receiver
        self._data = b""  # received, not yet consumed
        self._left: int | None = 0  # see heads.body_length
        self._is_done = True
        self._keeps_alive = True

    @property
    def is_reusable(self) -> bool:
        """Whether another request may be sent: the last reply was read to its end."""
        return self._is_done and self._keeps_alive and not self._receiver.is_cancelled

    @property
    def is_cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._receiver.is_cancelled

    @property
    def is_untouched(self) -> bool:
        """Whether no byte of a reply to the last request has come."""
        return self._receiver.is_untouched

    def is_quiet(self) -> bool:
        """Return whether an idle connection still is one: open, and nothing came unasked."""
        return self._receiver.is_quiet()

    def watch(self, on_idle: Callable[[float], None] | None) -> None:
        """Have ``on_idle`` called while nothing comes: see ``Receiver.on_idle``."""
        self._receiver.on_idle = on_idle

    def cancel(self) -> None:
        """End what runs here with ``StoreUnavailable``; from any thread. Never reusable again."""
        self._receiver.cancel()

    def close(self) -> None:
        """Close it; the second time does nothing."""
        self._keeps_alive = False
        self._receiver.close()

    def send(self, request: bytes) -> None:
        """Send a request: its head, and its body if it has one.

        Raises:
            StoreUnavailable: the connection broke, was cancelled, or takes nothing.
        """
        self._is_done = False
        self._receiver.send(request)

    def head(self, *, has_body: bool = True) -> heads.Head:
        """Read status and headers.

        Args:
            has_body: False for the reply to a HEAD request.

        Raises:
            BadReply: it is not HTTP/1, or ambiguous.
            StoreUnavailable: the connection broke, was cancelled, or nothing came in time.
        """
        try:
            for _ in range(MAX_INTERIM):
                head = heads.parse_head(self._until_empty_line())
                if head.status >= 200:
                    break
            else:
                self._refuse(f"{MAX_INTERIM} interim replies")
            self._left = heads.body_length(head) if has_body else 0
        except ValueError as error:
            self._refuse(str(error), error)
        self._keeps_alive = head.keeps_alive
        if self._left == 0:
            self._finish()
        return head

    def read(self, most_bytes: int, *, may_cut: bool = False) -> bytes:
        """Read the body whole.

        Args:
            most_bytes: the longest that is accepted.
            may_cut: return the first ``most_bytes`` of a longer one instead of raising.

        Raises:
            BadReply: it is longer, malformed, or cut short.
            StoreUnavailable: as for ``head``.
        """
        if self._left is None:
            body = self._read_chunks(most_bytes)
        elif self._left < 0:
            body = self._read_all(most_bytes)
        else:
            body = self._take(min(self._left, most_bytes + 1))
        if len(body) > most_bytes:
            self._keeps_alive = False
            if not may_cut:
                self._refuse(f"a reply of more than {most_bytes} bytes")
            return body[:most_bytes]
        self._finish()
        return body

    def stream(self, start: int, stop: int, sink: Sink) -> None:
        """Put the body into a sink, as bytes ``[start, stop)``.

        Raises:
            BadReply: the body has another length (nothing was read), or was cut short: the
                sink keeps what came.
            StoreUnavailable: as for ``head``; the sink keeps what came.
        """
        if self._left != stop - start:
            self._refuse(f"a body of {self._left} bytes instead of {stop - start}")
        at = start
        if self._data:
            view = memoryview(self._data)[: stop - at]
            sink.accept(at, view)
            at += len(view)
            self._data = self._data[len(view) :]
        while at < stop:
            moved_bytes = self._receiver.move(at, stop - at, sink)
            if not moved_bytes:
                self._refuse(f"a body cut short at byte {at}, {stop - at} before its end")
            at += moved_bytes
        self._receiver.sleep_until(1)
        self._finish()

    def _finish(self) -> None:
        """Note that the reply was read to its end."""
        self._left = 0
        self._is_done = True
        if self._data:
            self._keeps_alive = False  # more than the reply: nobody knows what it is

    def _until_empty_line(self) -> bytes:
        data = self._data
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) >= heads.MAX_HEAD_BYTES:
                self._refuse(f"a head of more than {heads.MAX_HEAD_BYTES} bytes")
            more = self._receiver.receive(HEAD_BLOCK_BYTES)
            if not more:
                self._keeps_alive = False
                message = f"{self.peer} closed the connection before it had replied"
                raise StoreUnavailable(message, hint="check that the store is up")
            data += more
        self._data = data[end + 4 :]
        return data[:end]

    def _take(self, size_bytes: int) -> bytes:
        pieces = []
        left_bytes = size_bytes
        while left_bytes:
            if not self._data:
                self._data = self._receiver.receive(max(BODY_BLOCK_BYTES, min(left_bytes, 1 << 20)))
                if not self._data:
                    self._refuse(f"a body cut short, {left_bytes} bytes before its end")
            piece = self._data[:left_bytes]
            self._data = self._data[len(piece) :]
            left_bytes -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _line(self) -> bytes:
        while (end := self._data.find(b"\r\n")) < 0:
            more = b""
            if len(self._data) < heads.MAX_HEAD_BYTES:
                more = self._receiver.receive(BODY_BLOCK_BYTES)
            if not more:
                self._refuse("a chunk without an end of line")
            self._data += more
        line = self._data[:end]
        self._data = self._data[end + 2 :]
        return line

    def _read_chunks(self, most_bytes: int) -> bytes:
        body = bytearray()
        while size_bytes := self._chunk_size():
            body += self._take(min(size_bytes, most_bytes + 1 - len(body)))
            if len(body) > most_bytes:
                return bytes(body)
            if self._line():
                self._refuse("a chunk longer than its size")
        while self._line():  # trailers
            pass
        return bytes(body)

    def _chunk_size(self) -> int:
        try:
            return heads.chunk_size(self._line())
        except ValueError as error:
            self._refuse(str(error), error)

    def _read_all(self, most_bytes: int) -> bytes:
        self._keeps_alive = False  # the end of the connection is the end of the body
        body = self._data
        self._data = b""
        while len(body) <= most_bytes and (more := self._receiver.receive(BODY_BLOCK_BYTES)):
            body += more
        return body[: most_bytes + 1]

    def _refuse(self, what: str, cause: Exception | None = None) -> NoReturn:
        self._keeps_alive = False
        message = f"{self.peer} sent {what}"
        hint = "look at the store, and at what is between here and there"
        raise BadReply(message, hint=hint) from cause
