"""The object stores of a daemon, by URI scheme: reader, signer and credentials put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.adapters.credentials import Credentials
from cached.adapters.http_reader.dialer import Dialer
from cached.adapters.http_reader.heads import request_head
from cached.adapters.local_files import LocalFiles
from cached.adapters.s3 import S3Store
from cached.adapters.s3.addresses import Addresses
from cached.adapters.s3.customer_key import headers_of
from cached.adapters.s3.requests import Requests, Tools
from cached.adapters.sigv4 import Signer, quote_path, quote_query
from cached.core.errors import CredentialsUnavailable, InvalidConfig
from cached.core.events import PartStalled

if TYPE_CHECKING:
    from cached.adapters.log import Writer
    from cached.core.config import Config
    from cached.core.objects import Part
    from cached.ports import Clock, Post


def stores(
    config: Config, clock: Clock, writer: Writer, post: Post | None = None
) -> dict[str, S3Store | LocalFiles]:
    """Return the stores of this configuration; the caller closes them.

    Args:
        config: of the daemon.
        clock: for signatures and the expiry of credentials.
        writer: of the log, for what is wrong and was mended.
        post: told of parts that bring nothing; ``None``: nobody is.

    Raises:
        InvalidConfig: the endpoint is not a URL, or the file of the customer's key holds none.
        InsecureEndpoint: plain HTTP to a host that is not loopback, without the flag.
    """
    dialer = Dialer(
        connect_timeout_s=config.connect_timeout_s,
        receive_timeout_s=config.receive_timeout_s,
        ca_bundle=config.ca_bundle,
    )
    key_file = config.sse_customer_key_file
    if key_file is not None:
        _check_key(key_file)
    tools = Tools(
        connect=dialer.connect,
        request_head=request_head,
        sign=Signer().sign,
        quote_query=quote_query,
        credentials=None if config.anonymous else Credentials(dialer.exchange, clock),
        warn=lambda event, fields: writer.write("warning", event, **fields),
        customer_key=None if key_file is None else lambda: headers_of(key_file),
    )
    addresses = Addresses(
        config.endpoint_url,
        config.addressing_style,
        quote_path,
        allow_insecure=config.allow_insecure_endpoint,
        sends_key=config.sse_customer_key_file is not None,
    )
    requests = Requests(addresses, tools, clock, config.region, config.fetch_threads)

    def stalled(part: Part, watermark: int, idle_s: float) -> None:
        if post is not None:
            post(PartStalled(part, watermark, idle_s))

    return {"s3": S3Store(requests, stalled), "file": LocalFiles()}


def _check_key(path: str) -> None:
    """Notice now what every request would fail of; the key is read again at each use."""
    try:
        headers_of(path)
    except CredentialsUnavailable as error:
        raise InvalidConfig(error.message, hint=error.hint) from error
