"""What is written as a list of digests is read; all else is refused with the typed error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.core.digests import (
    BLOCK_BYTES,
    MAX_BYTES,
    MIN_BLOCK_BYTES,
    Digests,
    FileDigests,
    parse,
    write,
)
from cached.core.errors import DigestsError

HEX = "ab" * 32
K = MIN_BLOCK_BYTES


def document(**more: object) -> bytes:
    file = {"size": K + 2, "sha256": HEX, "blocks": [HEX, HEX]}
    return json.dumps(
        {"cached_manifest": 1, "block_bytes": K, "files": {"a/b": file}} | more
    ).encode()


def of_file(**more: object) -> bytes:
    file = {"size": K + 2, "sha256": HEX, "blocks": [HEX, HEX]} | more
    return document(files={"a/b": file})


@st.composite
def lists(draw: st.DrawFn) -> Digests:
    block_bytes = draw(st.integers(K, 100 * K))
    digest = st.binary(min_size=32, max_size=32)
    files = {}
    for path in draw(st.sets(st.sampled_from(["a", "b.safetensors", "c/d", "é"]))):
        size = draw(st.integers(0, 300 * K))
        count = -(-size // block_bytes)
        blocks = draw(st.lists(digest, min_size=count, max_size=count))
        files[path] = FileDigests(size, draw(digest), tuple(blocks))
    return Digests(block_bytes, files)


@given(lists())
def test_what_is_written_is_read(digests):
    assert parse(write(digests)) == digests


def test_a_list_is_read():
    found = parse(document())

    assert found == Digests(K, {"a/b": FileDigests(K + 2, b"\xab" * 32, (b"\xab" * 32,) * 2)})


def test_a_file_may_be_as_long_as_a_file_can_be():
    longest = (1 << 63) - 1
    files = {"a": FileDigests(longest, bytes(32), (bytes(32),))}

    assert parse(write(Digests(longest, files))).files == files


def test_a_block_is_as_long_as_the_longest_part():
    assert BLOCK_BYTES == 8 << 20


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "must be 1"),
        (document(cached_manifest=2), "must be 1, was 2"),
        (document(block_bytes=K - 1), "at least 65536, was 65535"),
        (document(block_bytes=True), "block_bytes"),
        (document(files=[]), "files"),
        (of_file(size=-1), "size of 'a/b'"),
        (of_file(size=1.0), "size of 'a/b'"),
        (of_file(size=1 << 63), "size of 'a/b'"),
        (of_file(size=2 * K + 1), "must have 3 blocks of 65536 bytes"),
        (of_file(blocks="ab"), "must have 2 blocks"),
        (of_file(blocks=[HEX, HEX.upper()]), "64 hex digits"),
        (of_file(sha256=HEX[:-1]), "64 hex digits"),
        (of_file(sha256=None), "64 hex digits"),
        (document(files={"../a": {}}), "'..' is a segment"),
        (document(files={"a": 5}), "size of 'a'"),
        (b'{"cached_manifest": 1, "cached_manifest": 1}', "twice"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_its_name(wrong, words):
    with pytest.raises(DigestsError, match=words) as caught:
        parse(wrong)

    assert "cached digest" in caught.value.hint


def test_a_longer_file_is_refused_unread():
    padded = document() + b" " * (MAX_BYTES - len(document()))

    assert MAX_BYTES == 16 << 20
    assert parse(padded) == parse(document())
    with pytest.raises(DigestsError, match="16777217 bytes, the limit is 16777216"):
        parse(padded + b" ")


def test_a_model_of_a_tebibyte_has_a_list_that_fits():
    count = (1 << 40) // BLOCK_BYTES // 100
    files = {
        f"model-{at:05}-of-00100.safetensors": FileDigests(
            count * BLOCK_BYTES, bytes(32), (bytes(32),) * count
        )
        for at in range(100)
    }

    assert len(write(Digests(BLOCK_BYTES, files))) < 0.6 * MAX_BYTES


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10,
).map(lambda value: document(files=value)))  # fmt: skip
def test_any_bytes_are_a_list_or_refused(data):
    try:
        found = parse(data)
    except DigestsError:
        return
    assert parse(write(found)) == found
