"""The processes that are connected, and whose connections have to wait for their turn.

A process may have ``MAX_AHEAD`` requests in the mailbox, over all its connections. What comes
beyond stays unread until the mailbox has taken some of them; then each connection that waits has
one request read, and waits again. So a process with a thousand connections costs the others no
more than one with a single one.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cached.adapters.unix_socket.connection import Connection
    from cached.ports import Lane

MAX_AHEAD: Final = 16
RESUME_AT: Final = 4  # so many are left when others are let in: not one at a time


class Process:
    """One process: all workers of a pid; of a pid that is not seen from here, of all such.

    Attributes:
        key: uid and pid.
        lane: its events, in the mailbox.
        connections: how many are open.
    """

    __slots__ = ("_awake", "_held", "_lock", "_wake", "connections", "key", "lane")

    def __init__(
        self,
        key: tuple[int, int],
        lane: Callable[[Callable[[], None]], Lane],
        wake: Callable[[Sequence[Connection]], None],
    ) -> None:
        self.key = key
        self.connections = 0
        self._wake = wake
        self._lock = threading.Lock()
        self._held: deque[Connection] = deque()
        self._awake = 0  # connections whose turn it is, and that were not looked at yet
        self.lane = lane(self.resume)

    @property
    def has_room(self) -> bool:
        """Whether another request may be read."""
        return self.lane.count < MAX_AHEAD

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
        with self._lock:
            room = MAX_AHEAD - self.lane.count - self._awake
            count = max(0, min(len(self._held), room))  # another thread may have been first
            turn = [self._held.popleft() for _ in range(count)]
            for connection in turn:
                connection.is_parked = False
                connection.has_turn = True
            self._awake += count
        if turn:
            self._wake(turn)

    def took_turn(self, connection: Connection) -> None:
        """Note that a connection was looked at; ``resume`` is to be called afterwards."""
        if connection.has_turn:
            with self._lock:
                connection.has_turn = False
                self._awake -= 1

    def leave(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        with self._lock:
            self.connections -= 1
            if connection.has_turn:
                self._awake -= 1
            if connection.is_parked:
                self._held.remove(connection)


class Processes:
    """How many connections are open, and whose.

    Args:
        lane: makes a lane in the mailbox; what it is given is called when an event was taken.
        wake: has connections looked at whose turn it is; from any thread.
    """

    def __init__(
        self,
        lane: Callable[[Callable[[], None]], Lane],
        wake: Callable[[Sequence[Connection]], None],
    ) -> None:
        self._lane = lane
        self._wake = wake
        self._processes: dict[tuple[int, int], Process] = {}
        self._of_uid: Counter[int] = Counter()

    def of(self, uid: int, pid: int) -> Process:
        """Return a process; it is kept once it has joined."""
        known = self._processes.get((uid, pid))
        return known or Process((uid, pid), self._lane, self._wake)

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
        """Count one less."""
        process = connection.process
        process.leave(connection)
        self._of_uid[process.key[0]] -= 1

    def _forget_idle(self) -> None:
        """Forget who has gone; not whose events wait still: he would come back to a new lane."""
        for key, process in tuple(self._processes.items()):
            if not (process.connections or process.lane.count):
                del self._processes[key]
