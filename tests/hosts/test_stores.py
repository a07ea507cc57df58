"""The stores of a configuration: one for each scheme, nothing insecure by accident."""

from __future__ import annotations

import pytest

from cached.adapters.clock import SystemClock
from cached.adapters.log import Writer
from cached.cli.load import load
from cached.core.errors import InsecureEndpoint, InvalidConfig
from cached.hosts.stores import stores


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


def test_an_endpoint_must_be_a_url():
    with pytest.raises(InvalidConfig, match="endpoint_url"):
        made(endpoint_url="store.example")
