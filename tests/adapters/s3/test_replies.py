"""What a reply's head says of an object is taken as it stands, or not at all."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from cached.adapters.s3.replies import (
    check_object,
    check_part,
    check_plain,
    composite_of,
    facts_of,
    has_composite,
    length_of,
    pinning,
)
from cached.core.errors import BadReply, ObjectChanged, ObjectRefused
from cached.core.objects import FileRef, ObjectFacts, Part, StoredObject, VersionRef

URL = "s3://models/llm/a"
STORED = StoredObject("llm/a", "a", 100, '"e"')
PART = Part(1, FileRef(VersionRef("llm", "v"), 0), "s3://models/llm/", STORED, 10, 20)
SUM = "x-amz-checksum-"
SSE = "x-amz-server-side-encryption"


class Head(NamedTuple):
    headers: dict[str, str]
    status: int = 200


def ranged(told: str = "bytes 10-19/100", *, status: int = 206, etag: str = '"e"') -> Head:
    return Head({"etag": etag, "content-range": told}, status)


def test_the_range_that_was_asked_for_is_taken():
    check_part(URL, PART, 10, ranged())
    check_part(URL, PART, 12, ranged("bytes 12-19/100"))
    check_part(URL, PART._replace(start=0, stop=100), 0, Head({"etag": '"e"'}))


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (ranged("bytes 11-19/100"), BadReply),
        (ranged("bytes 10-18/100"), BadReply),
        (ranged("bytes 10-19/101"), BadReply),
        (ranged("bytes 10-19/*"), BadReply),
        (ranged(status=200), BadReply),
        (ranged(status=204), BadReply),
        (ranged(etag='"f"'), ObjectChanged),
        (ranged(etag='W/"e"'), ObjectRefused),
        (ranged(etag=""), ObjectRefused),
        (Head({"etag": '"e"', "x-amz-meta-x-amz-key-v2": "k"}, 206), ObjectRefused),
    ],
)
def test_any_other_reply_is_refused(head: Head, kind: type[Exception]):
    with pytest.raises(kind):
        check_part(URL, PART, 10, head)


def test_a_whole_object_is_checked_for_its_version_and_encryption():
    check_object(URL, STORED, Head({"etag": '"e"'}))
    with pytest.raises(ObjectChanged, match='has the ETag "f" now, had "e"'):
        check_object(URL, STORED, Head({"etag": '"f"'}))
    with pytest.raises(ObjectRefused, match="encrypted by its client"):
        check_plain(URL, Head({"x-amz-meta-x-amz-c": "k"}))


def test_an_etag_pins_or_is_refused():
    assert pinning('"e"', URL) == '"e"'
    for etag, kind in (("", ObjectRefused), ('W/"e"', ObjectRefused), ('"\n"', BadReply)):
        with pytest.raises(kind):
            pinning(etag, URL)


def test_a_length_is_digits():
    assert length_of(URL, Head({"content-length": "007"})) == 7
    for text in ("", "-1", "1e3", "9" * 19):
        with pytest.raises(BadReply):
            length_of(URL, Head({"content-length": text}))


@pytest.mark.parametrize(
    ("headers", "facts"),
    [
        ({}, ObjectFacts()),
        ({"x-amz-version-id": "v/1"}, ObjectFacts(version_id="v/1")),
        ({"x-amz-version-id": "null"}, ObjectFacts()),
        ({SSE: "AES256"}, ObjectFacts(encryption="AES256")),
        (
            {SSE: "aws:kms", f"{SSE}-aws-kms-key-id": "arn", f"{SSE}-bucket-key-enabled": "true"},
            ObjectFacts(encryption="aws:kms", kms_key="arn", has_bucket_key=True),
        ),
        (
            {SSE: "aws:kms:dsse", f"{SSE}-bucket-key-enabled": "false"},
            ObjectFacts(encryption="aws:kms:dsse"),
        ),
        ({f"{SSE}-customer-algorithm": "AES256"}, ObjectFacts(encryption="SSE-C")),
        ({f"{SUM}sha1": "AAA=", f"{SUM}crc32": "BBB="}, ObjectFacts(checksum="crc32:BBB=")),
        ({f"{SUM}crc32": "AAA=", f"{SUM}crc32c": "BB=="}, ObjectFacts(checksum="crc32c:BB==")),
        ({f"{SUM}crc32c": "A=", f"{SUM}crc64nvme": "BB="}, ObjectFacts(checksum="crc64nvme:BB=")),
        ({f"{SUM}sha1": "A+/=", f"{SUM}sha256": "BB="}, ObjectFacts(checksum="sha256:BB=")),
        ({f"{SUM}sha1": "AAA=", f"{SUM}crc32": "BBB=-2"}, ObjectFacts(checksum="sha1:AAA=")),
        ({f"{SUM}crc32": "BBB=", f"{SUM}type": "FULL_OBJECT"}, ObjectFacts(checksum="crc32:BBB=")),
        ({f"{SUM}crc32": "BBB=", f"{SUM}type": "COMPOSITE"}, ObjectFacts()),
        ({f"{SUM}crc32": "not base64"}, ObjectFacts()),
        ({f"{SUM}md5": "AAAA"}, ObjectFacts()),
    ],
)
def test_a_head_tells_facts(headers: dict[str, str], facts: ObjectFacts):
    assert facts_of(Head(headers)) == facts


@pytest.mark.parametrize(
    ("headers", "part_bytes", "size_bytes", "text"),
    [
        ({f"{SUM}sha256": "AAA=-3"}, 8, 20, "sha256:AAA=-3@8"),
        ({f"{SUM}sha256": "AAA=-3"}, 8, 24, "sha256:AAA=-3@8"),
        ({f"{SUM}sha256": "AAA=-1"}, 8, 8, "sha256:AAA=-1@8"),
        ({f"{SUM}sha256": "AAA=-3"}, 8, 25, None),  # its parts are not all as long
        ({f"{SUM}sha256": "AAA=-3"}, 20, 20, None),  # the store knows no partNumber
        ({f"{SUM}sha256": "AAA=-3"}, 0, 20, None),
        ({f"{SUM}crc32": "AAA=", f"{SUM}type": "COMPOSITE"}, 8, 20, "crc32:AAA=-3@8"),
        ({f"{SUM}sha1": "AAA=-3", f"{SUM}crc32c": "BBB=-3"}, 8, 20, "crc32c:BBB=-3@8"),
    ],
)
def test_a_checksum_of_checksums_says_of_which_parts(
    headers: dict[str, str], part_bytes: int, size_bytes: int, text: str | None
):
    assert has_composite(Head(headers))
    assert composite_of(Head(headers), part_bytes, size_bytes) == text


def test_a_checksum_of_the_whole_is_no_composite():
    assert not has_composite(Head({f"{SUM}crc32": "AAA="}))
    assert composite_of(Head({f"{SUM}crc32": "AAA="}), 8, 20) is None
