"""The connections of the HTTP side: how many there are, and which one goes when more come.

Each takes one of the daemon's descriptors, of which workers and segments need theirs. Who comes
takes the place of the connection that has been idle for longest: so a probe is answered also where
somebody opens connections and leaves them. A client of HTTP must expect that an idle connection is
closed (RFC 9112, 9.5), and a GET is sent again.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Final

from aiohttp import web

if TYPE_CHECKING:
    import socket
    from asyncio import TimerHandle
    from collections.abc import Callable

    from aiohttp.typedefs import Handler, Middleware

# Two scrapers, a kubelet with three probes and the operators' browsers keep about 20 open.
MAX_CONNECTIONS: Final = 64
MIN_CONNECTIONS: Final = 4
DESCRIPTORS_OF_EACH: Final = 16  # of 1,024 open files 64 may be HTTP connections, of 256 may 16
IDLE_TIMEOUT_S: Final = 75.0  # nginx's keepalive_timeout; longer than scrapers mostly pause, 60 s
TELL_EVERY_S: Final = 60.0
NO_DESCRIPTOR: Final = {errno.EMFILE, errno.ENFILE}
PAUSE_S: Final = 0.1  # until the next look whether a descriptor is free


def most_connections(open_files: int) -> int:
    """Return how many HTTP connections a process with this limit of open files may have."""
    return max(MIN_CONNECTIONS, min(MAX_CONNECTIONS, open_files // DESCRIPTORS_OF_EACH))


class Connections:
    """Accepts, and closes what has been idle for too long; all in the loop's thread.

    A connection is idle unless a handler is at work for it: also while its request comes slowly,
    or its answer is not read.

    Args:
        most: open at a time.
        crowded: told, at most once in ``TELL_EVERY_S``, how many were closed because more came.
    """

    def __init__(self, most: int, crowded: Callable[[int], None]) -> None:
        self._most = most
        self._crowded = crowded
        self._loop = asyncio.get_running_loop()
        # With the timers that close them; the one that is idle for longest comes first.
        self._idle: dict[web.RequestHandler, TimerHandle] = {}
        self._busy: set[web.RequestHandler] = set()
        self._closed = 0  # since ``crowded`` was told
        self._is_telling = False

    async def accept(self, listener: socket.socket, server: web.Server) -> None:
        """Accept until cancelled.

        Args:
            listener: does not block; stays the caller's.
            server: makes the protocol of each.
        """
        while True:
            try:
                accepted, _ = await self._loop.sock_accept(listener)
            except OSError as error:
                if error.errno in NO_DESCRIPTOR:  # who comes waits in the backlog
                    self._close_oldest()
                await asyncio.sleep(PAUSE_S)
                continue
            if self._has_place():
                await self._welcome(accepted, server)
            else:
                accepted.close()
                await asyncio.sleep(0)  # so that those that are at work get on

    async def _welcome(self, accepted: socket.socket, server: web.Server) -> None:
        try:
            _, protocol = await self._loop.connect_accepted_socket(server, accepted)
        except OSError:  # it has gone
            accepted.close()
        else:
            self._rest(protocol)

    def middleware(self) -> Middleware:
        """Return what tells of each request that its connection is not idle."""

        @web.middleware
        async def tracked(request: web.Request, handler: Handler) -> web.StreamResponse:
            protocol = request.protocol
            self._forget(protocol)
            self._busy.add(protocol)
            try:
                return await handler(request)
            finally:
                self._busy.discard(protocol)
                self._rest(protocol)

        return tracked

    def _rest(self, protocol: web.RequestHandler) -> None:
        if protocol.transport is not None and protocol not in self._busy:
            self._forget(protocol)
            self._idle[protocol] = self._loop.call_later(IDLE_TIMEOUT_S, self._close, protocol)

    def _forget(self, protocol: web.RequestHandler) -> None:
        timer = self._idle.pop(protocol, None)
        if timer is not None:
            timer.cancel()

    def _close(self, protocol: web.RequestHandler) -> None:
        self._forget(protocol)
        if protocol.transport is not None:
            protocol.transport.abort()  # what is not read yet is not waited for

    def _has_place(self) -> bool:
        """Return whether one more may be open; if need be, close one for it that is idle."""
        for protocol in [each for each in self._idle if each.transport is None]:
            self._forget(protocol)
        busy = sum(each.transport is not None for each in self._busy)
        if len(self._idle) + busy < self._most:
            return True
        self._note()
        return self._close_oldest()

    def _close_oldest(self) -> bool:
        """Close what has been idle for longest; return whether there was any."""
        oldest = next(iter(self._idle), None)
        if oldest is not None:
            self._close(oldest)
        return oldest is not None

    def _note(self) -> None:
        """Count one that was closed because more came; tell of the first at once."""
        self._closed += 1
        if not self._is_telling:
            self._tell()

    def _tell(self) -> None:
        self._is_telling = self._closed > 0
        if self._is_telling:
            self._crowded(self._closed)
            self._closed = 0
            self._loop.call_later(TELL_EVERY_S, self._tell)
