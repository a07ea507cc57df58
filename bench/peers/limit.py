"""The limit: the same GETs from plain sockets, and the bytes thrown away."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bench.peers.job import parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.peers.job import Job

BUFFER_BYTES = 1 << 20
END_OF_HEAD = b"\r\n\r\n"


def prepare(job: Job) -> Callable[[], None]:
    def fetch() -> None:
        queue = parts(job)
        lock = Lock()  # a generator must not be entered twice

        def take() -> tuple[int, int] | None:
            with lock:
                return next(queue, None)

        with ThreadPoolExecutor(job.threads) as pool:
            running = [pool.submit(_drain, job, take) for _ in range(job.threads)]
        got_bytes = sum(each.result() for each in running)
        if got_bytes != job.size_bytes:
            raise ValueError(f"got {got_bytes} bytes of {job.size_bytes}")

    return fetch


def _drain(job: Job, take: Callable[[], tuple[int, int] | None]) -> int:
    """Ask for one part after another over one connection; return how many bytes came."""
    store = urlsplit(job.endpoint_url)
    buffer = memoryview(bytearray(BUFFER_BYTES))
    got_bytes = 0
    with socket.create_connection((store.hostname or "", store.port or 80), timeout=60) as stream:
        while (part := take()) is not None:
            stream.sendall(_request(job, *part))
            left_bytes = _read_head(stream, buffer)
            got_bytes += part[1] - part[0]
            while left_bytes:
                count = stream.recv_into(buffer, min(left_bytes, BUFFER_BYTES))
                if not count:
                    raise ConnectionError(f"the store hung up {left_bytes} bytes early")
                left_bytes -= count
    return got_bytes


def _request(job: Job, start: int, stop: int) -> bytes:
    url = urlsplit(job.url)
    target = f"{url.path}?{url.query}" if url.query else url.path
    return (
        f"GET {target} HTTP/1.1\r\nHost: {url.netloc}\r\nRange: bytes={start}-{stop - 1}\r\n\r\n"
    ).encode()


def _read_head(stream: socket.socket, buffer: memoryview) -> int:
    """Return how many bytes of the body are still to come."""
    data = b""
    while END_OF_HEAD not in data:
        count = stream.recv_into(buffer)
        if not count:
            raise ConnectionError("the store hung up")
        data += bytes(buffer[:count])
    head, _, body = data.partition(END_OF_HEAD)
    status, *fields = head.decode("latin-1").split("\r\n")
    if " 206 " not in status:
        raise ValueError(f"the store answered {status!r} to a range")
    values = {name.lower(): value for name, _, value in (line.partition(":") for line in fields)}
    return int(values["content-length"]) - len(body)
