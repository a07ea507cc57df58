"""The stores of a configuration: one for each scheme, nothing insecure by accident."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cached.adapters.clock import SystemClock
from cached.adapters.log import Writer
from cached.adapters.s3 import S3Store
from cached.adapters.s3.customer_key import headers_of
from cached.cli.load import load
from cached.core.errors import InsecureEndpoint, InvalidConfig
from cached.hosts.stores import stores
from tests.fakes.s3_objects import SENT_KEY_MD5
from tests.fakes.store_server import StoreServer

if TYPE_CHECKING:
    from pathlib import Path


def made(**flags: object) -> dict[str, object]:
    clock = SystemClock()
    writer = Writer(2, clock)
    try:
        return dict(stores(load({"model": ["m=s3://b/m/"], **flags}, {}), clock, writer))
    finally:
        writer.close()


def test_there_is_a_store_for_each_scheme():
    assert set(made()) == {"s3", "file"}


def test_plain_http_is_for_loopback_or_with_the_flag():
    made(endpoint_url="http://127.0.0.1:1")
    made(endpoint_url="http://store.example", allow_insecure_endpoint="true")
    with pytest.raises(InsecureEndpoint, match="allow-insecure-endpoint"):
        made(endpoint_url="http://store.example")


def test_a_key_of_the_customer_goes_over_https_only(tmp_path: Path):
    (tmp_path / "key").write_bytes(bytes(32))
    flags = {"sse_customer_key_file": str(tmp_path / "key")}
    made(endpoint_url="https://store.example", **flags)
    with pytest.raises(InsecureEndpoint, match="use https://"):
        made(endpoint_url="http://store.example", allow_insecure_endpoint="true", **flags)


def test_what_is_no_key_is_refused_at_start(tmp_path: Path):
    (tmp_path / "key").write_bytes(bytes(31))
    with pytest.raises(InvalidConfig, match="must hold 32 bytes or their base64") as caught:
        made(sse_customer_key_file=str(tmp_path / "key"))
    assert "openssl rand" in caught.value.hint


def test_the_key_of_the_configuration_goes_with_a_request(tmp_path: Path):
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    with StoreServer({}) as server:
        flags = {"endpoint_url": server.endpoint_url, "anonymous": "true"}
        store = made(sse_customer_key_file=str(key), **flags)["s3"]
        assert isinstance(store, S3Store)
        store.put("s3://models/a", b"{}")
        store.close()
    assert server.objects["a"].customer_key_md5 == headers_of(str(key))[SENT_KEY_MD5]


def test_an_endpoint_must_be_a_url():
    with pytest.raises(InvalidConfig, match="endpoint_url"):
        made(endpoint_url="store.example")
