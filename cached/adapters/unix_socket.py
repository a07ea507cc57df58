"""The workers' side of the daemon: one thread accepts and reads all of them, replies go back.

The thread ``cached-epoll`` turns frames (docs/wire.md) into events; replies are sent from the
mailbox thread. No peer can hold up another: reads are bounded per wake-up, requests per
connection, and what a peer does not take is kept only up to a limit.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import threading
from typing import TYPE_CHECKING, NamedTuple

from cached.core.errors import BadRequest, DaemonUnavailable, FrameError, LoadFailed, NotPermitted
from cached.core.events import Connected, Disconnected, Requested
from cached.core.objects import PeerId
from cached.core.wire import (
    LENGTH_BYTES,
    MAX_NUMBER,
    MAX_OUTSTANDING,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    FrameBuffer,
    encode,
    error_body,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from cached.core.effects import Reply
    from cached.core.errors import CachedError
    from cached.ports import Post

    class Listening(Protocol):
        """See adapters/listening_socket.py."""

        socket: socket.socket

        def admits(self, uid: int, gid: int) -> bool: ...  # noqa: D102
        def has_place(self, uid: int, connected: Sequence[int], most: int) -> bool: ...  # noqa: D102
        def close(self) -> None: ...  # noqa: D102


MAX_CONNECTIONS = 1024
MAX_EVENTS_WAITING = 4096  # in the mailbox: beyond, connections wait in the kernel's backlog
ACCEPTS_PER_WAKE_UP = 64
READ_BYTES = 64 << 10  # per peer and wake-up, so that nobody waits long for his turn
# Of replies behind one that the kernel has not taken whole: only who does not read gets there.
MAX_WAITING_BYTES = 256 << 10
# Of one peer: the kernel counts those of all against RLIMIT_NOFILE (unix(7), ETOOMANYREFS).
MAX_UNREAD_DESCRIPTORS = 512
MAX_PARTIAL_BYTES = 16 << 20  # of requests that are not whole yet, of all peers together
PAUSE_S = 0.02  # until the next look whether there is room for another connection

_IN, _OUT, _GONE = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR


class Counts(NamedTuple):
    """What became of connections.

    Attributes:
        connections: open now.
        refused: too many were open, or the peer's uid may not connect.
        malformed: closed for a frame that breaks the protocol.
        unread: closed because it did not read its replies.
    """

    connections: int
    refused: int
    malformed: int
    unread: int


class UnixSocket:
    """Accepts workers, posts what they say, sends them replies. The host makes and stops it.

    Args:
        listening: closed by ``stop``.
        post: gets ``Connected``, then each ``Requested`` of a peer, then ``Disconnected``.
        waiting: how many events are in the mailbox (default: 0); while it is full, nobody is
            accepted.
        max_connections: more are told so and closed.
    """

    def __init__(
        self,
        listening: Listening,
        post: Post,
        *,
        waiting: Callable[[], int] = int,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._listening = listening
        self._post = post
        self._waiting = waiting
        self._max_connections = max_connections
        # Written by the epoll thread only, read by the mailbox thread with one get().
        self._peers: dict[int, _Connection] = {}
        self._by_fd: dict[int, _Connection] = {}
        self._last_peer = 0
        self._is_paused = self._is_stopping = False
        self._refused = self._malformed = self._unread = 0
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0)
        self._epoll.register(self._wake_fd, _IN)
        self._epoll.register(listening.socket, _IN)
        self._thread = threading.Thread(target=self._run, name="cached-epoll", daemon=True)

    def start(self) -> None:
        """Begin to accept; once."""
        self._thread.start()

    def stop(self) -> None:
        """Close all connections and the listening socket, and join the thread. Posts nothing."""
        if self._wake_fd < 0:
            return
        self._is_stopping = True
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._listening.close()
        for connection in list(self._peers.values()):
            self._forget(connection)
        self._epoll.close()
        os.close(self._wake_fd)
        self._wake_fd = -1

    def counts(self) -> Counts:
        """Return the counters; any thread."""
        return Counts(len(self._peers), self._refused, self._malformed, self._unread)

    def send(self, reply: Reply, descriptors: tuple[int, ...]) -> None:
        """Send without blocking; the descriptors are closed before it returns.

        What the kernel does not take at once goes out as the peer reads. A peer that has left
        too much unread, or to which descriptors cannot go at once, loses its connection.
        """
        try:
            connection = self._peers.get(reply.peer)
            if connection is not None:
                self._send(connection, *_message(reply, descriptors))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _send(self, connection: _Connection, frame: bytes, descriptors: tuple[int, ...]) -> None:
        with connection.lock:
            if not connection.is_open:
                return
            connection.outstanding -= 1
            try:
                if connection.send(frame, descriptors) and self._may_keep(connection.unsent):
                    connection.watch(self._epoll)
                    return
                self._unread += 1
            except OSError as error:  # or else the peer has gone
                if error.errno == errno.ETOOMANYREFS:
                    connection.tell(_too_many(descriptors))
            connection.hang_up()

    def _may_keep(self, unsent: bytearray) -> bool:
        kept = (len(each.unsent) for each in list(self._peers.values()))
        return not unsent or sum(kept) <= MAX_REPLY_BYTES

    # --- all below: the epoll thread

    def _run(self) -> None:
        while not self._is_stopping:
            ready = self._epoll.poll(PAUSE_S if self._is_paused else None)
            is_knocking = self._is_paused
            for fd, mask in ready:
                connection = self._by_fd.get(fd)
                if connection is not None:
                    self._serve(connection, mask)
                elif fd != self._wake_fd:
                    is_knocking = True
            if is_knocking:
                # Last: a number that is given out again here is in no event of this round.
                self._accept()

    def _accept(self) -> None:
        has_room = self._waiting() < MAX_EVENTS_WAITING
        for _ in range(ACCEPTS_PER_WAKE_UP if has_room else 0):
            try:
                accepted, _address = self._listening.socket.accept()
            except BlockingIOError:
                break
            except OSError:
                has_room = False  # no descriptor is free: others wait in the backlog
                break
            self._welcome(accepted)
        if self._is_paused == has_room:
            self._is_paused = not has_room
            self._epoll.modify(self._listening.socket, _IN if has_room else 0)

    def _welcome(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        raw = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = struct.unpack("iII", raw)
        connection = _Connection(accepted, PeerId(self._last_peer + 1), uid)
        connected = [each.uid for each in self._peers.values()]
        if not self._listening.admits(uid, gid):
            self._refuse(connection, NotPermitted(f"uid {uid} may not connect to this daemon"))
        elif not self._listening.has_place(uid, connected, self._max_connections):
            message = f"{len(connected)} connections are open, which is the most for uid {uid}"
            self._refuse(connection, DaemonUnavailable(message, hint="close some; try again"))
        else:
            self._last_peer += 1
            self._peers[connection.peer] = self._by_fd[accepted.fileno()] = connection
            self._post(Connected(connection.peer, uid, pid))
            self._epoll.register(accepted, _IN)

    def _refuse(self, connection: _Connection, error: CachedError) -> None:
        self._refused += 1
        connection.tell(error)  # nobody else has it: no lock
        connection.close()

    def _serve(self, connection: _Connection, mask: int) -> None:
        """Send what is left, take up to as many requests as may be outstanding."""
        is_alive = False
        try:
            with connection.lock:
                connection.flush()
                is_alive = connection.is_open and not (mask & _GONE and connection.is_full)
            if is_alive:
                self._take_frames(connection)
                is_alive = connection.is_full or self._read(connection)
        except FrameError as error:
            self._malformed += 1
            with connection.lock:
                connection.tell(BadRequest(error.message, hint="see docs/wire.md"))
            is_alive = False
        except OSError:
            is_alive = False
        if is_alive:
            with connection.lock:
                connection.watch(self._epoll)
        else:
            self._forget(connection)
            self._post(Disconnected(connection.peer))

    def _read(self, connection: _Connection) -> bool:
        """Read once; return whether more can come."""
        try:
            data = connection.socket.recv(READ_BYTES)
        except BlockingIOError:
            return True
        connection.frames.feed(data)
        connection.partial_bytes += len(data)
        self._take_frames(connection)
        if connection.partial_bytes > READ_BYTES:
            partial_bytes = sum(each.partial_bytes for each in self._peers.values())
            if partial_bytes > MAX_PARTIAL_BYTES:
                message = f"{partial_bytes} bytes of unfinished requests have come from all peers"
                raise FrameError(message)
        return bool(data)

    def _take_frames(self, connection: _Connection) -> None:
        while not connection.is_full:
            frame = connection.frames.next_frame()
            if frame is None:
                connection.is_held = False
                return
            request = _request(connection.peer, frame)
            connection.partial_bytes = 0  # the start of the next one is not worth counting
            with connection.lock:
                connection.outstanding += 1
            self._post(request)
        connection.is_held = True

    def _forget(self, connection: _Connection) -> None:
        with connection.lock:
            del self._by_fd[connection.socket.fileno()]
            del self._peers[connection.peer]
            connection.close()  # which takes it out of the epoll set as well


class _Connection:
    """One worker. ``lock`` guards all but ``frames``, which is the epoll thread's."""

    __slots__ = (
        *("frames", "is_held", "is_open", "lock", "outstanding", "partial_bytes"),
        *("peer", "socket", "uid", "unread_descriptors", "unsent", "waiting_bytes", "watched"),
    )

    def __init__(self, accepted: socket.socket, peer: PeerId, uid: int) -> None:
        self.socket = accepted
        self.peer = peer
        self.uid = uid
        self.frames = FrameBuffer(MAX_REQUEST_BYTES)
        self.lock = threading.Lock()
        self.unsent = bytearray()
        self.outstanding = self.partial_bytes = self.waiting_bytes = self.unread_descriptors = 0
        self.watched = _IN
        self.is_held = False
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
            if descriptors and not self._may_carry(len(descriptors)):
                return False
            with contextlib.suppress(BlockingIOError):
                sent = self.socket.sendmsg([frame], _ancillary(descriptors), socket.MSG_NOSIGNAL)
        self.unsent += memoryview(frame)[sent:]
        return sent > 0 or not descriptors

    def _may_carry(self, count: int) -> bool:
        if fcntl.ioctl(self.socket, termios.TIOCOUTQ, b"\0\0\0\0") == b"\0\0\0\0":
            self.unread_descriptors = 0  # the peer has received all that was sent
        self.unread_descriptors += count
        return self.unread_descriptors <= MAX_UNREAD_DESCRIPTORS

    def flush(self) -> None:
        """Send what was left as far as it goes."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent, socket.MSG_NOSIGNAL)]

    def watch(self, epoll: select.epoll) -> None:
        """Ask to be woken for what this connection can do next.

        No poll sees frames that were held back: then it is woken as soon as it can be written to.
        """
        wanted = 0 if self.is_full else _IN
        if self.unsent or (self.is_held and wanted):
            wanted |= _OUT
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


def _too_many(descriptors: tuple[int, ...]) -> DaemonUnavailable:
    message = f"cannot send {len(descriptors)} files: too many are sent that nobody received yet"
    return DaemonUnavailable(message, hint="raise the daemon's limit of open files (ulimit -n)")


def _ancillary(descriptors: tuple[int, ...]) -> list[tuple[int, int, array.array[int]]]:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    return [rights] if descriptors else []


def _message(reply: Reply, descriptors: tuple[int, ...]) -> tuple[bytes, tuple[int, ...]]:
    counted = {"fds": len(descriptors)} if descriptors else {}
    frame = encode({"id": reply.request_id, **reply.body, **counted})
    if len(frame) - LENGTH_BYTES <= MAX_REPLY_BYTES:
        return frame, descriptors
    error = LoadFailed(f"reply of {len(frame)} bytes: at most {MAX_REPLY_BYTES} are allowed")
    return encode({"id": reply.request_id, **error_body(error)}), ()


def _request(peer: PeerId, frame: dict[str, object]) -> Requested:
    request_id, op = frame.pop("id", None), frame.pop("op", None)
    if type(request_id) is not int or not 0 <= request_id <= MAX_NUMBER:
        raise FrameError("a request's id must be a whole number from 0 to 2^53 - 1")
    if not isinstance(op, str):
        raise FrameError("a request's op must be a string")
    return Requested(peer, request_id, op, frame)
