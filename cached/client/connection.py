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
from cached.client.mappings import close_all
from cached.core import wire
from cached.core.errors import BadRequest, CachedError, DaemonUnavailable, FrameError, TimedOut

if TYPE_CHECKING:
    from collections.abc import Mapping

RECEIVE_BYTES = 256 << 10
HELLO_ID = 0
_ANCILLARY_BYTES = socket.CMSG_SPACE(wire.MAX_DESCRIPTORS * array.array("i").itemsize)
MAX_WAITS = 12
"""Slow requests under way at once. The daemon reads none beyond MAX_OUTSTANDING: what is left over
is for quick ones, and for a ``cancel`` to get through."""
_SLOW = {"wait", "arrivals"}
_CANCEL_S = 0.05  # for other threads to send theirs; a daemon that does not read gets none


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


class Connection:
    """Requests and replies; any thread of the process that made it.

    ``close`` ends it; ``retire`` does once no call is under way. A child of fork must not use it:
    it connects anew, and only keeps the inherited socket open (``pid`` tells them apart).

    Attributes:
        address: as ``connect`` got it.
        pid: of the process that may use it.
        socket: non-blocking; for whoever keeps the lease.
    """

    __slots__ = (
        "_changed",
        "_descriptors",
        "_error",
        "_frames",
        "_is_retired",
        "_last_id",
        "_lock",
        "_reader_id",
        "_replies",
        "_sending",
        "_turns",
        "_users",
        "_waiting",
        "address",
        "pid",
        "socket",
    )

    def __init__(self, connected: socket.socket, address: str) -> None:
        self.pid = os.getpid()
        self.socket = connected
        self.address = address
        self._lock = threading.Lock()  # guards all that follows, unless it says otherwise
        self._changed = threading.Condition(self._lock)
        self._sending = threading.Lock()  # for the length of a frame
        self._turns = threading.Semaphore(MAX_WAITS)  # of slow requests
        self._frames = wire.FrameBuffer(wire.MAX_REPLY_BYTES)  # the reader's
        self._descriptors: list[int] = []  # the reader's
        self._replies: dict[int, Reply] = {}
        self._waiting = {HELLO_ID}
        self._reader_id: int | None = None  # the request of the thread that reads
        self._last_id = HELLO_ID
        self._error: CachedError | None = None
        self._users = 0  # calls under way
        self._is_retired = False
        self._send(_frame("hello", HELLO_ID, _greeting()), Deadline(0))

    @property
    def is_lost(self) -> bool:
        """Whether it has failed, or the daemon has closed it: nothing more can be asked."""
        if self._error is not None:
            return True
        poll = select.poll()
        poll.register(self.socket, 0)  # POLLHUP comes unasked: unix(7), poll(2)
        return bool(poll.poll(0))

    def call(
        self, op: str, fields: Mapping[str, object], deadline: Deadline, what: str = ""
    ) -> Reply:
        """Send a request and wait for its reply.

        Args:
            op: the operation (docs/wire.md).
            fields: its members.
            deadline: when to give up; the daemon is told.
            what: is waited for, in words, for the error.

        Raises:
            CachedError: the daemon's answer, as its type; DaemonUnavailable when it is gone;
                TimedOut at the deadline; BadRequest for one that is too long to send.
        """
        with self._lock:
            self._users += 1
        try:
            reply = self._in_turn(op, fields, deadline, what or f"the answer to {op}")
        finally:
            with self._lock:
                self._users -= 1
                is_over = self._is_retired and not self._users
            if is_over:
                self.close()
        if "error" in reply.body:
            close_all(reply.descriptors)
            raise wire.error_from(reply.body)
        return reply

    def _in_turn(
        self, op: str, fields: Mapping[str, object], deadline: Deadline, what: str
    ) -> Reply:
        if op not in _SLOW:
            return self._ask(op, fields, deadline, what)
        while not self._turns.acquire(timeout=deadline.left_s):
            if deadline.has_passed:
                raise _in_vain(what, deadline)
        try:
            return self._ask(op, fields, deadline, what)
        finally:
            self._turns.release()

    def _ask(self, op: str, fields: Mapping[str, object], deadline: Deadline, what: str) -> Reply:
        with self._lock:
            self._last_id += 1
            request_id = self._last_id
        frame = _frame(op, request_id, fields)
        with self._lock:
            self._waiting.add(request_id)
        try:
            self._send(frame, deadline)
            return self._await(request_id, deadline, what)
        except BaseException:  # a time-out, or a KeyboardInterrupt
            self._give_up(request_id)
            raise

    def greeted(self, deadline: Deadline) -> dict[str, object]:
        """Wait for the answer to the greeting; once.

        Raises:
            ProtocolMismatch: the daemon is of another generation.
        """
        return self._await(HELLO_ID, deadline, "its greeting").body

    def retire(self) -> None:
        """Close it once no call is under way: one that is lost, and was replaced."""
        with self._lock:
            self._is_retired = True
            is_over = not self._users
        if is_over:
            self.close()

    def close(self) -> None:
        """Close the socket and what came unasked. Never shuts it down: a fork may share it."""
        self.socket.close()
        close_all(self._descriptors)
        self._descriptors.clear()
        while self._replies:
            close_all(self._replies.popitem()[1].descriptors)

    # --- sending

    def _send(self, frame: bytes, deadline: Deadline) -> None:
        """Send all of a frame; that the daemon is gone is found out by who reads what it said."""
        left_s = deadline.left_s
        if not self._sending.acquire(timeout=-1 if left_s is None else left_s):
            return
        left = memoryview(frame)
        try:
            while left:
                try:
                    left = left[self.socket.send(left, socket.MSG_NOSIGNAL) :]
                except BlockingIOError:
                    if deadline.has_passed:
                        break
                    _poll(self.socket, select.POLLOUT, deadline)
        except OSError:
            pass
        finally:
            self._sending.release()
            if 0 < len(left) < len(frame):  # nothing can follow half a frame
                self._fail(self._lost(" in the middle of a request"))

    def _give_up(self, request_id: int) -> None:
        with self._lock:
            self._waiting.discard(request_id)
            if self._reader_id == request_id:  # interrupted before it began to read
                self._reader_id = None
                self._changed.notify_all()
            reply = self._replies.pop(request_id, None)
            is_over = self._error is not None
            self._last_id += 1
            frame = _frame("cancel", self._last_id, {"request": request_id})
        if reply is not None:
            close_all(reply.descriptors)
        elif not is_over:
            self._send(frame, Deadline(_CANCEL_S))

    # --- receiving

    def _await(self, request_id: int, deadline: Deadline, what: str) -> Reply:
        while True:
            with self._lock:
                while (
                    self._reader_id is not None
                    and request_id not in self._replies
                    and self._error is None
                ):
                    if not self._changed.wait(deadline.left_s) and deadline.has_passed:
                        break
                if request_id in self._replies:
                    self._waiting.discard(request_id)
                    return self._replies.pop(request_id)
                if self._error is not None:
                    raise type(self._error)(self._error.message, hint=self._error.hint)
                if deadline.has_passed:
                    raise _in_vain(what, deadline)
                self._reader_id = request_id
            self._read(deadline)

    def _read(self, deadline: Deadline) -> None:
        """Read what comes until the deadline, hand it out, and let others read."""
        try:
            self._receive(deadline)
        except CachedError as error:
            self._fail(error)
        except EOFError:
            self._fail(self._lost())
        except (OSError, ValueError) as error:
            self._fail(self._lost(f" ({error})"))
        finally:
            with self._lock:
                self._reader_id = None
                self._changed.notify_all()

    def _receive(self, deadline: Deadline) -> None:
        if not _poll(self.socket, select.POLLIN, deadline):
            return
        data, ancillary, flags, _ = self.socket.recvmsg(
            RECEIVE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                self._descriptors.extend(received)
        if flags & socket.MSG_CTRUNC:
            message = "descriptors were lost: this process may not open any more"
            raise FrameError(message, hint="raise its limit (ulimit -n) and open the model again")
        if not data:
            raise EOFError
        self._frames.feed(data)
        while (body := self._frames.next_frame()) is not None:
            self._hand_out(body)

    def _hand_out(self, body: dict[str, object]) -> None:
        count = body.get("fds", 0)
        if type(count) is not int or not 0 <= count <= len(self._descriptors):
            message = f"{count!r:.64} descriptors were announced, {len(self._descriptors)} came"
            raise FrameError(message)
        request_id = body.get("id")
        if request_id == HELLO_ID and "error" not in body:
            wire.check_protocol(body.get("protocol"), peer="daemon")
        elif "error" in body and (
            request_id is None or request_id == HELLO_ID
        ):  # about the whole connection
            raise wire.error_from(body)
        descriptors = self._descriptors[:count]
        del self._descriptors[:count]
        with self._lock:
            if type(request_id) is int and request_id in self._waiting:
                self._replies[request_id] = Reply(body, descriptors)
                return
        close_all(descriptors)  # a late reply: nobody waits for it any more

    def _fail(self, error: CachedError) -> None:
        with self._lock:
            self._error = self._error or error
            self._changed.notify_all()

    def _lost(self, why: str = "") -> DaemonUnavailable:
        message = f"the daemon at {self.address} closed the connection{why}"
        hint = "what is mapped stays valid; open the model again when the daemon is back"
        return DaemonUnavailable(message, hint=hint)


def _in_vain(what: str, deadline: Deadline) -> TimedOut:
    message = f"waited {deadline.timeout_s:g} s for {what} in vain"
    return TimedOut(message, hint="give more time (timeout_s), or see how far it is: cached status")


def _poll(polled: socket.socket, mask: int, deadline: Deadline) -> bool:
    """Wait until something can be done with a socket; False: not by now."""
    poll = select.poll()
    poll.register(polled, mask)
    return bool(poll.poll(deadline.left_ms))


def _frame(op: str, request_id: int, fields: Mapping[str, object]) -> bytes:
    frame = wire.encode({"id": request_id, "op": op, **fields})
    if len(frame) - wire.LENGTH_BYTES > wire.MAX_REQUEST_BYTES:
        message = f"{op} takes {len(frame)} bytes: at most {wire.MAX_REQUEST_BYTES} can be sent"
        raise BadRequest(message, hint="name fewer tensors at a time")
    return frame


def _greeting() -> dict[str, object]:
    import cached

    return {
        "protocol": list(wire.PROTOCOL),
        "client": f"cached-python/{cached.__version__}",
    }
