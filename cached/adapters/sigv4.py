"""Signatures of S3 requests: AWS Signature Version 4 in headers.

The algorithm and its test vectors: "Authenticating Requests (AWS Signature Version 4)" in the
Amazon S3 API reference. Paths of S3 are quoted once, not twice as those of other services.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Protocol

    class Keys(Protocol):
        """What a request is signed with."""

        @property
        def access_key_id(self) -> str:
            """Public; named in the request."""

        @property
        def secret_access_key(self) -> str:
            """Never sent."""

        @property
        def session_token(self) -> str | None:
            """Of temporary credentials; sent and signed."""


EMPTY_SHA256 = hashlib.sha256().hexdigest()
UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
_ALGORITHM = "AWS4-HMAC-SHA256"
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_QUOTED = tuple(chr(b) if b in _UNRESERVED else f"%{b:02X}" for b in range(256))
_QUOTED_PATH = tuple("/" if b == ord("/") else _QUOTED[b] for b in range(256))


def quote(text: str) -> str:
    """Percent-encode all but unreserved characters: for a query's names and values."""
    return "".join([_QUOTED[byte] for byte in text.encode()])


def quote_path(path: str) -> str:
    """Percent-encode all but unreserved characters and ``/``: as S3 wants a key on the wire."""
    return "".join([_QUOTED_PATH[byte] for byte in path.encode()])


def quote_query(parameters: Iterable[tuple[str, str]]) -> str:
    """Return a query in the order in which it is signed."""
    pairs = sorted((quote(name), quote(value)) for name, value in parameters)
    return "&".join([f"{name}={value}" for name, value in pairs])


class Signer:
    """Signs requests of one service. Any thread.

    The signing key of a day, region and secret is kept: it is half of the work.
    """

    __slots__ = ("_cached", "_service")

    def __init__(self, service: str = "s3") -> None:
        self._service = service
        self._cached: tuple[tuple[str, str, str], bytes] = (("", "", ""), b"")

    def sign(
        self,
        keys: Keys,
        request: tuple[str, str, str],
        headers: Mapping[str, str],
        *,
        region: str,
        wall_s: float,
        payload: str = EMPTY_SHA256,
    ) -> dict[str, str]:
        """Return the headers to send: those given, and those that a signature needs.

        Args:
            keys: credentials; read, not kept, but for the key that is derived from them.
            request: method, quoted path (``quote_path``), query (``quote_query``).
            headers: names in lower case, ``host`` among them. All are signed.
            region: as in the bucket's location.
            wall_s: seconds since 1970; stores refuse more than 15 minutes of difference.
            payload: SHA-256 of the body in hex, or ``UNSIGNED_PAYLOAD``.
        """
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(wall_s))
        signed = {**headers, "x-amz-content-sha256": payload, "x-amz-date": stamp}
        if keys.session_token:
            signed["x-amz-security-token"] = keys.session_token
        names = sorted(signed)
        listed = ";".join(names)
        lines = [f"{name}:{' '.join(signed[name].split())}" for name in names]
        canonical = "\n".join((*request, *lines, "", listed, payload))
        day = stamp[:8]
        scope = f"{day}/{region}/{self._service}/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        to_sign = f"{_ALGORITHM}\n{stamp}\n{scope}\n{digest}"
        key = self._key(keys.secret_access_key, day, region)
        signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
        signed["authorization"] = (
            f"{_ALGORITHM} Credential={keys.access_key_id}/{scope}, "
            f"SignedHeaders={listed}, Signature={signature}"
        )
        return signed

    def _key(self, secret: str, day: str, region: str) -> bytes:
        made_of = (secret, day, region)
        kept_of, key = self._cached
        if kept_of != made_of:
            key = b"AWS4" + secret.encode()
            for word in (day, region, self._service, "aws4_request"):
                key = hmac.digest(key, word.encode(), "sha256")
            self._cached = (made_of, key)  # one assignment: other threads see old or new
        return key
