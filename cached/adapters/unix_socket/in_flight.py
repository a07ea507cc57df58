"""Descriptors that were sent and that nobody has received yet.

The kernel counts those of one user together, against his RLIMIT_NOFILE (unix(7), ETOOMANYREFS),
and what was sent cannot be taken back, not even by closing: only who does not receive them can let
go of them. So a process has no more of them than are still free, over all its connections, also
over those that were closed from here (``has_received``).
"""

from __future__ import annotations

import fcntl
import resource
import termios
import threading
from typing import TYPE_CHECKING, Final

from cached.core.shares import Shares

if TYPE_CHECKING:
    from cached.adapters.unix_socket.connection import Connection

MOST: Final = 8192  # where the limit of open files is higher: the kernel looks at each of them
NOTHING: Final = b"\0\0\0\0"


class InFlight:
    """Counts them by process; any thread.

    Args:
        limit: how many may be in flight in all; None: as many as the kernel lets us have.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is None:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            limit = MOST if soft == resource.RLIM_INFINITY else min(soft, MOST)
        self._shares = Shares(limit)
        self._sent: set[Connection] = set()  # on which some may be unread
        self._lock = threading.Lock()

    def take(self, connection: Connection, count: int) -> bool:
        """Count descriptors that are to be sent; False: its process has too many in flight."""
        with self._lock:
            if not self._has_taken(connection, count):
                for each in tuple(self._sent):  # what was counted may have been received since
                    self._look_at(each)
                if not self._has_taken(connection, count):
                    return False
            connection.unread_descriptors += count
            self._sent.add(connection)
            return True

    def has_received(self, connection: Connection) -> bool:
        """Return whether none are unread on a connection; else it may not be closed yet."""
        with self._lock:
            self._look_at(connection)
            return not connection.unread_descriptors

    def _has_taken(self, connection: Connection, count: int) -> bool:
        return self._shares.take(connection.process.key, count)

    def _look_at(self, connection: Connection) -> None:
        if (
            connection.unread_descriptors
            and fcntl.ioctl(connection.socket, termios.TIOCOUTQ, NOTHING) == NOTHING
        ):
            self._shares.give_back(connection.process.key, connection.unread_descriptors)
            connection.unread_descriptors = 0
            self._sent.discard(connection)
