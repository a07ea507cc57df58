"""Connections lead to whom they should, over TLS that is checked, or an error says why."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any

import pytest

from cached.adapters.http_reader.dialer import Dialer
from cached.core.errors import BadReply, StoreError, StoreUnavailable
from tests.fakes import tls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPLY = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


class Server:
    """Answers each connection with the same bytes, after one request."""

    def __init__(self, answer: bytes = REPLY, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[bytes] = []
        self._answer = answer
        self._context = context
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection:
                if self._context is not None:
                    connection = self._context.wrap_socket(connection, server_side=True)
                with connection:
                    self.requests.append(connection.recv(65536))
                    connection.sendall(self._answer)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def start(answer: bytes = REPLY, context: ssl.SSLContext | None = None) -> Server:
            server = Server(answer, context)
            stack.callback(server.close)
            return server

        yield start


def dialer(ca_bundle: str | None = None) -> Dialer:
    return Dialer(connect_timeout_s=5, receive_timeout_s=5, ca_bundle=ca_bundle)


def test_a_small_exchange_returns_the_whole_reply(serve: Callable[..., Server]):
    server = serve()
    url = f"http://127.0.0.1:{server.port}/a?b"
    reply = dialer().exchange("POST", url, {"x-y": "z"}, b"body")
    assert (reply.status, reply.headers, reply.body) == (200, {"content-length": "5"}, b"hello")
    assert server.requests == [
        f"POST /a?b HTTP/1.1\r\nhost: 127.0.0.1:{server.port}\r\nx-y: z\r\nconnection: close\r\n"
        "content-length: 4\r\n\r\nbody".encode()
    ]


def test_a_small_exchange_does_not_read_for_ever(serve: Callable[..., Server]):
    server = serve(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 70_000)
    with pytest.raises(BadReply, match="more than 65536 bytes"):
        dialer().exchange("GET", f"http://127.0.0.1:{server.port}/", {})


@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tls_is_checked_against_the_bundle(
    serve: Callable[..., Server], host: str, most: ssl.TLSVersion
):
    server = serve(REPLY, tls.server_context(most))
    url = f"https://{host}:{server.port}/"
    assert dialer(tls.AUTHORITY).exchange("GET", url, {}).body == b"hello"


def test_a_certificate_that_is_not_trusted_is_refused_and_not_tried_again(
    serve: Callable[..., Server],
):
    server = serve(REPLY, tls.server_context())
    with pytest.raises(
        StoreError, match=r"certificate of 127\.0\.0\.1:\d+ is not trusted"
    ) as caught:
        dialer().exchange("GET", f"https://127.0.0.1:{server.port}/", {})
    assert not caught.value.transient
    assert "AWS_CA_BUNDLE" in caught.value.hint
    assert server.requests == []


def test_a_certificate_for_another_name_is_refused(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
):
    server = serve(REPLY, tls.server_context())
    here = ("127.0.0.1", server.port)
    real = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda _, timeout: real(here, timeout))
    with pytest.raises(StoreError, match="not trusted: Hostname mismatch"):
        dialer(tls.AUTHORITY).connect("store.example.com", 443, is_tls=True)
    dialer(tls.AUTHORITY).connect("bucket.s3.test", 443, is_tls=True).close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_before_1_2_is_refused(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch):
    """Also where Python's own default would allow it."""
    context = tls.server_context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    server = serve(REPLY, context)
    real = ssl.create_default_context

    def lax(**settings: Any) -> ssl.SSLContext:
        made = real(**settings)
        made.minimum_version = ssl.TLSVersion.TLSv1
        made.set_ciphers("ALL:@SECLEVEL=0")
        return made

    with (
        socket.create_connection(("127.0.0.1", server.port)) as plain,
        lax(cafile=tls.AUTHORITY).wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        assert secured.version() == "TLSv1.1"
    monkeypatch.setattr(ssl, "create_default_context", lax)
    with pytest.raises(StoreUnavailable, match=r"no TLS connection .* TLS 1\.2 or later"):
        dialer(tls.AUTHORITY).connect("127.0.0.1", server.port, is_tls=True)


def test_a_server_that_does_not_speak_tls_is_named(serve: Callable[..., Server]):
    server = serve(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(StoreUnavailable, match=rf"no TLS connection to 127\.0\.0\.1:{server.port}"):
        dialer(tls.AUTHORITY).connect("127.0.0.1", server.port, is_tls=True)


@pytest.mark.parametrize("content", [None, "not PEM"])
def test_a_bundle_that_cannot_be_read_is_named(
    serve: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory, content: str | None
):
    path = tmp_path_factory.mktemp("ca") / "bundle.pem"
    if content is not None:
        path.write_text(content)
    server = serve(REPLY, tls.server_context())
    with pytest.raises(StoreError, match=f"cannot read ca_bundle {path}") as caught:
        dialer(str(path)).connect("127.0.0.1", server.port, is_tls=True)
    assert not caught.value.transient


@pytest.mark.parametrize(
    ("host", "port"),
    [("127.0.0.1", 1), ("host.invalid", 80), ("a..b", 80), ("x" * 70, 80)],
)
def test_a_host_that_cannot_be_reached_is_a_typed_error_that_names_it(host: str, port: int):
    with pytest.raises(StoreUnavailable, match=f"cannot connect to {host}:{port}: ") as caught:
        dialer().connect(host, port, is_tls=False)
    assert caught.value.transient


def test_a_refused_connection_leaves_nothing_open(serve: Callable[..., Server]):
    server = serve(REPLY, tls.server_context())
    for _ in range(3):
        with pytest.raises(StoreError):
            dialer().connect("127.0.0.1", server.port, is_tls=True)
    # A leaked socket is a ResourceWarning, and that an error.


def test_a_process_without_a_free_descriptor_is_told_so():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(StoreUnavailable, match="too many open files") as caught:
            dialer().connect("127.0.0.1", 9, is_tls=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in held:
            os.close(fd)
    assert "ulimit -n" in caught.value.hint
