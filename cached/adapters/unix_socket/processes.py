"""The processes that are connected, and whose connections have to wait for their turn.

A process may have ``MAX_AHEAD`` requests in the mailbox, over all its connections. What comes
beyond stays unread until the mailbox has taken some of them; then each connection that waits has
one request read, and waits again. So a process with a thousand connections costs the others no
more than one with a single one. And one process has no more than half of the time in which
connections are read; while it has had that, and for three times as long as a request took that took
long to be read or to be handled, it rests: nothing of it is read.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import TYPE_CHECKING, Final, NamedTuple

from cached.core.errors import FrameError
from cached.core.shares import Shares

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cached.adapters.unix_socket.connection import Connection
    from cached.ports import Lane

# Of requests that were not taken yet, of all together; core/shares.py says what one may have.
MAX_BUFFERED_BYTES: Final = 32 << 20
MAX_AHEAD: Final = 16
RESUME_AT: Final = 4  # so many are left when others are let in: not one at a time
LONG_S: Final = 0.0003  # of processor time: most requests take a third of it
REST: Final = 3  # times what a long one took
SHORT_REST: Final = 1  # times all else, which adds up
BURST_S: Final = 0.002  # so much may add up, with the rest for it, before it rests at all


class Hooks(NamedTuple):
    """What processes need of the outside.

    Attributes:
        lane: makes a lane in the mailbox; what it is given is called when an event was handled,
            with the seconds of processor time that it took.
        wake: has connections looked at whose turn it is; from any thread.
        rests: has ``resume`` of a process called when it rests no more; from any thread.
        now_s: monotonic.
    """

    lane: Callable[[Callable[[float], None]], Lane]
    wake: Callable[[Sequence[Connection]], None]
    rests: Callable[[Process], None]
    now_s: Callable[[], float]


class Process:
    """One process: all workers of a pid; of a pid that is not seen from here, of all such.

    Attributes:
        key: uid and pid.
        lane: its events, in the mailbox.
        connections: how many are open.
    """

    __slots__ = (
        "_awake",
        "_held",
        "_hooks",
        "_lock",
        "_paid_until_s",
        "connections",
        "key",
        "lane",
    )

    def __init__(self, key: tuple[int, int], hooks: Hooks) -> None:
        self.key = key
        self.connections = 0
        self._hooks = hooks
        self._lock = threading.Lock()
        self._held: deque[Connection] = deque()
        self._paid_until_s = 0.0
        self._awake = 0  # connections whose turn it is, and that were not looked at yet
        self.lane = hooks.lane(self._handled)

    @property
    def has_room(self) -> bool:
        """Whether another request may be read."""
        return self.lane.count < MAX_AHEAD and not self.rest_s

    @property
    def rest_s(self) -> float:
        """How long it rests still; in which nothing of it is read."""
        if not self._paid_until_s:
            return 0.0
        return max(0.0, self._paid_until_s - BURST_S - self._hooks.now_s())

    def spent(self, cost_s: float) -> None:
        """Note what reading a connection took, or closing it; any thread.

        Args:
            cost_s: processor time.
        """
        rest = REST if cost_s > LONG_S else SHORT_REST
        with self._lock:
            since_s = max(self._paid_until_s, self._hooks.now_s())
            self._paid_until_s = since_s + (1 + rest) * cost_s

    @property
    def is_crowded(self) -> bool:
        """Whether connections wait: then each has one request read, and waits again."""
        return bool(self._held)

    def hold(self, connection: Connection) -> None:
        """Have a connection wait for its turn; ``resume`` is to be called afterwards."""
        with self._lock:
            if not connection.is_parked:
                connection.is_parked = True
                self._held.append(connection)

    def resume(self) -> None:
        """Let connections go on, if there is room for what they ask. Any thread."""
        if not self._held or self.lane.count + self._awake > RESUME_AT:
            return
        if self.rest_s:
            self._hooks.rests(self)
            return
        with self._lock:
            room = MAX_AHEAD - self.lane.count - self._awake
            count = max(0, min(len(self._held), room))  # another thread may have been first
            turn = [self._held.popleft() for _ in range(count)]
            for connection in turn:
                connection.is_parked = False
                connection.has_turn = True
            self._awake += count
        if turn:
            self._hooks.wake(turn)

    def _handled(self, cost_s: float) -> None:
        if cost_s > LONG_S:  # of short ones lanes take turns
            self.spent(cost_s)
        self.resume()

    def took_turn(self, connection: Connection) -> None:
        """Note that a connection was looked at; ``resume`` is to be called afterwards."""
        if connection.has_turn:
            with self._lock:
                connection.has_turn = False
                self._awake -= 1

    def forget(self, connection: Connection) -> None:
        """Have a connection wait for nothing more."""
        with self._lock:
            if connection.has_turn:
                self._awake -= 1
            if connection.is_parked:
                self._held.remove(connection)


class Processes:
    """How many connections are open, and whose."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._processes: dict[tuple[int, int], Process] = {}
        self._of_uid: Counter[int] = Counter()
        self._buffered = Shares(MAX_BUFFERED_BYTES)

    def of(self, uid: int, pid: int) -> Process:
        """Return a process; it is kept once it has joined."""
        known = self._processes.get((uid, pid))
        return known or Process((uid, pid), self._hooks)

    def of_uid(self, uid: int) -> int:
        """Return how many connections of this user are open."""
        return self._of_uid[uid]

    def joined(self, process: Process) -> None:
        """Count one more connection."""
        if process.key not in self._processes:
            self._forget_idle()
            self._processes[process.key] = process
        process.connections += 1
        self._of_uid[process.key[0]] += 1

    def left(self, connection: Connection) -> None:
        """Count one less: it is closed."""
        process = connection.process
        process.connections -= 1
        self._of_uid[process.key[0]] -= 1

    def count_buffered(self, connection: Connection) -> None:
        """Count what a connection keeps of requests for its process.

        Raises:
            FrameError: too much.
        """
        key, more_bytes = connection.process.key, len(connection.frames) - connection.buffered_bytes
        if more_bytes < 0:
            self._buffered.give_back(key, -more_bytes)
        elif more_bytes and not self._buffered.take(key, more_bytes):
            message = (
                f"this process has sent {self._buffered.of(key)} bytes of requests that are not "
                f"whole or wait for their turn"
            )
            raise FrameError(message)
        connection.buffered_bytes += more_bytes

    def _forget_idle(self) -> None:
        """Forget who has gone; not whose events wait still: he would come back to a new lane."""
        for key, process in tuple(self._processes.items()):
            if not (process.connections or process.lane.count):
                del self._processes[key]
