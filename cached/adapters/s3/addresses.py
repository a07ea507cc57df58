"""Where a bucket is: host, port and path of a request."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from cached.core.errors import InsecureEndpoint, InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_REGION = "us-east-1"
_URL = re.compile(r"(https?)://(\[[0-9a-fA-F:.]+\]|[^/:?#@\s]+)(?::([0-9]{1,5}))?(/[^?#\s]*)?")
_LOOPBACK = re.compile(r"localhost|127(\.[0-9]{1,3}){3}|::1")
_ADDRESS = re.compile(r"[0-9.]+|.*:.*")
_LABELS = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")


class Place(NamedTuple):
    """Where one request goes.

    Attributes:
        host: an IPv6 address without brackets.
        authority: the Host header.
        path: quoted, with the bucket in it or not.
    """

    is_tls: bool
    host: str
    port: int
    authority: str
    path: str


class Addresses:
    """Finds the place of a bucket's requests.

    Args:
        endpoint_url: of another store than AWS; ``None``: AWS.
        style: ``path``; ``virtual`` (the bucket stands in the host name), where the bucket's
            name and the endpoint allow it; ``auto``: virtual on AWS, path elsewhere.
        quote_path: percent-encodes a key for the wire.
        allow_insecure: plain HTTP also to what is not loopback.
        sends_key: requests carry a key of SSE-C: plain HTTP to loopback only.

    Raises:
        InvalidConfig: the endpoint is not an http or https URL.
        InsecureEndpoint: plain HTTP to a host that is not loopback.
    """

    def __init__(
        self,
        endpoint_url: str | None,
        style: str,
        quote_path: Callable[[str], str],
        *,
        allow_insecure: bool = False,
        sends_key: bool = False,
    ) -> None:
        self._style = style
        self._quote_path = quote_path
        self._endpoint: Place | None = None
        if endpoint_url is not None:
            self._endpoint = _parsed(endpoint_url)
            _check_secret(self._endpoint, allow_insecure=allow_insecure, sends_key=sends_key)

    def of(self, bucket: str, key: str, region: str) -> Place:
        """Return the place of a key; of the bucket itself if ``key`` is empty."""
        endpoint = self._endpoint or _aws(region)
        if self._is_virtual(bucket, endpoint):
            return endpoint._replace(
                host=f"{bucket}.{endpoint.host}",
                authority=f"{bucket}.{endpoint.authority}",
                path=f"{endpoint.path}/{self._quote_path(key)}",
            )
        below = f"{bucket}/{key}" if key else bucket
        return endpoint._replace(path=f"{endpoint.path}/{self._quote_path(below)}")

    def _is_virtual(self, bucket: str, endpoint: Place) -> bool:
        """Return whether the bucket stands in the host name, as asked, and where it can."""
        if self._style == "path" or _ADDRESS.fullmatch(endpoint.host):
            return False
        if not _LABELS.fullmatch(bucket) or (endpoint.is_tls and "." in bucket):
            return False  # no host name, or one that no certificate covers
        return self._style == "virtual" or self._endpoint is None


def _aws(region: str) -> Place:
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    host = f"s3.{region}.{suffix}"
    return Place(is_tls=True, host=host, port=443, authority=host, path="")


def _parsed(url: str) -> Place:
    match = _URL.fullmatch(url.strip())
    if match is None or (match[3] and not 0 < int(match[3]) < 1 << 16):
        message = f"endpoint_url must be http[s]://HOST[:PORT][/PATH], was {url[:200]!r}"
        raise InvalidConfig(message, hint="for example https://s3.example.com")
    is_tls = match[1] == "https"
    host = match[2].strip("[]")
    default = 443 if is_tls else 80
    port = int(match[3] or default)
    authority = match[2] if port == default else f"{match[2]}:{port}"
    return Place(is_tls, host, port, authority, (match[4] or "").rstrip("/"))


def _check_secret(place: Place, *, allow_insecure: bool, sends_key: bool) -> None:
    """Raise InsecureEndpoint if others on the way could read or change what they must not."""
    if place.is_tls or _LOOPBACK.fullmatch(place.host.lower()):
        return
    refused = f"plain HTTP to {place.host} is not allowed"
    if sends_key:
        message = f"{refused} with sse_customer_key_file: the key could be read on the way"
        raise InsecureEndpoint(message, hint="use https://")
    if not allow_insecure:
        message = f"{refused}: weights could be changed on the way"
        hint = "use https://, or allow it with --allow-insecure-endpoint"
        raise InsecureEndpoint(message, hint=hint)
