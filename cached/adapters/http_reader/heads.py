"""What stands before a body: request heads written, reply heads parsed. No I/O.

A ``ValueError`` of this module says what is wrong with a reply, to follow "HOST sent ".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

MAX_HEAD_BYTES = 64 << 10  # status line and headers; S3 sends at most some 8 KiB

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\x00\r\n]*)?")
_FIELD_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00\r\n]*)?")
_URL = re.compile(r"(https?)://(\[[0-9a-fA-F:.]+\]|[^/:?#@\s]+)(?::(\d{1,5}))?([/?][^\s#]*)?")
_SINGLE = frozenset({"content-length", "content-range", "transfer-encoding"})


class Head(NamedTuple):
    """Status and headers of a reply.

    Attributes:
        status: 100-599.
        headers: names in lower case; the values of a repeated one joined by ``", "``.
        keeps_alive: whether the server keeps the connection open after the body.
    """

    status: int
    headers: dict[str, str]
    keeps_alive: bool


class Url(NamedTuple):
    """An http or https URL.

    Attributes:
        host: name or address, an IPv6 one without brackets.
        target: path and query, as quoted as it came.
    """

    is_tls: bool
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """The Host header: without the port if it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)


def parse_head(data: bytes) -> Head:
    """Parse a status line and headers, without the empty line that ends them.

    Raises:
        ValueError: not HTTP/1, or ambiguous.
    """
    first, *lines = data.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(first)
    if match is None:
        _refuse(f"no HTTP/1 status line but {first[:40]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, value = _field(line)
        if name in headers:
            if name in _SINGLE:
                _refuse(f"two {name} headers")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    keeps_alive = match[1] == b"1" and "close" not in headers.get("connection", "").lower()
    return Head(int(match[2]), headers, keeps_alive)


def _field(line: bytes) -> tuple[str, str]:
    name, colon, value = line.partition(b":")
    if not colon or not _FIELD_NAME.fullmatch(name) or any(char in value for char in b"\r\n\0"):
        _refuse(f"a malformed header line: {line[:40]!r}")
    return name.decode("ascii").lower(), value.decode("latin-1").strip(" \t")


def body_length(head: Head) -> int | None:
    """Return how long a reply's body is: None if chunked, -1 up to the connection's end.

    Not for the reply to a HEAD request, which has none. The rules are RFC 9112, 6.3.

    Raises:
        ValueError: not a length, or two ways to tell it.
    """
    length, coding = head.headers.get("content-length"), head.headers.get("transfer-encoding")
    if length is not None and not _LENGTH.fullmatch(length):
        _refuse(f"the content-length {length[:40]!r}")
    if coding is not None and (length is not None or coding.lower() != "chunked"):
        _refuse(f"the transfer-encoding {coding[:40]!r} with the content-length {length}")
    if head.status < 200 or head.status in {204, 304}:
        return 0
    if coding is not None:
        return None
    return -1 if length is None else int(length)


def chunk_size(line: bytes) -> int:
    """Return the size that a chunk's first line tells, its extensions left out.

    Raises:
        ValueError: it tells none.
    """
    match = _CHUNK_SIZE.fullmatch(line)
    if match is None:
        _refuse(f"the chunk size {line[:40]!r}")
    return int(match[1], 16)


def request_head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """Return the head of a request.

    Args:
        method: GET, HEAD, POST, …
        target: path and query, already quoted.
        headers: names and values as they are sent.

    Raises:
        ValueError: a line break, NUL or a character over U+00FF in any of them.
    """
    text = "\r\n".join((f"{method} {target} HTTP/1.1", *(f"{n}: {v}" for n, v in headers.items())))
    if text.count("\n") != len(headers) or text.count("\r") != len(headers) or "\0" in text:
        raise ValueError("a line break or NUL in the head of a request")
    return text.encode("latin-1") + b"\r\n\r\n"


def split_url(url: str) -> Url:
    """Take an http or https URL apart.

    Raises:
        ValueError: it is not ``http[s]://host[:port][/path][?query]``.
    """
    match = _URL.fullmatch(url)
    if match is None:
        _refuse(f"not an http or https URL: {url[:200]!r}")
    is_tls = match[1] == "https"
    port = int(match[3]) if match[3] else (443 if is_tls else 80)
    if not 0 < port < 1 << 16:
        _refuse(f"not a port: {port}")
    target = match[4] or "/"
    target = target if target[0] == "/" else f"/{target}"
    return Url(is_tls, match[2].strip("[]"), port, target)
