"""Heads are read strictly: any bytes give a head or a ValueError, and nothing is guessed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.adapters.http_reader.heads import (
    Head,
    Url,
    body_length,
    chunk_size,
    parse_head,
    request_head,
    split_url,
)

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True)
VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF), max_size=20).filter(
    lambda value: "\x7f" not in value and value == value.strip()
)


def head_of(*lines: str, status: str = "HTTP/1.1 200 OK") -> Head:
    return parse_head("\r\n".join((status, *lines)).encode("latin-1"))


@given(st.integers(200, 599), st.dictionaries(NAMES, VALUES, max_size=5))
def test_what_was_written_is_read(status: int, headers: dict[str, str]):
    lines = [f"{name.title()}: {value}" for name, value in headers.items()]
    head = head_of(*lines, status=f"HTTP/1.1 {status} What a day")
    assert head[:2] == (status, headers)


@given(
    st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: b"HTTP/1.1 200 \r\n" + tail)
)
def test_any_bytes_are_a_head_or_a_value_error(data: bytes):
    try:
        head = parse_head(data)
    except ValueError:
        return
    assert 100 <= head.status < 600


@pytest.mark.parametrize(
    "line",
    [
        "HTTP/2 200",
        "HTTP/1.1 20",
        "HTTP/1.1 2000 OK",
        "HTTP/1.1  200 OK",
        "HTTP/1.1 099 x",
        "HTTP/1.1 600 x",
        "http/1.1 200 OK",
        "<html>",
        "",
        " HTTP/1.1 200 OK",
    ],
)
def test_another_first_line_is_refused(line: str):
    with pytest.raises(ValueError, match="status line"):
        head_of(status=line)


@pytest.mark.parametrize(
    "line",
    ["no colon", " folded: value", "na me: x", "name : x", ": x", "a: b\nc: d", "a: \0", "a: b\rc"],
)
def test_a_malformed_header_line_is_refused(line: str):
    with pytest.raises(ValueError, match="header line"):
        head_of(line)


@pytest.mark.parametrize("name", ["Content-Length", "content-range", "Transfer-Encoding"])
def test_a_header_that_frames_the_body_may_be_there_once_only(name: str):
    with pytest.raises(ValueError, match=f"two {name.lower()}"):
        head_of(f"{name}: 5", f"{name.lower()}: 5")


def test_other_repeated_headers_are_joined():
    assert head_of("Vary: a", "vary:b").headers == {"vary": "a, b"}


@pytest.mark.parametrize(
    ("version", "connection", "keeps"),
    [
        ("1.1", None, True),
        ("1.1", "close", False),
        ("1.1", "Close, x", False),
        ("1.1", "keep-alive", True),
        ("1.0", None, False),
        ("1.0", "keep-alive", False),
    ],
)
def test_only_http_1_1_without_close_keeps_the_connection(
    version: str, connection: str | None, keeps: bool
):
    lines = [f"Connection: {connection}"] if connection else []
    assert head_of(*lines, status=f"HTTP/{version} 200 OK").keeps_alive == keeps


@pytest.mark.parametrize(
    ("status", "lines", "length"),
    [
        (200, ["content-length: 0"], 0),
        (206, ["content-length: 12"], 12),
        (200, ["transfer-encoding: chunked"], None),
        (200, [], -1),
        (204, [], 0),
        (304, ["content-length: 12"], 0),
        (100, [], 0),
    ],
)
def test_the_length_of_a_body_is_as_in_rfc_9112(status: int, lines: list[str], length: int | None):
    assert body_length(head_of(*lines, status=f"HTTP/1.1 {status} x")) == length


@pytest.mark.parametrize(
    "lines",
    [
        ["content-length: -1"],
        ["content-length: +1"],
        ["content-length: 1 2"],
        ["content-length: 0x10"],
        ["content-length: 1, 1"],
        ["content-length: \u00b2"],
        ["content-length:"],
        ["content-length: 9999999999999999999"],
        ["content-length: 5", "transfer-encoding: chunked"],
        ["transfer-encoding: gzip, chunked"],
        ["transfer-encoding: identity"],
    ],
)
def test_an_unclear_length_is_refused(lines: list[str]):
    with pytest.raises(ValueError, match=r"content-length|transfer-encoding"):
        body_length(head_of(*lines))


@pytest.mark.parametrize(
    ("line", "size"),
    [(b"0", 0), (b"1a", 26), (b"FFFFFFFF", 0xFFFFFFFF), (b"5;name=value", 5), (b"5 ", 5)],
)
def test_a_chunk_tells_its_size_in_hexadecimal(line: bytes, size: int):
    assert chunk_size(line) == size


@pytest.mark.parametrize("line", [b"", b"-1", b"0x1", b"g", b"1 2", b"123456789", b"1\0"])
def test_a_malformed_chunk_size_is_refused(line: bytes):
    with pytest.raises(ValueError, match="chunk size"):
        chunk_size(line)


def test_a_request_is_written_as_it_is_given():
    head = request_head("GET", "/a%20b?c=d", {"host": "h", "range": "bytes=0-1"})
    assert head == b"GET /a%20b?c=d HTTP/1.1\r\nhost: h\r\nrange: bytes=0-1\r\n\r\n"


@pytest.mark.parametrize(
    ("method", "target", "value"),
    [("GET", "/", "a\r\nx: y"), ("GET", "/\n", "a"), ("GET\r", "/", "a"), ("GET", "/", "a\0")],
)
def test_a_request_never_grows_another_header(method: str, target: str, value: str):
    with pytest.raises(ValueError, match="line break"):
        request_head(method, target, {"host": value})


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://h", Url(False, "h", 80, "/")),
        ("https://h/a?b", Url(True, "h", 443, "/a?b")),
        ("http://127.0.0.1:8080/", Url(False, "127.0.0.1", 8080, "/")),
        ("http://[::1]:9?q", Url(False, "::1", 9, "/?q")),
    ],
)
def test_a_url_is_taken_apart(url: str, parts: Url):
    assert split_url(url) == parts


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("http://h:80/", "h"),
        ("https://h:443/", "h"),
        ("https://h:80/", "h:80"),
        ("http://[::1]/", "[::1]"),
        ("http://[::1]:9/", "[::1]:9"),
    ],
)
def test_the_host_header_has_the_port_if_it_is_not_the_schemes(url: str, authority: str):
    assert split_url(url).authority == authority


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h",
        "ftp://h/",
        "http://",
        "http://u@h/",
        "http://h:0/",
        "http://h:65536/",
        "http://h /",
        "http://h/#f",
    ],
)
def test_what_is_no_url_is_refused(url: str):
    with pytest.raises(ValueError, match="not a"):
        split_url(url)
