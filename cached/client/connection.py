"""One connection to the daemon: many threads ask, replies come in any order.

One of the waiting threads reads the socket and hands the others their replies; when it has
its own, another takes over. So no thread of ours exists, and a slow wait holds nobody up.
"""

from __future__ import annotations

import array
import os
import select
import socket
import threading
from typing import TYPE_CHECKING

from cached.client.deadline import Deadline
from cached.core import wire
from cached.core.errors import CachedError, DaemonUnavailable, FrameError, TimedOut

if TYPE_CHECKING:
    from collections.abc import Mapping

RECEIVE_BYTES = 256 << 10
HELLO_ID = 0
_ANCILLARY_BYTES = socket.CMSG_SPACE(wire.MAX_DESCRIPTORS * array.array("i").itemsize)
_RETRY_S = 0.02  # a worker that starts together with the daemon
_ERRNO_TEXT = {
    FileNotFoundError: "nothing is there",
    ConnectionRefusedError: "nobody listens on it",
    PermissionError: "this user may not connect to it",
}


class Reply:
    """What the daemon answered.

    Attributes:
        body: the members of the reply.
        descriptors: that came with it; the caller closes them.
    """

    __slots__ = ("body", "descriptors")

    def __init__(self, body: dict[str, object], descriptors: list[int]) -> None:
        self.body = body
        self.descriptors = descriptors


def connect(address: str, deadline: Deadline, *, is_patient: bool = False) -> Connection:
    """Return a connection to the daemon.

    Args:
        address: a path, or ``@NAME`` for an abstract socket.
        deadline: of the attempts.
        is_patient: try again until the deadline if nobody listens yet.

    Raises:
        DaemonUnavailable: nobody listens there.
    """
    name = "\0" + address[1:] if address.startswith("@") else address
    while True:
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connecting.connect(name)
        except OSError as error:
            connecting.close()
            if is_patient and not deadline.has_passed and not isinstance(error, PermissionError):
                deadline.sleep(_RETRY_S)
                continue
            why = _ERRNO_TEXT.get(type(error), error.strerror or str(error))
            message = f"cannot connect to the daemon at {address}: {why}"
            hint = "start it (cached serve), or name its socket with CACHED_SOCKET"
            raise DaemonUnavailable(message, hint=hint) from error
        return Connection(connecting, address)


class Connection:
    """Requests and replies; any thread of the process that made it.

    ``close`` ends it; so does its garbage collection. A child of fork must not use it: it
    connects anew, and only keeps the inherited socket open (``pid`` tells them apart).

    Attributes:
        pid: of the process that may use it.
        socket: for whoever keeps the lease.
    """

    __slots__ = (
        "_address",
        "_condition",
        "_descriptors",
        "_error",
        "_frames",
        "_is_reading",
        "_last_id",
        "_replies",
        "_waiting",
        "pid",
        "socket",
    )

    def __init__(self, connected: socket.socket, address: str) -> None:
        self.pid = os.getpid()
        self.socket = connected
        self._address = address
        self._condition = threading.Condition()
        self._frames = wire.FrameBuffer(wire.MAX_REPLY_BYTES)
        self._descriptors: list[int] = []
        self._replies: dict[int, Reply] = {}
        self._waiting: set[int] = set()
        self._is_reading = False
        self._last_id = HELLO_ID
        self._error: CachedError | None = None
        self._send(self._frame("hello", HELLO_ID, _greeting()))
        self._waiting.add(HELLO_ID)

    def call(self, op: str, fields: Mapping[str, object], deadline: Deadline) -> Reply:
        """Send a request and wait for its reply.

        Raises:
            CachedError: the daemon's answer, as its type; DaemonUnavailable when it is gone;
                TimedOut at the deadline, and the daemon is told to give up.
        """
        with self._condition:
            self._last_id += 1
            request_id = self._last_id
            self._waiting.add(request_id)
            self._send(self._frame(op, request_id, fields))
        try:
            reply = self._await(request_id, deadline)
        except TimedOut:
            self._give_up(request_id)
            raise
        if "error" in reply.body:
            for descriptor in reply.descriptors:
                os.close(descriptor)
            raise wire.error_from(reply.body)
        return reply

    def greeted(self, deadline: Deadline) -> dict[str, object]:
        """Wait for the answer to the greeting; once.

        Raises:
            ProtocolMismatch: the daemon is of another generation.
        """
        body = self._await(HELLO_ID, deadline).body
        if "error" in body:
            raise wire.error_from(body)
        return body

    def close(self) -> None:
        """Close the socket and what came unasked. Never shuts it down: a fork may share it."""
        self.socket.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    @staticmethod
    def _frame(op: str, request_id: int, fields: Mapping[str, object]) -> bytes:
        return wire.encode({"id": request_id, "op": op, **fields})

    def _send(self, frame: bytes) -> None:
        try:
            self.socket.sendall(frame, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception | None = None) -> DaemonUnavailable:
        why = f" ({error})" if error else ""
        message = f"the daemon at {self._address} closed the connection{why}"
        hint = "what is mapped stays valid; open the model again when the daemon is back"
        return DaemonUnavailable(message, hint=hint)

    def _await(self, request_id: int, deadline: Deadline) -> Reply:
        while True:
            with self._condition:
                while self._is_reading and request_id not in self._replies and not self._error:
                    if not self._condition.wait(deadline.left_s) and deadline.has_passed:
                        break
                if request_id in self._replies:
                    self._waiting.discard(request_id)
                    return self._replies.pop(request_id)
                if self._error is not None:
                    raise self._error
                if deadline.has_passed:
                    self._waiting.discard(request_id)
                    message = f"no reply from the daemon at {self._address} in time"
                    raise TimedOut(message, hint="give more time, or look at: cached status")
                self._is_reading = True
            self._read(deadline)

    def _read(self, deadline: Deadline) -> None:
        """Read what comes until the deadline, hand it out, and let others read."""
        error: CachedError | None = None
        try:
            self._receive(deadline)
        except (OSError, EOFError) as lost:
            error = self._lost(lost if isinstance(lost, OSError) else None)
        except CachedError as told:
            error = told
        finally:
            with self._condition:
                self._is_reading = False
                self._error = error or self._error
                self._condition.notify_all()

    def _receive(self, deadline: Deadline) -> None:
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        if not poll.poll(deadline.left_ms):
            return
        data, ancillary, flags, _ = self.socket.recvmsg(
            RECEIVE_BYTES, _ANCILLARY_BYTES, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                self._descriptors.extend(received)
        if flags & socket.MSG_CTRUNC:
            message = "descriptors were lost: the process may not open any more"
            raise FrameError(message, hint="raise the limit: ulimit -n")
        if not data:
            raise EOFError
        self._frames.feed(data)
        while (body := self._frames.next_frame()) is not None:
            self._hand_out(body)

    def _hand_out(self, body: dict[str, object]) -> None:
        count = body.get("fds", 0)
        if type(count) is not int or not 0 <= count <= len(self._descriptors):
            message = f"{count!r} descriptors were announced, {len(self._descriptors)} came"
            raise FrameError(message)
        descriptors = self._descriptors[:count]
        del self._descriptors[:count]
        request_id = body.get("id")
        if request_id is None and "error" in body:  # about the connection: it is being closed
            raise wire.error_from(body)
        with self._condition:
            if type(request_id) is int and request_id in self._waiting:
                self._replies[request_id] = Reply(body, descriptors)
                return
        for descriptor in descriptors:  # a late reply: nobody waits for it any more
            os.close(descriptor)

    def _give_up(self, request_id: int) -> None:
        with self._condition:
            self._last_id += 1
            frame = self._frame("cancel", self._last_id, {"request": request_id})
            try:
                self.socket.send(frame, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except OSError:
                return  # the daemon is gone or does not read: nothing to give up


def _greeting() -> dict[str, object]:
    import cached

    return {
        "protocol": list(wire.PROTOCOL),
        "client": f"cached-python/{cached.__version__}",
    }
