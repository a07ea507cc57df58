"""An S3 server on loopback whose objects, speed and faults are data.

Threads and plain sockets: one thread for each connection. It serves files by ``sendfile`` and
knows only what a reader of models asks for: ListObjectsV2, HEAD, GET and PUT, by path and host.
``python -m tests.fakes.store_server FILE...`` serves files from a process of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import struct
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from tests.fakes.s3_objects import (
    CHECKSUM,
    PAGE_KEYS,
    SENT_KEY_MD5,
    Account,
    Answer,
    Asked,
    Generated,
    Stored,
    flipped,
    listing,
    locked,
    refusal,
    replaced,
    stored,
    unsigned,
)
from tests.fakes.store_faults import (
    Changed,
    ClosedIdle,
    Corrupted,
    Duplicate,
    Fault,
    IgnoredRange,
    Mute,
    NoEtag,
    OtherEtag,
    Raw,
    Reset,
    ShortBody,
    Stall,
    Status,
    WrongLength,
    WrongRange,
    WrongTotal,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from tests.fakes.s3_objects import Content

BUCKET = "models"
HOST = "127.0.0.1"
PIECE_BYTES = 64 << 10  # what one connection sends before the next has its turn on a slow link
READ_BYTES = 256 << 10
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST


class Link:
    """What all connections share: so many bytes a second, in turn."""

    def __init__(self, bytes_per_s: float | None, stopped: threading.Event) -> None:
        self._bytes_per_s = bytes_per_s
        self._stopped = stopped
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> None:
        """Return when so many bytes have gone through."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now_s = time.monotonic()
            self._free_at_s = max(now_s, self._free_at_s) + size_bytes / self._bytes_per_s
            wait_s = self._free_at_s - now_s
        self._stopped.wait(wait_s)

    @property
    def piece_bytes(self) -> int:
        return PIECE_BYTES if self._bytes_per_s is not None else 1 << 30


class _Ranged(NamedTuple):
    """The reply to a GET or HEAD of an object."""

    status: int
    headers: dict[str, str]
    content: Stored
    start: int
    stop: int


class StoreServer:
    """Serves one bucket while its ``with`` block runs.

    Args:
        objects: by key; may be changed while it serves (under no lock: between requests).
        faults: k, of the k-th GET of an object (the first is 0), or (``"HEAD"`` or ``"LIST"``,
            k) → what goes wrong.
        account: who may ask, checked by botocore; ``None``: everybody, signed or not.
        throttle_bytes_per_s: of the link that all connections share.
        latency_s: before every reply.
        page_keys: the most keys of one page of a listing.
        tls: speaks TLS with this.

    Attributes:
        seen: all requests, in order.
        met: requests that met a fault, in order.
        corrupted: bytes that were sent wrong: key and offset in the object.
        connections: accepted so far.
        served_bytes: of objects' bodies, sent or about to be.
        stalled: set while a ``Stall`` lasts.
        resumed: set it to end all stalls.
        wall_s: this server's clock; may be set to another.
        noticed: called with every request before it is answered, in its connection's thread; may be
            set to another.
    """

    def __init__(  # noqa: PLR0913 - all but the first have defaults
        self,
        objects: Mapping[str, Content | Stored],
        *,
        faults: Mapping[int | tuple[str, int], Fault] | None = None,
        account: Account | None = None,
        throttle_bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        page_keys: int = PAGE_KEYS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.objects = {key: stored(content) for key, content in objects.items()}
        self.faults = dict(faults or {})
        self.account = account
        self.seen: list[Asked] = []
        self.met: list[tuple[Asked, Fault]] = []
        self.corrupted: set[tuple[str, int]] = set()
        self.connections = 0
        self.served_bytes = 0
        self.stalled = threading.Event()
        self.resumed = threading.Event()
        self._latency_s = latency_s
        self.wall_s: Callable[[], float] = time.time
        self.noticed: Callable[[Asked], None] = lambda _: None
        self._page_keys = page_keys
        self._tls = tls
        self._stopped = threading.Event()
        self._link = Link(throttle_bytes_per_s, self._stopped)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closed = 0
        self._counts = {"GET": 0, "HEAD": 0, "LIST": 0}
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((HOST, 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self.endpoint_url = f"http{'s' if tls else ''}://{HOST}:{self.port}"

    @property
    def gets(self) -> int:
        """GETs of objects so far."""
        return self._counts["GET"]

    def count(self, kind: str) -> int:
        """Return how many requests of a kind came: GET and HEAD of objects, LIST."""
        return self._counts[kind]

    def __enter__(self) -> StoreServer:
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self.resumed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.drop_connections()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def drop_connections(self) -> None:
        """End all connections that are open now."""
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def wait_for_closed(self, connections: int) -> None:
        """Return once so many connections were closed from here."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._closed >= connections, 10)

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections += 1
                self._open.add(sock)
            self._start(self._serve, sock)

    def _serve(self, plain: socket.socket) -> None:
        sock = plain
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(plain, server_side=True)
                with self._lock:
                    self._open.discard(plain)
                    self._open.add(sock)
            data = b""
            while not self._stopped.is_set():
                data, is_open = self._exchange(sock, data)
                if not is_open:
                    break
        except OSError:
            pass  # the client is gone, or the server stops
        finally:
            sock.close()
            with self._changed:
                self._open -= {plain, sock}
                self._closed += 1
                self._changed.notify_all()

    def _exchange(self, sock: socket.socket, data: bytes) -> tuple[bytes, bool]:
        """Serve one request; return what came after it, and whether there may be another."""
        while b"\r\n\r\n" not in data:
            more = sock.recv(READ_BYTES)
            if not more:
                return b"", False
            data += more
        head, _, rest = data.partition(b"\r\n\r\n")
        asked = _parsed(head)
        body_bytes = int(asked.headers.get("content-length", "0"))
        while len(rest) < body_bytes:
            rest += sock.recv(READ_BYTES)
        asked, rest = asked._replace(body=rest[:body_bytes]), rest[body_bytes:]
        key = self._key(asked)
        kind = "LIST" if not key and asked.method == "GET" else asked.method
        with self._lock:
            self.seen.append(asked)
            fault = self.faults.get((kind, self._counts.get(kind, 0)))
            if kind == "GET":
                fault = self.faults.get(self._counts[kind], fault)
            self._counts[kind] = self._counts.get(kind, 0) + 1
            if fault is not None:
                self.met.append((asked, fault))
        self.noticed(asked)
        if self._latency_s:
            self._stopped.wait(self._latency_s)
        return rest, self._reply(sock, asked, key, fault)

    def _key(self, asked: Asked) -> str | None:
        """Return the key that is asked for, "" for the bucket; None: another bucket."""
        path = unquote(asked.path)[1:]
        host = asked.headers["host"].partition(":")[0]
        if host.partition(".")[0] == BUCKET:
            return path
        bucket, _, key = path.partition("/")
        return key if bucket == BUCKET else None

    def _reply(
        self, sock: socket.socket, asked: Asked, key: str | None, fault: Fault | None
    ) -> bool:
        match fault:
            case Raw():
                sock.sendall(fault.data)
                return False
            case Mute():
                return False
            case Reset(body_bytes=-1):
                return _reset(sock)
            case Stall(body_bytes=-1):
                self._stall(fault)
            case _:
                pass
        answer = _told(fault) if isinstance(fault, Status) else self._answer(asked, key, fault)
        if isinstance(answer, Answer):
            self._send_whole(sock, asked, answer)
            return not isinstance(fault, ClosedIdle)
        sock.sendall(self._head(answer.status, answer.headers))
        if asked.method == "HEAD":
            return not isinstance(fault, ClosedIdle)
        if isinstance(fault, Corrupted) and answer.start < answer.stop:
            at = answer.start + fault.at % (answer.stop - answer.start)
            self.corrupted.add((str(key), at))
            content = flipped(answer.content.content_of(0, answer.content.size_bytes), at)
            answer = answer._replace(content=answer.content._replace(content=content))
        return self._send_body(sock, answer, fault)

    def _answer(self, asked: Asked, key: str | None, fault: Fault | None) -> Answer | _Ranged:
        wrong = self.account and unsigned(asked, self.account, self.wall_s())
        if wrong is not None:
            return wrong
        if key is None:
            return refusal(404, "NoSuchBucket", "The specified bucket does not exist")
        if not key:
            return listing(self.objects, asked, self._page_keys)
        if asked.method == "PUT":
            return self._put(asked, key)
        if key not in self.objects:
            return refusal(404, "NoSuchKey", "The specified key does not exist.")
        return self._found(asked, key, fault)

    def _found(self, asked: Asked, key: str, fault: Fault | None) -> Answer | _Ranged:
        if isinstance(fault, Changed):
            self.objects[key] = replaced(self.objects[key])
        found = self.objects[key]
        if isinstance(fault, OtherEtag):
            found = found._replace(etag=fault.etag)
        elif asked.headers.get("if-match", found.etag) != found.etag:
            return refusal(412, "PreconditionFailed", "At least one precondition did not hold")
        return locked(found, asked) or _ranged(found, asked, fault)

    def _put(self, asked: Asked, key: str) -> Answer:
        kept = tuple(field for field in asked.headers.items() if field[0].startswith(CHECKSUM))
        key_md5 = asked.headers.get(SENT_KEY_MD5, "")
        made = stored(asked.body)._replace(headers=kept, customer_key_md5=key_md5)
        self.objects[key] = made
        return Answer(200, (("etag", made.etag),))

    def _send_whole(self, sock: socket.socket, asked: Asked, answer: Answer) -> None:
        headers = {"content-length": str(len(answer.body)), **dict(answer.headers)}
        body = b"" if asked.method == "HEAD" else answer.body
        sock.sendall(self._head(answer.status, headers) + body)

    def _head(self, status: int, headers: dict[str, str]) -> bytes:
        fields = {
            "date": formatdate(self.wall_s(), usegmt=True),
            "x-amz-request-id": "TESTREQUEST",
            **headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"HTTP/1.1 {status} Reason\r\n{lines}\r\n".encode("latin-1")

    def _send_body(self, sock: socket.socket, answer: _Ranged, fault: Fault | None) -> bool:
        start, stop = answer.start, answer.stop
        body = answer.content
        match fault:
            case ShortBody(body_bytes=body_bytes):
                self._send(sock, body, start, min(stop, start + body_bytes))
                return False
            case Reset(body_bytes=body_bytes):
                self._send(sock, body, start, min(stop, start + body_bytes))
                return _reset(sock)
            case Stall(body_bytes=body_bytes) if body_bytes >= 0:
                middle = min(stop, start + body_bytes)
                self._send(sock, body, start, middle)
                self._stall(fault)
                self._send(sock, body, middle, stop)
            case Duplicate():
                twice = body.content_of(start, stop) * 2  # in one piece: it comes at once
                sock.sendall(twice)
            case _:
                self._send(sock, body, start, stop)
        return not isinstance(fault, ClosedIdle)

    def _stall(self, fault: Stall) -> None:
        self.stalled.set()
        self.resumed.wait(None if fault.seconds == math.inf else fault.seconds)
        self.stalled.clear()

    def _send(self, sock: socket.socket, content: Stored, start: int, stop: int) -> None:
        with _Pieces(content) as pieces:
            while start < stop:
                piece_bytes = min(stop - start, self._link.piece_bytes)
                self._link.take(piece_bytes)
                self._count(piece_bytes)  # before: who received it may look at once
                sent_bytes = pieces.send(sock, start, start + piece_bytes)
                self._count(sent_bytes - piece_bytes)
                if not sent_bytes:
                    return  # the object is not that long
                start += sent_bytes

    def _count(self, served_bytes: int) -> None:
        with self._lock:
            self.served_bytes += served_bytes


class _Pieces:
    """Sends pieces of one object; holds its file open meanwhile."""

    def __init__(self, content: Stored) -> None:
        self._content = content.content
        self._fd = -1

    def __enter__(self) -> _Pieces:
        if isinstance(self._content, Path):
            self._fd = os.open(self._content, os.O_RDONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def send(self, sock: socket.socket, start: int, stop: int) -> int:
        """Send some bytes from ``start`` on; return how many."""
        match self._content:
            case bytes():
                return sock.send(memoryview(self._content)[start:stop])
            case Generated():
                return sock.send(self._content.view(start, stop))
            case Path():
                if not hasattr(sock, "pending"):
                    return os.sendfile(sock.fileno(), self._fd, start, stop - start)
                return sock.send(os.pread(self._fd, min(READ_BYTES, stop - start), start))


def _ranged(found: Stored, asked: Asked, fault: Fault | None) -> _Ranged | Answer:
    size_bytes = found.size_bytes
    headers = {**dict(found.headers), "etag": found.etag, "accept-ranges": "bytes"}
    if isinstance(fault, NoEtag):
        del headers["etag"]
    number = int(asked.parameters.get("partNumber", 0))
    if number and found.parts:
        if number > len(found.parts):
            return refusal(416, "InvalidPartNumber", "The requested partnumber is not satisfiable")
        part_bytes = found.parts[number - 1]
        headers["content-length"] = str(part_bytes)
        return _Ranged(206, headers, found, 0, part_bytes)
    match = _RANGE.fullmatch(asked.headers.get("range", ""))
    if match is None or isinstance(fault, IgnoredRange) or asked.method == "HEAD":
        headers["content-length"] = str(size_bytes)
        return _Ranged(200, headers, found, 0, size_bytes)
    start, stop = int(match[1]), min(int(match[2]) + 1, size_bytes)
    if start >= size_bytes:
        return refusal(416, "InvalidRange", "The requested range is not satisfiable")
    if isinstance(fault, WrongRange):
        start, stop = start + fault.shift_bytes, min(stop + fault.shift_bytes, size_bytes)
    more_bytes = fault.more_bytes if isinstance(fault, WrongTotal) else 0
    headers["content-range"] = f"bytes {start}-{stop - 1}/{size_bytes + more_bytes}"
    if isinstance(fault, WrongLength):
        stop += fault.more_bytes
    headers["content-length"] = str(stop - start)
    return _Ranged(206, headers, found, start, stop)


def _told(fault: Status) -> Answer:
    if not fault.code:
        return Answer(fault.status, tuple(fault.headers.items()))
    answer = refusal(fault.status, fault.code, fault.message, fault.members)
    return answer._replace(headers=(*answer.headers, *fault.headers.items()))


def _parsed(head: bytes) -> Asked:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    path, _, query = target.partition("?")
    fields: Iterator[tuple[str, str, str]] = (line.partition(":") for line in lines)
    return Asked(method, path, query, {name.lower(): value.strip() for name, _, value in fields})


def _reset(sock: socket.socket) -> bool:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    return False


def main(paths: list[str]) -> None:
    """Serve files until the input ends; print the endpoint first."""
    with StoreServer({Path(path).name: Path(path) for path in paths}) as server:
        print(server.endpoint_url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
