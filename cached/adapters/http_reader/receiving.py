"""The bytes of one connection: waits that end, and the two ways into a sink.

Plain HTTP is moved by one thread for all connections: spliced, which is one copy in all, or through
a buffer if the sink must see the bytes. TLS, and whatever cannot be spliced, is received here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import threading
from typing import TYPE_CHECKING

from cached.adapters.http_reader.mover import Transfer
from cached.core.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.adapters.http_reader.mover import Mover
    from cached.ports import Sink

# Every wait ends after this: so late a stall is noticed, or a small rest taken. Eight waits cost
# 0.5 % of a core; with 0.1 s it is 0.35 %, with 0.02 s 0.9 %.
TICK_S = 0.05
BUFFER_BYTES = 256 << 10  # stays in the L2 cache between recv and write
LOWAT_BYTES = 256 << 10  # sleep until so much is there; 512 KiB is no better, 64 KiB costs CPU
TLS_SLACK_BYTES = 32 << 10  # of what is left, the TLS layer may already hold a record (16 KiB)
PIPE_BYTES = 1 << 20  # the most an unprivileged process gets: /proc/sys/fs/pipe-max-size
MIN_PIPE_BYTES = 256 << 10  # with the usual 64 KiB splicing costs more than copying
MORE_FILES = "raise the limit of open files (ulimit -n), or lower fetch_threads"
_CANNOT_SPLICE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM})
_PLAIN = (BlockingIOError,)


class Receiver:
    """A connected socket. One thread at a time uses it; ``cancel`` is for any other.

    Attributes:
        peer: ``host:port``, for messages.
        is_untouched: whether no byte has come since the last ``send``.
        is_cancelled: whether ``cancel`` was called.
        on_idle: called by the waiting thread after every ``TICK_S`` without a byte, with the
            seconds since the last one; may raise to give up.
    """

    __slots__ = (
        "_again",
        "_lock",
        "_lowat",
        "_mover",
        "_pending",
        "_pipe",
        "_poll",
        "_scratch",
        "_sock",
        "_timeout_s",
        "_transfer",
        "is_cancelled",
        "is_untouched",
        "on_idle",
        "peer",
    )

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        *,
        receive_timeout_s: float,
        mover: Mover | None = None,
        again: tuple[type[Exception], ...] = _PLAIN,
    ) -> None:
        """Take over a connected socket.

        Args:
            sock: plain, or TLS after its handshake; becomes non-blocking.
            peer: ``host:port``, for messages.
            receive_timeout_s: a wait without one byte ends in ``StoreUnavailable`` then.
            mover: splices bodies; only for a plain socket.
            again: what the socket raises instead of blocking.
        """
        sock.setblocking(False)
        self.peer = peer
        self.is_untouched = True
        self.is_cancelled = False
        self.on_idle: Callable[[float], None] | None = None
        self._sock = sock
        self._timeout_s = receive_timeout_s
        self._again = again
        self._pending: Callable[[], int] | None = getattr(sock, "pending", None)
        self._mover = mover  # None once it turned out that nothing can be spliced here
        self._pipe: _Pipe | None = None
        self._scratch: memoryview | None = None
        self._transfer: Transfer | None = None  # under way in the mover
        self._lowat = 1
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._lock = threading.Lock()  # so that cancel never meets a descriptor that was closed

    def is_quiet(self) -> bool:
        """Return whether an idle connection still is one: open, and nothing came unasked."""
        return not self._poll.poll(0)

    def cancel(self) -> None:
        """Wake the thread that waits here; it gets ``StoreUnavailable``. From any thread.

        ``shutdown`` wakes a reader, ``close`` does not. The plain socket's is called:
        ``SSLSocket.shutdown`` would let the reader take encrypted bytes for the body.
        """
        with self._lock, contextlib.suppress(OSError):
            self.is_cancelled = True
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        transfer = self._transfer
        if transfer is not None:
            transfer.end()

    def close(self) -> None:
        """Close socket and pipe; the second time does nothing."""
        with self._lock:
            self._sock.close()
        self._drop_pipe()

    def send(self, data: bytes) -> None:
        """Send all of it.

        Raises:
            StoreUnavailable: the connection broke, was cancelled, or takes nothing.
        """
        self.is_untouched = True
        view = memoryview(data)
        writable = select.poll()
        writable.register(self._sock.fileno(), select.POLLOUT)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except self._again:
                if not writable.poll(self._timeout_s * 1000):
                    raise self._timed_out("sent", self._timeout_s) from None
            except OSError as error:
                raise self._broken(error) from error

    def receive(self, most_bytes: int) -> bytes:
        """Return what is there, at least one byte; nothing at the end of the connection.

        Raises:
            StoreUnavailable: the connection broke, was cancelled, or nothing came in time.
        """
        block = bytearray(most_bytes)
        size_bytes = self._wait(lambda: self._sock.recv_into(block))
        return bytes(memoryview(block)[:size_bytes])

    def move(self, at: int, left_bytes: int, sink: Sink) -> int:
        """Move some of the bytes that come next into a sink; return how many, 0 at the end.

        Args:
            at: where they belong.
            left_bytes: the most that is taken; so much is still expected.
            sink: takes them.

        Raises:
            StoreUnavailable: as for ``receive``; nothing was moved.
        """
        self._expect(left_bytes)
        if self._mover is not None and sink.watermark == at:
            moved_bytes = self._hand_over(self._mover, at, left_bytes, sink)
            if moved_bytes:
                return moved_bytes  # else it ended, or another attempt moved the watermark
        if self._scratch is None:
            self._scratch = memoryview(bytearray(BUFFER_BYTES))
        got_bytes = self._gather(self._scratch[:left_bytes])
        if got_bytes:
            sink.accept(at, self._scratch[:got_bytes])
        return got_bytes

    def _expect(self, left_bytes: int) -> None:
        """Let waits last until a good deal of what is still to come is there."""
        slack_bytes = TLS_SLACK_BYTES if self._pending else 0
        self.sleep_until(max(1, min(LOWAT_BYTES, left_bytes - slack_bytes)))

    def sleep_until(self, size_bytes: int) -> None:
        """Let waits last until so much is there, or the end, or a tick is over.

        It must not be more than is still to come (SO_RCVLOWAT, socket(7)).
        """
        if size_bytes != self._lowat:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)
            self._lowat = size_bytes

    def _wait(self, receive: Callable[[], int]) -> int:
        """Return what ``receive`` returns as soon as it does not block."""
        idle_s = 0.0
        while True:
            is_there = bool(self._pending and self._pending())  # poll does not see these
            is_ready = is_there or bool(self._poll.poll(TICK_S * 1000))
            try:
                got_bytes = receive()
            except self._again:
                got_bytes = -1
            except OSError as error:
                raise self._broken(error) from error
            if self.is_cancelled:
                raise self._cancelled()
            if got_bytes >= 0:
                self.is_untouched = self.is_untouched and not got_bytes
                return got_bytes
            if not is_ready:
                idle_s += TICK_S
                self._idle(idle_s)

    def _idle(self, idle_s: float) -> None:
        if self.on_idle is not None:
            self.on_idle(idle_s)
        if idle_s >= self._timeout_s:
            raise self._timed_out("received", idle_s)

    def _gather(self, view: memoryview) -> int:
        """Receive at least one byte, and what else comes without waiting."""
        got_bytes = self._wait(lambda: self._sock.recv_into(view))
        more_bytes = got_bytes
        while more_bytes and got_bytes < len(view):
            try:
                more_bytes = self._sock.recv_into(view[got_bytes:])
            except OSError:  # nothing there, or broken: the next wait tells
                break
            got_bytes += more_bytes
        return got_bytes

    def _hand_over(self, mover: Mover, at: int, left_bytes: int, sink: Sink) -> int | None:
        """Have the mover move bytes; None if they would have to be spliced, and cannot be."""
        ends = None
        if not sink.sees_bytes:
            try:
                pipe = self._usable_pipe()
            except OSError as error:
                raise self._cannot_move(error) from error
            if pipe is None:
                return None
            ends = (pipe.read_fd, pipe.write_fd)
        transfer = Transfer(self._sock.fileno(), ends, at, at + left_bytes, sink, self._expect)
        self._transfer = transfer  # from here on, cancel ends it
        if self.is_cancelled:
            raise self._cancelled()
        try:
            mover.add(transfer)
        except OSError as error:
            raise self._cannot_move(error) from error
        try:
            self._attend(transfer)
        finally:
            mover.remove(transfer)
            self._transfer = None
        self.is_untouched = self.is_untouched and transfer.at == at
        if self.is_cancelled:
            raise self._cancelled()
        why = transfer.error
        if why is None:
            return transfer.at - at
        self._drop_pipe()  # bytes may be left in it
        if not isinstance(why, OSError):
            raise why
        if why.errno not in _CANNOT_SPLICE:
            raise self._broken(why) from why
        self._mover = None
        return None

    def _attend(self, transfer: Transfer) -> None:
        """Wait for the end of a transfer, and note while nothing comes."""
        idle_s = 0.0
        seen = transfer.at
        while not transfer.over.acquire(timeout=TICK_S):
            with transfer.lock:
                self.sleep_until(1)  # what is there is taken, however little
            if transfer.at != seen or self._poll.poll(0):
                seen = transfer.at
                idle_s = 0.0
            else:
                idle_s += TICK_S
                self._idle(idle_s)

    def _usable_pipe(self) -> _Pipe | None:
        if self._pipe is None:
            self._pipe = _Pipe()
            if self._pipe.size_bytes < MIN_PIPE_BYTES:
                self._mover = None
                self._drop_pipe()
        return self._pipe

    def _drop_pipe(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _broken(self, error: OSError) -> StoreUnavailable:
        if self.is_cancelled:
            return self._cancelled()
        message = f"the connection to {self.peer} broke: {reason(error)}"
        return StoreUnavailable(message, hint="check that the store is up")

    def _cannot_move(self, error: OSError) -> StoreUnavailable:
        message = f"cannot receive from {self.peer}: {reason(error)}"
        return StoreUnavailable(message, hint=MORE_FILES)

    def _cancelled(self) -> StoreUnavailable:
        return StoreUnavailable(f"the request to {self.peer} was cancelled")

    def _timed_out(self, verb: str, idle_s: float) -> StoreUnavailable:
        message = f"nothing was {verb} for {idle_s:.1f} s on the connection to {self.peer}"
        return StoreUnavailable(message, hint="check that the store is up; see receive_timeout")


class _Pipe:
    """What is spliced goes through here; empty between two moves."""

    __slots__ = ("read_fd", "size_bytes", "write_fd")

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()
        with contextlib.suppress(OSError):  # over the user's limit: pipe(7), pipe-user-pages-soft
            fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.size_bytes = fcntl.fcntl(self.write_fd, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)


def reason(error: Exception) -> str:
    """Return what an error of the system says, in lower case, to follow a colon."""
    strerror = getattr(error, "strerror", None)
    return (strerror or str(error) or type(error).__name__).lower()
