"""XML of a store is read as S3 writes it; anything else is a typed error, and nothing expands."""

from __future__ import annotations

from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.adapters.s3.documents import Fault, Listed, parse_fault, parse_listing
from cached.core.errors import BadReply, ObjectRefused
from tests.fakes.s3_objects import Answer, Asked, Stored, listing

XMLNS = "http://s3.amazonaws.com/doc/2006-03-01/"
# What XML 1.0 can hold; S3 quotes all keys for the sake of the others.
plain_text = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff")
)


def page(contents: str, more: str = "", root: str = "ListBucketResult") -> bytes:
    return f'<{root} xmlns="{XMLNS}">{more}{contents}</{root}>'.encode()


def entry(key: str, size: str = "1", more: str = "<ETag>&quot;e&quot;</ETag>") -> str:
    return f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size>{more}</Contents>"


@given(st.dictionaries(st.text(min_size=1).filter(lambda key: key.isprintable()), st.binary()))
def test_every_key_of_a_listing_comes_back(objects: dict[str, bytes]):
    held = {key: Stored(content, '"e"') for key, content in objects.items()}
    asked = Asked("GET", "/models", "list-type=2&encoding-type=url&prefix=", {})
    answer: Answer = listing(held, asked, 1000)
    found = parse_listing(answer.body)
    assert {(one.key, one.size_bytes) for one in found.objects} == {
        (key, len(content)) for key, content in objects.items()
    }
    assert found.next_token == ""


@given(plain_text.filter(bool))
def test_a_key_that_is_not_quoted_is_taken_as_it_is(key: str):
    assert parse_listing(page(entry(key))).objects == [Listed(key, 1, '"e"')]


@given(st.binary())
def test_bytes_are_a_listing_or_an_error(body: bytes):
    with pytest.raises(BadReply):
        parse_listing(body)
    assert parse_fault(body) == Fault("", "", {})


def test_a_page_that_is_not_the_last_names_the_next():
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>a+/=</NextContinuationToken>"
    assert parse_listing(page(entry("a"), more)).next_token == "a+/="


def test_the_last_page_names_none():
    more = "<IsTruncated>false</IsTruncated><NextContinuationToken>x</NextContinuationToken>"
    assert parse_listing(page(entry("a"), more)).next_token == ""


def test_a_page_that_goes_on_nowhere_is_refused():
    with pytest.raises(BadReply, match="without saying where"):
        parse_listing(page(entry("a"), "<IsTruncated>true</IsTruncated>"))


def test_an_etag_that_is_not_told_is_empty():
    assert parse_listing(page(entry("a", more=""))).objects == [Listed("a", 1, "")]


@pytest.mark.parametrize("size", ["", "-1", "1e3", "0x1", "9" * 19, "\u0661"])
def test_an_object_without_a_size_is_refused(size: str):
    with pytest.raises(BadReply, match="without key or size"):
        parse_listing(page(entry("a", size)))


def test_a_quoted_key_that_is_not_utf8_is_refused():
    with pytest.raises(BadReply, match="not UTF-8"):
        parse_listing(page(entry("a%ff"), "<EncodingType>url</EncodingType>"))


def test_members_of_other_elements_are_not_an_objects():
    owner = "<Owner><Key>x</Key><Size>9</Size></Owner><ETag>t</ETag>"
    assert parse_listing(page(entry("a", more=owner))).objects == [Listed("a", 1, "t")]


def test_something_else_than_a_listing_is_named():
    with pytest.raises(BadReply, match="<html> instead of a listing"):
        parse_listing(b"<html/>")


@pytest.mark.parametrize(
    "body",
    [
        b'<!DOCTYPE a [<!ENTITY b "c">]><ListBucketResult>&b;</ListBucketResult>',
        b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><ListBucketResult/>',
        b"<ListBucketResult>" * 17,
        b"<ListBucketResult>&undefined;</ListBucketResult>",
    ],
    ids=["entity", "external", "deep", "undefined"],
)
def test_xml_that_could_expand_or_reach_out_is_refused(body: bytes):
    with pytest.raises(BadReply):
        parse_listing(body)


def test_a_listing_of_far_too_many_objects_is_refused_for_good():
    body = b"<ListBucketResult>" + b"<Contents/>" * 250_001 + b"</ListBucketResult>"
    with pytest.raises(ObjectRefused, match="more than 250000 elements; name the prefix of one"):
        parse_listing(body)


def test_an_error_tells_code_message_and_members():
    body = (
        b"<Error><Code>PermanentRedirect</Code><Message>a&amp;b</Message><Region>r</Region></Error>"
    )
    fault = parse_fault(body)
    assert (fault.code, fault.message, fault.members["Region"]) == ("PermanentRedirect", "a&b", "r")


@pytest.mark.parametrize("body", [b"", b"<html><Code>x</Code></html>", b"Service Unavailable"])
def test_another_body_tells_nothing(body: bytes):
    assert parse_fault(body) == Fault("", "", {})
