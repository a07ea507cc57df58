"""A bucket stands in the host name or in the path, as the endpoint and its name allow."""

from __future__ import annotations

import pytest

from cached.adapters.s3.addresses import Addresses
from cached.adapters.sigv4 import quote_path
from cached.core.errors import InsecureEndpoint, InvalidConfig

REGION = "eu-central-1"


def url(
    endpoint: str | None,
    style: str = "auto",
    bucket: str = "models",
    key: str = "a b/c",
    region: str = REGION,
) -> str:
    place = Addresses(endpoint, style, quote_path, allow_insecure=True).of(bucket, key, region)
    assert place.authority.partition(":")[0] == place.host or ":" in place.host
    return f"http{'s' if place.is_tls else ''}://{place.authority}{place.path}"


def test_on_aws_the_bucket_stands_in_the_host_name():
    assert url(None) == "https://models.s3.eu-central-1.amazonaws.com/a%20b/c"


def test_on_aws_the_bucket_can_be_put_in_the_path():
    assert url(None, "path") == "https://s3.eu-central-1.amazonaws.com/models/a%20b/c"


def test_china_has_its_own_domain():
    assert url(None, region="cn-north-1").startswith(
        "https://models.s3.cn-north-1.amazonaws.com.cn/"
    )


def test_elsewhere_the_bucket_stands_in_the_path():
    assert url("https://store.example:9000") == "https://store.example:9000/models/a%20b/c"


def test_elsewhere_the_bucket_can_be_put_in_the_host_name():
    assert url("https://store.example:9000", "virtual") == (
        "https://models.store.example:9000/a%20b/c"
    )


@pytest.mark.parametrize("bucket", ["my.models", "My_Models", "models_"])
def test_a_bucket_that_no_certificate_or_host_name_fits_stands_in_the_path(bucket: str):
    assert url(None, bucket=bucket) == f"https://s3.eu-central-1.amazonaws.com/{bucket}/a%20b/c"


def test_without_tls_a_bucket_with_a_dot_may_stand_in_the_host_name():
    assert url("http://store.example", "virtual", "my.models") == (
        "http://my.models.store.example/a%20b/c"
    )


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9000", "http://[::1]:9000"])
def test_an_address_has_no_host_names_below_it(endpoint: str):
    assert url(endpoint, "virtual") == f"{endpoint}/models/a%20b/c"


def test_a_path_of_the_endpoint_stays_before_the_bucket():
    assert url("https://proxy.example/s3/") == "https://proxy.example/s3/models/a%20b/c"


@pytest.mark.parametrize(("style", "path"), [("virtual", "/"), ("path", "/models")])
def test_the_bucket_itself_has_a_path(style: str, path: str):
    assert Addresses(None, style, quote_path).of("models", "", REGION).path == path


def test_the_host_header_leaves_out_the_port_of_the_scheme():
    assert url("https://store.example:443") == "https://store.example/models/a%20b/c"


@pytest.mark.parametrize("key", ["a//b", "../a", "./a", "/a", "a/"])
def test_a_key_is_never_made_shorter(key: str):
    assert url(None, key=key).endswith(f"amazonaws.com/{key}")


@pytest.mark.parametrize(
    "endpoint", ["http://localhost:9000", "http://127.8.8.8", "http://[::1]", "http://LOCALHOST"]
)
def test_plain_http_to_loopback_is_allowed(endpoint: str):
    assert not Addresses(endpoint, "auto", quote_path).of("models", "a", REGION).is_tls


@pytest.mark.parametrize(
    "endpoint",
    ["http://store.example", "http://127.0.0.1.example", "http://10.0.0.1", "http://128.0.0.1"],
)
def test_plain_http_to_anything_else_is_refused(endpoint: str):
    with pytest.raises(InsecureEndpoint, match="allow-insecure-endpoint"):
        Addresses(endpoint, "auto", quote_path)


@pytest.mark.parametrize("allow_insecure", [False, True])
def test_a_key_of_the_customer_is_not_sent_in_the_clear(allow_insecure: bool):
    settings = {"allow_insecure": allow_insecure, "sends_key": True}
    Addresses(None, "auto", quote_path, **settings)
    Addresses("https://store.example", "auto", quote_path, **settings)
    Addresses("http://127.0.0.1:9000", "auto", quote_path, **settings)
    with pytest.raises(InsecureEndpoint, match=r"with sse_customer_key_file: .*; use https://"):
        Addresses("http://store.example", "auto", quote_path, **settings)


@pytest.mark.parametrize(
    "endpoint",
    [
        "store.example",
        "ftp://store.example",
        "https://",
        "https://a:0",
        "https://a:99999",
        "https://u:p@h",
    ],
)
def test_what_is_not_a_url_is_refused(endpoint: str):
    with pytest.raises(InvalidConfig, match="endpoint_url"):
        Addresses(endpoint, "auto", quote_path)
