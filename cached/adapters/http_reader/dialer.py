"""New connections, plain and TLS, and small exchanges on connections of their own."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from typing import TYPE_CHECKING, NamedTuple

from cached.adapters.http_reader.connection import Connection
from cached.adapters.http_reader.heads import request_head, split_url
from cached.adapters.http_reader.mover import Mover
from cached.adapters.http_reader.receiving import MORE_FILES, Receiver, reason
from cached.core.errors import StoreError, StoreUnavailable

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

MAX_REPLY_BYTES = 64 << 10


class Reply(NamedTuple):
    """A small reply, read whole.

    Attributes:
        headers: names in lower case.
    """

    status: int
    headers: dict[str, str]
    body: bytes


class Dialer:
    """Opens connections. Any thread; holds nothing that must be closed.

    Args:
        connect_timeout_s: for each address of a host, and for the TLS handshake.
        receive_timeout_s: a wait without one byte ends then.
        ca_bundle: PEM file of the certificates that are trusted instead of the system's;
            read at the first TLS connection (reading the system's takes 20 ms).
    """

    __slots__ = (
        "_ca_bundle",
        "_connect_timeout_s",
        "_lock",
        "_mover",
        "_receive_timeout_s",
        "_tls",
    )

    def __init__(
        self, *, connect_timeout_s: float, receive_timeout_s: float, ca_bundle: str | None = None
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._receive_timeout_s = receive_timeout_s
        self._ca_bundle = ca_bundle
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._mover = Mover()

    def connect(self, host: str, port: int, *, is_tls: bool) -> Connection:
        """Return a new connection; the caller closes it.

        Args:
            host: name or address, an IPv6 one without brackets.
            port: of TCP.
            is_tls: TLS 1.2 or later, with a trusted certificate for ``host``.

        Raises:
            StoreUnavailable: no such host, refused, or not in time.
            StoreError: the certificate is not trusted, or ``ca_bundle`` cannot be read.
        """
        peer = f"{host}:{port}"
        try:
            sock = socket.create_connection((host, port), timeout=self._connect_timeout_s)
        except (OSError, UnicodeError) as error:
            message = f"cannot connect to {peer}: {reason(error)}"
            hint = "check endpoint and region, and that the store is up"
            if getattr(error, "errno", None) in {errno.EMFILE, errno.ENFILE}:
                hint = MORE_FILES
            raise StoreUnavailable(message, hint=hint) from error
        with contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if is_tls:
                connection = self._secure(sock, host, peer)
            else:
                timeout_s = self._receive_timeout_s
                receiver = Receiver(sock, peer, receive_timeout_s=timeout_s, mover=self._mover)
                connection = Connection(receiver)
            stack.pop_all()
        return connection

    def exchange(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes = b""
    ) -> Reply:
        """Make one small request on a connection of its own.

        Args:
            method: GET, POST, …
            url: already quoted.
            headers: besides host, content-length and connection.
            body: of the request.

        Raises:
            StoreError: as for ``connect``; BadReply for one over 64 KiB.
            ValueError: not a URL, or a line break in a header.
        """
        where = split_url(url)
        fields = {"host": where.authority, **headers, "connection": "close"}
        if body:
            fields["content-length"] = str(len(body))
        request = request_head(method, where.target, fields) + body
        connection = self.connect(where.host, where.port, is_tls=where.is_tls)
        try:
            connection.send(request)
            head = connection.head()
            return Reply(head.status, head.headers, connection.read(MAX_REPLY_BYTES))
        finally:
            connection.close()

    def _secure(self, sock: socket.socket, host: str, peer: str) -> Connection:
        import ssl

        try:
            secured = self._context().wrap_socket(sock, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            why = error.verify_message.rstrip(".")
            message = f"the certificate of {peer} is not trusted: {why}"
            hint = "name the certificates to trust: ca_bundle, or AWS_CA_BUNDLE"
            raise StoreError(message, hint=hint) from error
        except OSError as error:
            message = f"no TLS connection to {peer}: {reason(error)}"
            hint = "check that the endpoint speaks TLS 1.2 or later"
            raise StoreUnavailable(message, hint=hint) from error
        again = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
        receiver = Receiver(secured, peer, receive_timeout_s=self._receive_timeout_s, again=again)
        return Connection(receiver)

    def _context(self) -> ssl.SSLContext:
        import ssl

        with self._lock:
            if self._tls is None:
                try:
                    self._tls = ssl.create_default_context(cafile=self._ca_bundle)
                except OSError as error:
                    message = f"cannot read ca_bundle {self._ca_bundle}: {reason(error)}"
                    raise StoreError(message, hint="it must be a file of PEM") from error
                self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
            return self._tls
