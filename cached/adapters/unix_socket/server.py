"""The workers' side of the daemon: one thread accepts and reads all of them, replies go back.

The thread ``cached-epoll`` turns frames (docs/wire.md) into events; replies are sent from the
mailbox thread. No peer can hold up another: reads are bounded per wake-up, requests per
connection and per process (processes.py), and what a peer does not take is kept only up to a limit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

from cached.adapters.unix_socket.connection import (
    IN,
    OUT,
    Connection,
    reply_frame,
    request_of,
    too_many,
)
from cached.adapters.unix_socket.in_flight import InFlight
from cached.adapters.unix_socket.processes import LONG_S, Hooks, Processes
from cached.core.errors import BadRequest, DaemonUnavailable, FrameError, NotPermitted
from cached.core.events import Connected, Disconnected
from cached.core.objects import PeerId
from cached.core.wire import MAX_REPLY_BYTES, encode, error_body

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from cached.adapters.unix_socket.processes import Process
    from cached.core.effects import Reply
    from cached.core.errors import CachedError
    from cached.ports import Clock, Lane

    class Listening(Protocol):
        """See adapters/listening_socket.py."""

        socket: socket.socket

        def admits(self, uid: int, gid: int) -> bool: ...  # noqa: D102
        def has_place(  # noqa: D102
            self, uid: int, count: int, of_uid: int, of_process: int, most: int
        ) -> bool: ...
        def close(self) -> None: ...  # noqa: D102


MAX_CONNECTIONS = 1024
ACCEPTS_PER_WAKE_UP = 64
LOOKS_PER_ROUND = 128  # of the connections of one process
READ_BYTES = 64 << 10  # per peer and wake-up, so that nobody waits long for his turn
MAX_UNSENT_BYTES = 2 * MAX_REPLY_BYTES  # of replies; a process has no more than is still free
FAULT_S = 0.002  # what a connection that has to be closed counts as: its process rests
SOON_S = 0.001
PAUSE_S = 0.02  # until the next look whether there is room for another connection

_GONE = select.EPOLLHUP | select.EPOLLERR


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
    """Accepts workers, posts what they say, sends them replies.

    Made and stopped by the host; ``send`` is for the mailbox thread.

    Args:
        listening: closed by ``stop``.
        lane: makes the place in the mailbox for what peers of one process say, which is
            ``Connected``, then each ``Requested``, then ``Disconnected``. What it is given is
            called whenever an event was handled, with the processor time that it took.
        clock: monotonic time.
        max_connections: more are told so and closed.
        max_in_flight: descriptors that may be sent and not received yet; None: as the kernel says.
    """

    def __init__(
        self,
        listening: Listening,
        lane: Callable[[Callable[[float], None]], Lane],
        clock: Clock,
        *,
        max_connections: int = MAX_CONNECTIONS,
        max_in_flight: int | None = None,
    ) -> None:
        self._listening = listening
        self._max_connections = max_connections
        message = f"too many connections are open: {max_connections} in all, of one process fewer"
        self._no_place = _told(DaemonUnavailable(message, hint="close some; try again"))
        # Written by the epoll thread only, read by the mailbox thread with one get().
        self._peers: dict[int, Connection] = {}
        self._by_fd: dict[int, Connection] = {}  # also those that may not be closed yet
        self._last_peer = 0
        self._is_paused = False
        self._is_stopping = False
        self._refused = self._malformed = self._unread = 0
        self._in_flight = InFlight(max_in_flight)
        self._epoll = select.epoll()
        self._processes = Processes(Hooks(lane, self._wake, self._rests, clock.now_s))
        self._resting: set[Process] = set()  # those with connections that wait for its end
        self._turns: deque[Connection] = deque()  # those that waited for their turn
        self._wake_fd = os.eventfd(0)
        self._epoll.register(self._wake_fd, IN)
        self._epoll.register(listening.socket, IN)
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
        for connection in list(self._by_fd.values()):
            connection.close()
        self._peers.clear()
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
                self._send(connection, *reply_frame(reply, descriptors))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _send(self, connection: Connection, frame: bytes, descriptors: tuple[int, ...]) -> None:
        with connection.lock:
            if not connection.is_open:
                return
            connection.outstanding -= 1
            try:
                if descriptors and not self._in_flight.take(connection, len(descriptors)):
                    connection.tell(too_many(descriptors))
                elif connection.send(frame, descriptors) and self._may_keep(connection):
                    connection.watch(self._epoll)
                    return
                self._unread += 1
            except OSError as error:  # or else the peer has gone
                if error.errno == errno.ETOOMANYREFS:
                    connection.tell(too_many(descriptors))
            connection.hang_up()

    def _may_keep(self, connection: Connection) -> bool:
        """Return whether its process keeps no more unsent than may be kept still."""
        of_process = of_others = 0
        if connection.unsent:
            for each in list(self._peers.values()):
                if each.process is connection.process:
                    of_process += len(each.unsent)
                else:
                    of_others += len(each.unsent)
        return 2 * of_process <= MAX_UNSENT_BYTES - of_others

    def _wake(self, turn: Sequence[Connection]) -> None:
        """Have connections looked at; any thread."""
        self._turns.extend(turn)
        # The thread that looks does not sleep while there are others: it finds these as well.
        if len(self._turns) <= len(turn) and threading.get_ident() != self._thread.ident:
            os.eventfd_write(self._wake_fd, 1)

    def _rests(self, process: Process) -> None:
        """Have a process looked at when it rests no more; any thread."""
        if process not in self._resting:
            self._resting.add(process)
            if threading.get_ident() != self._thread.ident:
                os.eventfd_write(self._wake_fd, 1)

    # --- all below: the epoll thread

    def _run(self) -> None:
        while not self._is_stopping:
            ready = self._epoll.poll(self._longest_s())
            is_knocking = self._is_paused
            looks: Counter[Process] = Counter()
            for fd, mask in ready:
                connection = self._by_fd.get(fd)
                if connection is not None and connection.peer not in self._peers:
                    self._close(connection)
                elif connection is not None:
                    looks[connection.process] += 1
                    if looks[connection.process] <= LOOKS_PER_ROUND:  # poll names it again
                        self._serve(connection, mask)
                elif fd == self._wake_fd:
                    os.eventfd_read(fd)
                else:
                    is_knocking = True
            for _ in range(len(self._turns)):
                connection = self._turns.popleft()
                if connection.peer in self._peers:
                    self._serve(connection, 0)
            if is_knocking:
                # Last: a number that is given out again here is in no event of this round.
                self._accept()

    def _longest_s(self) -> float | None:
        """Let those go on that have rested; return how long nothing is to be done then."""
        for process in tuple(self._resting):
            if not process.rest_s:
                self._resting.discard(process)
                process.resume()  # if it rests again by now, it is back
        waits = [max(process.rest_s, SOON_S) for process in tuple(self._resting)]
        waits += [PAUSE_S] if self._is_paused else []
        return 0 if self._turns else min(waits, default=None)

    def _accept(self) -> None:
        has_room = True
        for _ in range(ACCEPTS_PER_WAKE_UP):
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
            self._epoll.modify(self._listening.socket, IN if has_room else 0)

    def _welcome(self, accepted: socket.socket) -> None:
        raw = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = struct.unpack("iII", raw)
        process = self._processes.of(uid, pid)
        if not self._listening.admits(uid, gid):
            self._refuse(accepted, _told(NotPermitted(f"uid {uid} may not connect to this daemon")))
        elif not self._has_place(process):
            self._refuse(accepted, self._no_place)
        else:
            self._last_peer += 1
            connection = Connection(accepted, PeerId(self._last_peer), process)
            self._peers[connection.peer] = self._by_fd[accepted.fileno()] = connection
            self._processes.joined(process)
            accepted.setblocking(False)
            if process.is_crowded or not process.has_room:
                process.hold(connection)
                connection.watched = 0  # its end alone is noticed, until it is its turn
            else:
                self._introduce(connection)
            self._epoll.register(accepted, connection.watched)
            process.resume()

    def _introduce(self, connection: Connection) -> None:
        connection.is_known = True
        uid, pid = connection.process.key
        connection.process.lane.post(Connected(connection.peer, uid, pid))

    def _has_place(self, process: Process) -> bool:
        uid, count = process.key[0], len(self._by_fd)
        of_uid = self._processes.of_uid(uid)
        return self._listening.has_place(
            uid, count, of_uid, process.connections, self._max_connections
        )

    def _refuse(self, accepted: socket.socket, frame: bytes) -> None:
        """Say why, if the kernel takes it, and close; cheap, for they may come by the thousand."""
        self._refused += 1
        with contextlib.suppress(OSError):
            accepted.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        accepted.close()

    def _serve(self, connection: Connection, mask: int) -> None:
        """Look at a connection, and note what that took."""
        began_s = time.thread_time()
        self._look_at(connection, mask)
        connection.process.spent(time.thread_time() - began_s)
        connection.process.resume()

    def _look_at(self, connection: Connection, mask: int) -> None:
        """Send what is left, take up to as many requests as may be outstanding."""
        is_alive = False
        connection.process.took_turn(connection)
        if not connection.is_known:
            if mask & _GONE:  # it has not waited for its turn
                self._forget(connection)
                return
            self._introduce(connection)
        try:
            with connection.lock:
                connection.flush()
                is_waiting = connection.is_full or connection.is_parked
                is_alive = connection.is_open and not (mask & _GONE and is_waiting)
            if is_alive and not connection.is_parked:
                self._take_frames(connection)
                is_waiting = connection.is_full or connection.is_parked
                is_alive = is_waiting or self._read(connection)
        except FrameError as error:
            self._malformed += 1
            connection.process.spent(FAULT_S)
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
            connection.process.lane.post(Disconnected(connection.peer))

    def _read(self, connection: Connection) -> bool:
        """Read once; return whether more can come."""
        try:
            data = connection.socket.recv(READ_BYTES)
        except BlockingIOError:
            return True
        connection.frames.feed(data)
        self._take_frames(connection)
        return bool(data)

    def _take_frames(self, connection: Connection) -> None:
        process = connection.process
        connection.is_held = True
        while not connection.is_full:
            if not process.has_room:
                process.hold(connection)
                break
            began_s = time.thread_time()
            frame = connection.frames.next_frame()
            cost_s = time.thread_time() - began_s
            if frame is None:
                connection.is_held = False
                break
            request = request_of(connection.peer, frame)
            with connection.lock:
                connection.outstanding += 1
            process.lane.post(request)
            if process.is_crowded or cost_s > LONG_S:  # others wait as well: one each
                process.hold(connection)
                break
        self._processes.count_buffered(connection)

    def _forget(self, connection: Connection) -> None:
        with connection.lock:
            del self._peers[connection.peer]
            connection.is_open = False
            connection.unsent.clear()
        connection.process.forget(connection)
        connection.frames.clear()
        self._processes.count_buffered(connection)
        if not self._close(connection):
            # The kernel wakes us once whenever the peer receives something, and when it goes.
            connection.hang_up()
            self._epoll.modify(connection.socket, select.EPOLLET | OUT)

    def _close(self, connection: Connection) -> bool:
        """Close what was forgotten, unless descriptors are unread on it: who has them counts."""
        if not self._in_flight.has_received(connection):
            return False
        if self._by_fd.pop(connection.socket.fileno(), None) is not None:
            self._processes.left(connection)
            connection.close()  # which takes it out of the epoll set as well
        return True


def _told(error: CachedError) -> bytes:
    """Return the frame that says why a connection is closed."""
    return encode({"id": None, **error_body(error)})
