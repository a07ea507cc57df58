"""One worker's connection: replies that it does not take yet, and what it may ask for next."""

from __future__ import annotations

import array
import contextlib
import select
import socket
import threading
from typing import TYPE_CHECKING

from cached.core.errors import DaemonUnavailable, FrameError, LoadFailed
from cached.core.events import Requested
from cached.core.wire import (
    LENGTH_BYTES,
    MAX_NUMBER,
    MAX_OUTSTANDING,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    MAX_VALUES,
    FrameBuffer,
    encode,
    error_body,
)

if TYPE_CHECKING:
    from cached.adapters.unix_socket.processes import Process
    from cached.core.effects import Reply
    from cached.core.errors import CachedError
    from cached.core.objects import PeerId

# Of replies that wait behind one that the kernel has not taken whole, when the next one comes:
# thousands of small ones, so that only a peer that does not read gets there.
MAX_WAITING_BYTES = 256 << 10

IN, OUT = select.EPOLLIN, select.EPOLLOUT


class Connection:
    """One worker. ``lock`` guards all but ``frames``, which is the epoll thread's.

    Attributes:
        is_held: requests that came were not taken yet.
        is_parked: it waits for its turn among those of its process.
        has_turn: it was woken for its turn; the lock of the process guards both.
        is_known: ``Connected`` was posted.
        buffered_bytes: of requests that were not taken yet, as they are counted for its process.
        unread_descriptors: that were sent and not received yet; only in_flight.py touches it.
    """

    __slots__ = (
        *("frames", "has_turn", "is_held", "is_known", "is_open", "is_parked", "lock"),
        *("buffered_bytes", "outstanding", "peer", "process", "socket", "unread_descriptors"),
        *("unsent", "waiting_bytes", "watched"),
    )

    def __init__(self, accepted: socket.socket, peer: PeerId, process: Process) -> None:
        self.socket = accepted
        self.peer = peer
        self.process = process
        self.frames = FrameBuffer(MAX_REQUEST_BYTES, MAX_VALUES)
        self.lock = threading.Lock()
        self.unsent = bytearray()
        self.outstanding = 0
        self.buffered_bytes = 0
        self.waiting_bytes = 0
        self.unread_descriptors = 0
        self.watched = IN
        self.is_held = False
        self.is_known = False
        self.is_parked = False
        self.has_turn = False
        self.is_open = True

    @property
    def is_full(self) -> bool:
        """Whether no request is taken until a reply went out."""
        return self.outstanding >= MAX_OUTSTANDING

    def send(self, frame: bytes, descriptors: tuple[int, ...]) -> bool:
        """Give the frame to the kernel or keep what is left; False: too much is left.

        Raises:
            OSError: the peer is gone; also from ``flush``.
        """
        self.flush()
        sent = 0
        if self.unsent:
            if self.waiting_bytes > MAX_WAITING_BYTES:
                return False
            self.waiting_bytes += len(frame)
        else:
            self.waiting_bytes = 0
            with contextlib.suppress(BlockingIOError):
                sent = self.socket.sendmsg([frame], _ancillary(descriptors), socket.MSG_NOSIGNAL)
        self.unsent += memoryview(frame)[sent:]
        return sent > 0 or not descriptors

    def flush(self) -> None:
        """Send what was left as far as it goes."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent, socket.MSG_NOSIGNAL)]

    def watch(self, epoll: select.epoll) -> None:
        """Ask to be woken for what this connection can do next.

        Frames that were held back lie in ``frames``, where no poll sees them: then it is woken
        as soon as it can be written to, which is at once unless replies are unread.
        """
        wanted = 0 if self.is_full or self.is_parked else IN
        if self.unsent or (self.is_held and wanted):
            wanted |= OUT
        if wanted != self.watched:
            self.watched = wanted
            epoll.modify(self.socket, wanted)

    def tell(self, error: CachedError) -> None:
        """Say why the connection is closed, if the peer listens; with the lock."""
        with contextlib.suppress(OSError):
            self.send(encode({"id": None, **error_body(error)}), ())

    def hang_up(self) -> None:
        """Make the epoll thread see the end of this connection."""
        self.is_open = False
        with contextlib.suppress(OSError):  # the peer was quicker
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close; only in the epoll thread, so that no other closes a number in use."""
        self.is_open = False
        self.socket.close()


def too_many(descriptors: tuple[int, ...]) -> DaemonUnavailable:
    """Return why descriptors cannot be sent: unix(7), ETOOMANYREFS."""
    message = f"cannot send {len(descriptors)} files: too many are sent that nobody received yet"
    hint = "receive what was sent; or raise the daemon's limit of open files (ulimit -n)"
    return DaemonUnavailable(message, hint=hint)


def _ancillary(descriptors: tuple[int, ...]) -> list[tuple[int, int, array.array[int]]]:
    if not descriptors:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]


def reply_frame(reply: Reply, descriptors: tuple[int, ...]) -> tuple[bytes, tuple[int, ...]]:
    """Return a reply as a frame and what goes with it; an error in place of a reply too long."""
    counted = {"fds": len(descriptors)} if descriptors else {}
    frame = encode({"id": reply.request_id, **reply.body, **counted})
    if len(frame) - LENGTH_BYTES <= MAX_REPLY_BYTES:
        return frame, descriptors
    error = LoadFailed(f"reply of {len(frame)} bytes: at most {MAX_REPLY_BYTES} are allowed")
    return encode({"id": reply.request_id, **error_body(error)}), ()


def request_of(peer: PeerId, frame: dict[str, object]) -> Requested:
    """Return what a frame asks for.

    Raises:
        FrameError: its id or op is none.
    """
    request_id, op = frame.pop("id", None), frame.pop("op", None)
    if type(request_id) is not int or not 0 <= request_id <= MAX_NUMBER:
        raise FrameError("a request's id must be a whole number from 0 to 2^53 - 1")
    if not isinstance(op, str):
        raise FrameError("a request's op must be a string")
    return Requested(peer, request_id, op, frame)
