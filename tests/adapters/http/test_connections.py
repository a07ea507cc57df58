"""HTTP takes few of the daemon's descriptors; who comes takes the place of the longest idle one."""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from cached.adapters.http import connections as http
from cached.adapters.http.connections import Connections, most_connections

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MOST = 3


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 - nobody sets an event
        await asyncio.sleep(0.001)


class Site:
    """A server of at most three connections; GET / answers once ``answer`` is set."""

    runner: web.AppRunner

    def __init__(self) -> None:
        self.crowds: list[int] = []
        self.asked = 0
        self.answer = asyncio.Event()
        self.streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)

    async def slow(self, request: web.Request) -> web.Response:
        self.asked += 1
        await self.answer.wait()
        return web.Response(text="done")

    async def connect(self) -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection(*self.listener.getsockname())
        self.streams.append((reader, writer))
        return reader

    async def ask(self, number: int) -> None:
        """Send a request on a connection, and return once a handler is at work."""
        asked = self.asked
        self.streams[number][1].write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: self.asked > asked)

    def open_count(self) -> int:
        server = self.runner.server
        assert server is not None
        return sum(each.transport is not None for each in server.connections)


@asynccontextmanager
async def serving() -> AsyncIterator[Site]:
    site = Site()
    connections = Connections(MOST, site.crowds.append)
    app = web.Application(middlewares=[connections.middleware()])
    app.router.add_get("/", site.slow)
    runner = site.runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    assert runner.server is not None
    try:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            accepting = group.create_task(connections.accept(site.listener, runner.server))
            yield site
            accepting.cancel()
    finally:
        for _, writer in site.streams:
            writer.close()
        await runner.cleanup()
        site.listener.close()


async def is_closed(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(0.1):
            return await reader.read(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.mark.parametrize(
    ("open_files", "most"), [(20_000, 64), (1024, 64), (256, 16), (100, 6), (32, 4), (0, 4)]
)
def test_http_takes_a_small_part_of_the_descriptors(open_files: int, most: int):
    assert most_connections(open_files) == most


def test_the_connection_that_is_idle_for_longest_goes_for_a_newer_one():
    async def main() -> None:
        async with serving() as site:
            readers = [await site.connect() for _ in range(MOST + 1)]
            assert await is_closed(readers[0])
            assert not any([await is_closed(reader) for reader in readers[1:]])
            assert site.crowds == [1]

    asyncio.run(main())


def test_a_connection_that_was_used_is_not_the_longest_idle_one():
    async def main() -> None:
        async with serving() as site:
            site.answer.set()
            readers = [await site.connect() for _ in range(MOST)]
            await site.ask(0)
            assert (await readers[0].readuntil(b"done")).startswith(b"HTTP/1.1 200 OK")
            await site.connect()
            assert await is_closed(readers[1])
            assert not await is_closed(readers[0])

    asyncio.run(main())


def test_one_that_is_being_answered_stays_and_the_newcomer_goes():
    async def main() -> None:
        async with serving() as site:
            readers = [await site.connect() for _ in range(MOST)]
            for number in range(MOST):
                await site.ask(number)
            assert await is_closed(await site.connect())
            site.answer.set()
            for reader in readers:
                assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200 OK")

    asyncio.run(main())


def test_one_whose_client_left_takes_no_place():
    async def main() -> None:
        async with serving() as site:
            for _ in range(MOST):
                await site.connect()
            await site.ask(0)
            for _, writer in site.streams[:2]:
                writer.close()
                await writer.wait_closed()
            await until(lambda: site.open_count() == 1)
            readers = [await site.connect() for _ in range(2)]
            assert not any([await is_closed(reader) for reader in readers])
            assert site.crowds == []
            site.answer.set()

    asyncio.run(main())


def test_an_idle_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "IDLE_TIMEOUT_S", 0.05)

    async def main() -> None:
        async with serving() as site:
            silent = await site.connect()
            answered = await site.connect()
            asking = await site.connect()
            await site.ask(1)
            await site.ask(2)
            assert await silent.read() == b""
            assert not await is_closed(asking)  # somebody is at work for it
            site.answer.set()
            assert b"done" in await answered.read()
            assert site.crowds == []

    asyncio.run(main())


def test_a_crowd_is_told_of_once_in_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "TELL_EVERY_S", 0.2)

    async def main() -> None:
        async with serving() as site:
            for _ in range(MOST + 10):
                await site.connect()
            await until(lambda: site.crowds != [])
            assert site.crowds == [1]
            await until(lambda: len(site.crowds) == 2)
            assert site.crowds == [1, 9]
            await asyncio.sleep(0.3)  # nothing to tell
            assert site.crowds == [1, 9]
            await site.connect()
            await until(lambda: len(site.crowds) == 3)
            assert site.crowds == [1, 9, 1]

    asyncio.run(main())


def test_without_a_free_descriptor_the_oldest_goes_and_others_wait(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(http, "PAUSE_S", 0.05)

    async def main() -> None:
        async with serving() as site:
            old = await site.connect()
            loop = asyncio.get_running_loop()
            accept = loop.sock_accept
            refusals = [OSError(errno.ECONNABORTED, "gone"), OSError(errno.EMFILE, "too many")]

            async def none_free(listener: socket.socket) -> object:
                if refusals:
                    raise refusals.pop()
                return await accept(listener)

            monkeypatch.setattr(loop, "sock_accept", none_free)
            first = await site.connect()  # the accept that waits takes it
            newer = await site.connect()
            assert await is_closed(old)
            assert not await is_closed(first)
            site.answer.set()
            await site.ask(2)
            assert (await newer.readuntil(b"done")).startswith(b"HTTP/1.1 200 OK")
            assert site.crowds == []

    asyncio.run(main())
