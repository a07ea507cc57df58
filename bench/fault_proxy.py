"""An S3 store on loopback that misbehaves as a plan says; a process of its own.

``python -m bench.fault_proxy`` reads lines of JSON and answers each with one. The first, a
``Setup``, starts it: the answer is ``{"endpoint_url": ...}``. Each one after it is an ``Order``,
which begins a new count: the answer is what was counted since the one before. It ends with its
input.

One thread a connection, the body by ``sendfile`` from the page cache: the kernel does the work.
Requests may be signed or not; signatures are not looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from bench import fault_plan
from bench.fault_objects import error_body, listing, stored
from bench.fault_plan import Corrupt, Decision, Drip, Reset, Script, Short, Stall, WrongRange
from bench.link import Link

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bench.fault_objects import Stored
    from bench.fault_plan import PointFault

HOST = "127.0.0.1"
READ_BYTES = 64 << 10
DRIP_EVERY_S = 0.05
SHIFT_BYTES = 1 << 20  # how far a wrong range is from the right one
LAST_MODIFIED = "Thu, 01 Jan 2026 00:00:00 GMT"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST
_REASONS = {200: "OK", 206: "Partial Content", 404: "Not Found", 412: "Precondition Failed"}


class Setup(NamedTuple):
    """What the store holds.

    Attributes:
        bucket: its only one.
        files: path by key.
        replacements: path by key, for ``Replaced``: of the same size.
        checksums: algorithms to compute; an ``Order`` says which of them are offered.
    """

    bucket: str
    files: dict[str, str]
    replacements: dict[str, str]
    checksums: list[str]


class Order(NamedTuple):
    """How the store behaves from now on.

    Attributes:
        plan: as ``fault_plan.to_data`` wrote it.
        seed: of what the plan leaves to chance.
        link_bytes_per_s: of the link that all connections share; 0: as fast as it can.
        checksums: offered to who asks, of the whole object.
    """

    plan: list[dict[str, Any]]
    seed: int
    link_bytes_per_s: float
    checksums: list[str]


class Counts(NamedTuple):
    """What was seen under one order.

    Attributes:
        gets: of objects, refused ones included.
        body_bytes: of objects, handed to the kernel.
        peak_in_flight: most GETs at the same time.
        slow_downs: replies with 503.
        changed: replies with 412.
        heads, lists: other requests.
    """

    gets: int = 0
    body_bytes: int = 0
    peak_in_flight: int = 0
    slow_downs: int = 0
    changed: int = 0
    heads: int = 0
    lists: int = 0


class Session:
    """One order: its plan, its link, its counts. Any thread.

    Args:
        order: what shall happen.
        sleep: waits so many seconds.
    """

    def __init__(self, order: Order, sleep: Callable[[float], None] = time.sleep) -> None:
        self.sleep = sleep
        self.link = Link(order.link_bytes_per_s, time.monotonic, sleep)
        self.checksums = order.checksums
        self._script = Script(fault_plan.from_data(order.plan), order.seed)
        self._counts = dict(Counts()._asdict())
        self._in_flight = 0
        self._lock = threading.Lock()

    @property
    def is_replaced(self) -> bool:
        return self._script.is_replaced

    def begin(self, start: int, stop: int) -> Decision:
        """Count a GET, and return what happens to it; ``end`` follows."""
        with self._lock:
            self._in_flight += 1
            self._counts["gets"] += 1
            self._counts["peak_in_flight"] = max(self._counts["peak_in_flight"], self._in_flight)
            return self._script.decide(start, stop, time.monotonic())

    def end(self) -> None:
        with self._lock:
            self._in_flight -= 1

    def count(self, name: str, more: int = 1) -> None:
        with self._lock:
            self._counts[name] += more

    def counts(self) -> Counts:
        with self._lock:
            return Counts(**self._counts)


class Request(NamedTuple):
    """What a client asked; header names in lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str]


class Hangup(Exception):
    """The connection ends here."""


class Server:
    """Listens on a free port of loopback until the process ends.

    Attributes:
        session: of the order that is in force.
    """

    def __init__(self, setup: Setup) -> None:
        self.session = Session(Order([], 0, 0.0, []))
        self._bucket = setup.bucket
        self._objects = {k: stored(path, setup.checksums) for k, path in setup.files.items()}
        self._others = {k: stored(path, []) for k, path in setup.replacements.items()}
        self._listener = socket.create_server((HOST, 0), backlog=256)
        self.endpoint_url = f"http://{HOST}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in (*self._objects.values(), *self._others.values()):
            os.close(each.descriptor)

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        with stream, contextlib.suppress(OSError, Hangup):  # the client is gone, or shall be
            while True:
                while b"\r\n\r\n" not in data:
                    more = stream.recv(READ_BYTES)
                    if not more:
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                self._answer(stream, _parsed(head), self.session)

    def _answer(self, stream: socket.socket, request: Request, session: Session) -> None:
        bucket, _, key = request.path.lstrip("/").partition("/")
        if bucket == self._bucket and not key and request.method == "GET":
            session.count("lists")
            _send_text(stream, 200, listing(self._bucket, request.query, self._versions(session)))
        elif bucket != self._bucket or key not in self._objects:
            _send_text(stream, 404, error_body("NoSuchKey"), is_head=request.method == "HEAD")
        elif request.method == "HEAD":
            session.count("heads")
            found = self._versions(session)[key]
            fields = {**_fields(found, request, session), "content-length": str(found.size_bytes)}
            stream.sendall(_head(200, fields))
        else:
            start, stop = _range(request, self._objects[key].size_bytes)
            decision = session.begin(start, stop)
            try:
                found = (self._others if decision.is_replaced else self._objects)[key]
                _Get(stream, request, session, found).answer(start, stop, decision)
            finally:
                session.end()

    def _versions(self, session: Session) -> Mapping[str, Stored]:
        return self._others if session.is_replaced else self._objects


class _Get(NamedTuple):
    """One GET of an object, to be answered."""

    stream: socket.socket
    request: Request
    session: Session
    found: Stored

    def answer(self, start: int, stop: int, decision: Decision) -> None:
        """Answer as decided.

        Raises:
            Hangup: the connection must be closed.
        """
        if decision.latency_s:
            self.session.sleep(decision.latency_s)
        if isinstance(decision.fault, Reset) and decision.fault.before_head:
            self._reset()
        if decision.slow_down is not None:
            self._refuse(decision.slow_down.retry_after_s)
        elif self.request.headers.get("if-match", self.found.etag) != self.found.etag:
            self.session.count("changed")
            _send_text(self.stream, 412, error_body("PreconditionFailed"))
        else:
            self._send(start, stop, decision.fault)
        if decision.closes:
            raise Hangup

    def _refuse(self, retry_after_s: int) -> None:
        self.session.count("slow_downs")
        fields = {"retry-after": str(retry_after_s)} if retry_after_s >= 0 else {}
        _send_text(self.stream, 503, error_body("SlowDown"), fields)

    def _send(self, start: int, stop: int, fault: PointFault | None) -> None:
        if isinstance(fault, WrongRange):
            self._send_wrong(start, stop, is_told=fault.is_told)
            return
        self.stream.sendall(self._object_head(start, stop), socket.MSG_MORE)
        if fault is None:
            self._body(start, stop)
            return
        at = fault.byte
        self._body(start, at)
        match fault:
            case Stall():
                self.session.sleep(fault.seconds)
            case Drip():
                at = self._drip(at, stop, fault)
            case Corrupt():
                self.session.count("body_bytes")
                self.stream.sendall(bytes([os.pread(self.found.descriptor, 1, at)[0] ^ 0xFF]))
                at += 1
            case Short():
                raise Hangup
            case Reset():
                self._reset()
        self._body(at, stop)

    def _send_wrong(self, start: int, stop: int, *, is_told: bool) -> None:
        """Send as many bytes from elsewhere; after the object's last comes its first."""
        first = start - SHIFT_BYTES if start >= SHIFT_BYTES else start + SHIFT_BYTES
        last_stop = first + stop - start
        told = (first, last_stop) if is_told else (start, stop)
        self.stream.sendall(self._object_head(*told), socket.MSG_MORE)
        end = min(last_stop, self.found.size_bytes)
        self._body(first, end)
        self._body(0, last_stop - end)

    def _object_head(self, start: int, stop: int) -> bytes:
        fields = {
            **_fields(self.found, self.request, self.session),
            "content-length": str(stop - start),
        }
        if "range" not in self.request.headers:
            return _head(200, fields)
        size_bytes = self.found.size_bytes
        return _head(206, {**fields, "content-range": f"bytes {start}-{stop - 1}/{size_bytes}"})

    def _body(self, start: int, stop: int) -> None:
        """Send bytes of the file; of one that has no more, fewer: then the connection ends."""
        while start < stop:
            piece_bytes = min(stop - start, self.session.link.piece_bytes)
            self.session.link.take(piece_bytes)
            self.session.count("body_bytes", piece_bytes)  # before: who got it may ask at once
            sent_bytes = os.sendfile(
                self.stream.fileno(), self.found.descriptor, start, piece_bytes
            )
            self.session.count("body_bytes", sent_bytes - piece_bytes)
            if not sent_bytes:
                raise Hangup
            start += sent_bytes

    def _drip(self, start: int, stop: int, fault: Drip) -> int:
        """Send slowly; return where it ended."""
        drop_bytes = max(1, int(fault.bytes_per_s * DRIP_EVERY_S))
        for _ in range(round(fault.seconds / DRIP_EVERY_S)):
            drop_stop = min(stop, start + drop_bytes)
            self._body(start, drop_stop)
            start = drop_stop
            self.session.sleep(DRIP_EVERY_S)
        return start

    def _reset(self) -> None:
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        raise Hangup


def _fields(found: Stored, request: Request, session: Session) -> dict[str, str]:
    """Return the headers of an object; S3 tells the checksum of the whole only with the whole."""
    fields = {
        "etag": found.etag,
        "last-modified": LAST_MODIFIED,
        "accept-ranges": "bytes",
        "content-type": "application/octet-stream",
    }
    is_asked = request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED"
    if is_asked and "range" not in request.headers:
        offered = {name: found.checksums.get(name) for name in session.checksums}
        told = {f"x-amz-checksum-{name}": value for name, value in offered.items() if value}
        fields |= {**told, "x-amz-checksum-type": "FULL_OBJECT"} if told else {}
    return fields


def _head(status: int, fields: Mapping[str, str]) -> bytes:
    everything = {"x-amz-request-id": "FAULTPROXY", "server": "AmazonS3", **fields}
    lines = "".join(f"{name}: {value}\r\n" for name, value in everything.items())
    return f"HTTP/1.1 {status} {_REASONS.get(status, 'Refused')}\r\n{lines}\r\n".encode("latin-1")


def _send_text(
    stream: socket.socket,
    status: int,
    text: str,
    fields: Mapping[str, str] | None = None,
    *,
    is_head: bool = False,
) -> None:
    body = text.encode()
    told = {"content-type": "application/xml", "content-length": str(len(body)), **(fields or {})}
    stream.sendall(_head(status, told) + (b"" if is_head else body))


def _range(request: Request, size_bytes: int) -> tuple[int, int]:
    """Return the half-open range that is asked for, cut to the object."""
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match is None:
        return 0, size_bytes
    last = int(match[2]) if match[2] else size_bytes - 1
    return min(int(match[1]), size_bytes), min(last + 1, size_bytes)


def _parsed(head: bytes) -> Request:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    url = urlsplit(target)  # some clients send the whole URL
    fields = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in fields}
    return Request(method, unquote(url.path), url.query, headers)


def main() -> None:
    """Serve, until there is no more input."""
    server = Server(Setup(**json.loads(sys.stdin.readline())))
    print(json.dumps({"endpoint_url": server.endpoint_url}), flush=True)
    for line in sys.stdin:
        before, server.session = server.session, Session(Order(**json.loads(line)))
        print(json.dumps(before.counts()._asdict()), flush=True)


if __name__ == "__main__":
    main()
