"""aiohttp on uvloop: tasks that copy what comes to the file's mapping."""

from __future__ import annotations

import asyncio
import mmap
import os
from typing import TYPE_CHECKING

import aiohttp
import uvloop
from yarl import URL

from bench.peers.job import parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.peers.job import Job


def prepare(job: Job) -> Callable[[], None]:
    def fetch() -> None:
        descriptor = os.open(job.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(descriptor, job.size_bytes)
        mapping = mmap.mmap(descriptor, job.size_bytes)
        os.close(descriptor)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_fetch(job, mapping))
        mapping.close()

    return fetch


async def _fetch(job: Job, mapping: mmap.mmap) -> None:
    queue = parts(job)
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=job.threads)
    async with (
        aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False
        ) as session,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(job.threads):
            group.create_task(_drain(job, session, queue, mapping))


async def _drain(
    job: Job,
    session: aiohttp.ClientSession,
    queue: Iterator[tuple[int, int]],
    mapping: mmap.mmap,
) -> None:
    url = URL(job.url, encoded=True)  # as it was signed
    for start, stop in queue:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        async with session.get(url, headers=headers) as response:
            if response.status != 206:
                raise ValueError(f"the store answered {response.status} to a range")
            at = start
            async for piece in response.content.iter_any():
                mapping[at : at + len(piece)] = piece
                at += len(piece)
        if at != stop:
            raise ValueError(f"got {at - start} bytes of {stop - start}")
