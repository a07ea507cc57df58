"""Requests under way, each of which can be cut from outside."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from cached.core.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cached.adapters.s3.connections import Connection, Head
    from cached.adapters.s3.requests import Call, Requests
    from cached.ports import Cancellation

    OnIdle = Callable[[float], None]


class Running:
    """Sends requests that can be cut. Any thread.

    Args:
        requests: sends them.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._lock = threading.Lock()
        self._runs: set[_Run] = set()
        self._is_closed = False

    @contextlib.contextmanager
    def sent(
        self, call: Call, cancellation: Cancellation, on_idle: OnIdle | None = None
    ) -> Iterator[tuple[Connection, Head]]:
        """Send a request for the time of a ``with`` block, which reads the reply.

        Args:
            call: the request.
            cancellation: cuts it.
            on_idle: called while nothing comes, also of the reply's head; may raise to give up.

        Raises:
            StoreUnavailable: also when it was cut.
            StoreError: the store refused.
        """
        run = _Run(on_idle)
        with self._lock:
            self._runs.add(run)
        try:
            cancellation.attach(run.cancel)
            if self._is_closed:
                run.cancel()
            run.check()
            connection, head = self._requests.send(call, run.use)
            try:
                yield connection, head
            except BaseException:
                self._requests.drop(connection)
                raise
        finally:
            cancellation.detach()  # from here on the connection may serve another request
            with self._lock:
                self._runs.remove(run)
        self._requests.keep(connection)

    def close(self) -> None:
        """Cut whatever runs, begin nothing more, close kept connections."""
        with self._lock:
            self._is_closed = True
            runs = list(self._runs)
        for run in runs:
            run.cancel()
        self._requests.close()


class _Run:
    """One request under way: the connection it uses now, and whether it was cancelled."""

    __slots__ = ("_connection", "_is_cancelled", "_lock", "_on_idle")

    def __init__(self, on_idle: OnIdle | None) -> None:
        self._on_idle = on_idle
        self._connection: Connection | None = None
        self._is_cancelled = False
        self._lock = threading.Lock()

    def use(self, connection: Connection) -> None:
        """Take note of the connection that is used from now on."""
        connection.watch(self._on_idle)
        with self._lock:
            self._connection = connection
        self.check()

    def check(self) -> None:
        """Raise if it was cancelled."""
        if self._is_cancelled:
            raise StoreUnavailable("the request was cancelled")

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
            if self._connection is not None:
                self._connection.cancel()
