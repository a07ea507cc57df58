"""TLS on loopback: the server's side, and the certificate that a client has to trust."""

from __future__ import annotations

import ssl
from pathlib import Path

_FOLDER = Path(__file__).parent / "certificates"
AUTHORITY = str(_FOLDER / "authority.pem")


def server_context(most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """Return a context for 127.0.0.1, localhost and ``*.s3.test``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_FOLDER / "server.pem")
    context.maximum_version = most
    return context
