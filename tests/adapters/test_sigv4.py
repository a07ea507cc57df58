"""Signatures are those that AWS publishes, and those that botocore makes, for any request."""

from __future__ import annotations

import calendar
import datetime
import time
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from cached.adapters.sigv4 import (
    EMPTY_SHA256,
    UNSIGNED_PAYLOAD,
    Signer,
    quote,
    quote_path,
    quote_query,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


class Keys(NamedTuple):
    access_key_id: str = "AKIAIOSFODNN7EXAMPLE"
    secret_access_key: str = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    session_token: str | None = None


VECTOR_S = calendar.timegm((2013, 5, 24, 0, 0, 0))
VECTOR_HOST = "examplebucket.s3.amazonaws.com"

# "Examples: Signature Calculations" in the Amazon S3 API reference.
VECTORS = {
    "get object": (
        ("GET", "/test.txt", ""),
        {"host": VECTOR_HOST, "range": "bytes=0-9"},
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
    ),
    "get bucket lifecycle": (
        ("GET", "/", quote_query([("lifecycle", "")])),
        {"host": VECTOR_HOST},
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
    ),
    "list objects": (
        ("GET", "/", quote_query([("prefix", "J"), ("max-keys", "2")])),
        {"host": VECTOR_HOST},
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
    ),
}


def signature(headers: Mapping[str, str]) -> str:
    return headers["authorization"].rpartition("Signature=")[2]


@pytest.mark.parametrize("case", VECTORS)
def test_the_published_example_has_its_published_signature(case: str):
    request, headers, expected = VECTORS[case]
    signed = Signer().sign(Keys(), request, headers, region="us-east-1", wall_s=VECTOR_S)
    assert signature(signed) == expected


def test_the_published_credential_scope_is_named():
    signed = Signer().sign(Keys(), *VECTORS["get object"][:2], region="us-east-1", wall_s=VECTOR_S)
    assert signed["authorization"].startswith(
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, Signature="
    )
    assert signed["x-amz-date"] == "20130524T000000Z"
    assert signed["x-amz-content-sha256"] == EMPTY_SHA256


def by_botocore(
    keys: Keys,
    request: tuple[str, str, str],
    headers: Mapping[str, str],
    region: str,
    wall_s: float,
    *,
    signs_payload: bool,
) -> tuple[str, str]:
    """Return the signature, and what it says about the payload."""
    method, path, query = request
    url = f"https://{headers['host']}{path}{'?' if query else ''}{query}"
    foreign = AWSRequest(method=method, url=url, headers=dict(headers))
    foreign.context["client_config"] = Config(s3={"payload_signing_enabled": signs_payload})
    auth = S3SigV4Auth(Credentials(*keys), "s3", region)
    now = datetime.datetime.fromtimestamp(int(wall_s), datetime.UTC).replace(tzinfo=None)
    with mock.patch("botocore.auth.get_current_datetime", return_value=now):
        auth.add_auth(foreign)
    return (
        signature({"authorization": foreign.headers["Authorization"]}),
        foreign.headers["X-Amz-Content-SHA256"],
    )


# No lone surrogates (not UTF-8), no control characters (botocore itself trips over "\n").
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
keys_of_objects = st.lists(
    st.one_of(
        words, st.sampled_from(["", " ", "a b", "+", "//", "~", "..", "ä", "日本", "%2F", "*"])
    ),
    min_size=1,
    max_size=4,
).map("/".join)
header_values = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20)


@given(
    key=keys_of_objects,
    query=st.dictionaries(words.filter(bool), words, max_size=3),
    more=st.dictionaries(
        st.sampled_from(["range", "if-match", "x-amz-checksum-mode", "accept-encoding"]),
        header_values,
    ),
    region=st.sampled_from(["us-east-1", "eu-central-1", "cn-north-1"]),
    token=st.sampled_from([None, "FwoGZXIvYXdzEBYaDH+/=="]),
    wall_s=st.floats(0, 4e9),
    signs_payload=st.booleans(),
)
def test_any_request_is_signed_as_botocore_signs_it(  # noqa: PLR0913, PLR0917 - hypothesis hands each over by name
    key: str,
    query: dict[str, str],
    more: dict[str, str],
    region: str,
    token: str | None,
    wall_s: float,
    signs_payload: bool,
):
    keys = Keys(session_token=token)
    request = ("GET", quote_path(f"/bucket/{key}"), quote_query(query.items()))
    headers = {"host": "s3.example.com", **more}
    expected, payload = by_botocore(
        keys, request, headers, region, wall_s, signs_payload=signs_payload
    )
    signed = Signer().sign(keys, request, headers, region=region, wall_s=wall_s, payload=payload)
    assert payload == (EMPTY_SHA256 if signs_payload else UNSIGNED_PAYLOAD)
    assert signature(signed) == expected


@given(words)
def test_quoting_leaves_only_unreserved_characters(text: str):
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~%")
    assert set(quote(text)) <= allowed
    assert set(quote_path(text)) <= allowed | {"/"}


@pytest.mark.parametrize(
    ("key", "quoted"),
    [
        ("a b+c", "a%20b%2Bc"),
        ("a//b", "a//b"),
        ("../~x", "../~x"),
        ("ä/日", "%C3%A4/%E6%97%A5"),
        ("100%/?#", "100%25/%3F%23"),
    ],
)
def test_a_key_goes_over_the_wire_as_s3_wants_it(key: str, quoted: str):
    assert quote_path(key) == quoted


def test_one_signer_serves_several_days_regions_and_secrets():
    signer, fresh = Signer(), []
    kept = []
    for wall_s in (0.0, 86400.0, 0.0):
        for region in ("a", "b"):
            for secret in ("x", "y"):
                arguments = (Keys(secret_access_key=secret), ("GET", "/", ""), {"host": "h"})
                kept.append(signer.sign(*arguments, region=region, wall_s=wall_s))
                fresh.append(Signer().sign(*arguments, region=region, wall_s=wall_s))
    assert kept == fresh
    assert len({signature(signed) for signed in kept}) == 8


def test_a_session_token_is_sent_and_signed():
    signed = Signer().sign(
        Keys(session_token="TOKEN"), ("GET", "/", ""), {"host": "h"}, region="r", wall_s=0
    )
    assert signed["x-amz-security-token"] == "TOKEN"
    assert "x-amz-security-token" in signed["authorization"]


def test_the_time_zone_of_the_machine_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    try:
        signed = Signer().sign(Keys(), ("GET", "/", ""), {"host": "h"}, region="r", wall_s=0)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert signed["x-amz-date"] == "19700101T000000Z"


def test_a_query_is_sorted_by_name_and_not_by_the_text_of_the_pair():
    assert quote_query([("a-b", "1"), ("a", "2")]) == "a=2&a-b=1"
