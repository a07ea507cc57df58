"""The object stores of a daemon, by URI scheme: reader, signer and credentials put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.adapters.credentials import Credentials
from cached.adapters.http_reader.dialer import Dialer
from cached.adapters.http_reader.heads import request_head
from cached.adapters.local_files import LocalFiles
from cached.adapters.s3 import S3Store
from cached.adapters.s3.addresses import Addresses
from cached.adapters.s3.requests import Requests, Tools
from cached.adapters.sigv4 import Signer, quote_path, quote_query

if TYPE_CHECKING:
    from cached.adapters.log import Writer
    from cached.core.config import Config
    from cached.ports import Clock, ObjectStore


def stores(config: Config, clock: Clock, writer: Writer) -> dict[str, ObjectStore]:
    """Return the stores of this configuration; the caller closes them.

    Args:
        config: of the daemon.
        clock: for signatures and the expiry of credentials.
        writer: of the log, for what is wrong and was mended.

    Raises:
        InvalidConfig: the endpoint is not a URL.
        InsecureEndpoint: plain HTTP to a host that is not loopback, without the flag.
    """
    dialer = Dialer(
        connect_timeout_s=config.connect_timeout_s,
        receive_timeout_s=config.receive_timeout_s,
        ca_bundle=config.ca_bundle,
    )
    tools = Tools(
        connect=dialer.connect,
        request_head=request_head,
        sign=Signer().sign,
        quote_query=quote_query,
        credentials=None if config.anonymous else Credentials(dialer.exchange, clock),
        warn=lambda event, fields: writer.write("warning", event, **fields),
    )
    addresses = Addresses(
        config.endpoint_url,
        config.addressing_style,
        quote_path,
        allow_insecure=config.allow_insecure_endpoint,
    )
    requests = Requests(addresses, tools, clock, config.region)
    return {"s3": S3Store(requests), "file": LocalFiles()}
