"""Connections to stores, those in use and those kept for the next request: bounded together."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from cached.adapters.s3.addresses import Place
    from cached.ports import Clock, Sink

    class Head(Protocol):
        """Status and headers of a reply."""

        @property
        def status(self) -> int: ...  # noqa: D102
        @property
        def headers(self) -> dict[str, str]: ...  # noqa: D102

    class Connection(Protocol):
        """What the reader gives us: see adapters/http_reader/connection.py."""

        peer: str

        @property
        def is_reusable(self) -> bool: ...  # noqa: D102
        @property
        def is_cancelled(self) -> bool: ...  # noqa: D102
        @property
        def is_untouched(self) -> bool: ...  # noqa: D102
        def is_quiet(self) -> bool: ...  # noqa: D102
        def watch(self, on_idle: Callable[[float], None] | None) -> None: ...  # noqa: D102
        def cancel(self) -> None: ...  # noqa: D102
        def close(self) -> None: ...  # noqa: D102
        def send(self, request: bytes) -> None: ...  # noqa: D102
        def head(self, *, has_body: bool = True) -> Head: ...  # noqa: D102
        def read(self, most_bytes: int, *, may_cut: bool = False) -> bytes: ...  # noqa: D102
        def stream(self, start: int, stop: int, sink: Sink) -> None: ...  # noqa: D102

    class Connect(Protocol):
        """Opens a connection; raises StoreError."""

        def __call__(self, host: str, port: int, *, is_tls: bool) -> Connection: ...  # noqa: D102


MAX_IDLE_S = 20.0  # stores and balancers close what idles for 20 to 60 s, maybe under a request


class Connections:
    """Hands out connections; each that was taken is given back by ``keep`` or ``drop``.

    Any thread. ``close`` closes what is kept, and what comes back from then on.

    Args:
        connect: opens a connection.
        clock: for how long one has been idle.
        most: kept ones make room, the oldest first, when more would be open. Those in use are
            not bounded here: a thread has one.
    """

    def __init__(self, connect: Connect, clock: Clock, most: int) -> None:
        self._connect = connect
        self._clock = clock
        self._most = most
        self._lock = threading.Lock()
        self._used = 0
        self._kept: list[tuple[Connection, float]] = []  # and since when; the newest last
        self._is_closed = False

    def take(self, place: Place) -> tuple[Connection, bool]:
        """Return a connection, and whether it was used before.

        Raises:
            StoreError: a new one could not be opened.
        """
        with self._lock:
            self._used += 1
            closing = self._overdue()
            connection = self._newest(f"{place.host}:{place.port}", closing)
            if connection is None:
                closing += self._surplus()
        for other in closing:
            other.close()
        if connection is not None:
            return connection, True
        try:
            return self._connect(place.host, place.port, is_tls=place.is_tls), False
        except BaseException:
            with self._lock:
                self._used -= 1
            raise

    def keep(self, connection: Connection) -> None:
        """Take one back for another request, if it can be used again; else close it."""
        with self._lock:
            self._used -= 1
            has_room = self._used + len(self._kept) < self._most and not self._is_closed
            is_kept = has_room and connection.is_reusable
            if is_kept:
                connection.watch(None)
                self._kept.append((connection, self._clock.now_s()))
        if not is_kept:
            connection.close()

    def drop(self, connection: Connection) -> None:
        """Take one back that is of no use any more."""
        with self._lock:
            self._used -= 1
        connection.close()

    def close(self) -> None:
        """Close what is kept, and keep nothing any more."""
        with self._lock:
            self._is_closed = True
            kept, self._kept = self._kept, []
        for connection, _ in kept:
            connection.close()

    def _overdue(self) -> list[Connection]:
        """Take out what has been idle for too long; the lock is held."""
        since_s = self._clock.now_s() - MAX_IDLE_S
        overdue = [connection for connection, kept_s in self._kept if kept_s < since_s]
        del self._kept[: len(overdue)]
        return overdue

    def _newest(self, peer: str, closing: list[Connection]) -> Connection | None:
        """Take out the one used last that is still open; the lock is held."""
        for index in reversed(range(len(self._kept))):
            connection = self._kept[index][0]
            if connection.peer == peer:
                del self._kept[index]
                if connection.is_quiet():
                    return connection
                closing.append(connection)
        return None

    def _surplus(self) -> list[Connection]:
        """Take out what a new one has no room beside; the lock is held."""
        count = min(len(self._kept), max(0, self._used + len(self._kept) - self._most))
        surplus = [connection for connection, _ in self._kept[:count]]
        del self._kept[:count]
        return surplus
