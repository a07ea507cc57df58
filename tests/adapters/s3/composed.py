"""The S3 adapter as a host composes it, for a server of the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cached.adapters.credentials import Credentials
from cached.adapters.http_reader.dialer import Dialer
from cached.adapters.http_reader.heads import request_head
from cached.adapters.s3.addresses import Addresses
from cached.adapters.s3.customer_key import headers_of
from cached.adapters.s3.requests import Requests, Tools
from cached.adapters.s3.store import S3Store
from cached.adapters.sigv4 import Signer, quote_path, quote_query
from tests.fakes.s3_objects import Account

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.fakes.store_server import StoreServer

REGION = "eu-central-1"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIDTEST", "AWS_SECRET_ACCESS_KEY": "secret"}
ACCOUNT = Account("AKIDTEST", "secret", REGION)
WALL_S = 1_800_000_000.0


class Clock:
    """A clock that stands still."""

    def __init__(self, wall_s: float) -> None:
        self._wall_s = wall_s

    def now_s(self) -> float:
        return 0.0

    def wall_s(self) -> float:
        return self._wall_s


class Warnings(list[tuple[str, dict[str, Any]]]):
    """What was said to the log."""

    def __call__(self, event: str, fields: Mapping[str, object]) -> None:
        self.append((event, dict(fields)))


def tools(
    environ: Mapping[str, str] | None = None,
    *,
    wall_s: float = WALL_S,
    receive_timeout_s: float = 5.0,
    ca_bundle: str | None = None,
    warn: Warnings | None = None,
    customer_key: str | None = None,
) -> Tools:
    """Return what the composer hands over; without ``environ`` nothing is signed."""
    dialer = Dialer(connect_timeout_s=5.0, receive_timeout_s=receive_timeout_s, ca_bundle=ca_bundle)
    credentials = None
    if environ is not None:
        credentials = Credentials(dialer.exchange, Clock(wall_s), environ)
    return Tools(
        connect=dialer.connect,
        request_head=request_head,
        sign=Signer().sign,
        quote_query=quote_query,
        credentials=credentials,
        warn=Warnings() if warn is None else warn,
        customer_key=None if customer_key is None else lambda: headers_of(customer_key),
    )


def requests(
    server: StoreServer,
    made: Tools | None = None,
    *,
    style: str = "auto",
    region: str | None = REGION,
    wall_s: float = WALL_S,
) -> Requests:
    """Return what sends requests to a server."""
    addresses = Addresses(server.endpoint_url, style, quote_path)
    return Requests(addresses, made or tools(), Clock(wall_s), region)


def composed(server: StoreServer, **settings: Any) -> S3Store:
    """Return a store over a server: settings of ``tools``."""
    return S3Store(requests(server, tools(**settings)))
