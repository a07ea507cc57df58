"""A header is accepted only if the safetensors library accepts it too, and then read alike."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st

from cached.core import header
from cached.core.errors import FormatError, HeaderError
from cached.core.header import DTYPE_BITS, LENGTH_BYTES, MAX_HEADER_BYTES, Header, Tensor

library: Any = safetensors  # its stubs leave `deserialize` untyped
# What UTF-8 can spell: no half surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = texts.filter(lambda name: name != "__metadata__")


def fills_bytes(tensor: tuple[str, str, list[int]]) -> bool:
    _, dtype, shape = tensor
    return DTYPE_BITS[dtype] * math.prod(shape) % 8 == 0


tensors = st.tuples(
    names, st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 4), max_size=3)
).filter(fills_bytes)
tables = st.lists(tensors, max_size=6, unique_by=lambda tensor: tensor[0])
metadatas = st.none() | st.dictionaries(texts, texts, max_size=3)


def framed(table: object, data: bytes = b"") -> bytes:
    """Return a file with this JSON as its header, valid or not."""
    body = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(body).to_bytes(LENGTH_BYTES, "little") + body + data


def parse(file: bytes) -> Header:
    return header.parse(file, len(file))


def one(**members: Any) -> bytes:
    """Return a file with one tensor of 4 bytes, some members replaced."""
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | members
    return framed({"w": entry}, b"abcd")


def file_of(table: list[tuple[str, str, list[int]]], metadata: dict[str, str] | None) -> bytes:
    size = sum(DTYPE_BITS[dtype] * math.prod(shape) // 8 for _, dtype, shape in table)
    return header.write(table, metadata) + (bytes(range(256)) * (size // 256 + 1))[:size]


def library_accepts(file: bytes) -> bool:
    try:
        library.deserialize(file)
    except safetensors.SafetensorError:
        return False
    return True


def assert_never_laxer(file: bytes) -> None:
    """Check that what we accept, the library accepts and reads alike."""
    try:
        ours = parse(file)
    except FormatError:
        return
    theirs = dict(library.deserialize(file))
    assert theirs == {
        name: {"dtype": dtype, "shape": list(shape), "data": bytearray(file[start:stop])}
        for name, dtype, shape, start, stop in ours.tensors.values()
    }
    assert header.read(file, len(file)) == ours


@given(tables, metadatas)
@example([("", "F4", [2]), ("é\0/../x", "F6_E2M3", [4]), ("s", "F64", [])], {"": "\u2028"})
def test_what_is_written_is_read(table: list[Any], metadata: dict[str, str] | None):
    file = file_of(table, metadata)
    found = parse(file)
    assert [(t.name, t.dtype, list(t.shape)) for t in found.tensors.values()] == table
    assert found.metadata == (metadata or {})
    at = found.header_bytes
    for tensor in found.tensors.values():
        assert (tensor.start, tensor.stop) == (at, at + tensor.stop - tensor.start)
        at = tensor.stop
    assert at == len(file)


@given(tables, metadatas)
def test_the_library_reads_what_is_written(table: list[Any], metadata: dict[str, str] | None):
    file = file_of(table, metadata)
    assert library_accepts(file)
    assert_never_laxer(file)


def test_what_the_library_writes_is_read():
    arrays: dict[str, Any] = {"w": np.zeros((2, 1), np.float16), "ä": np.zeros((0,), np.uint8)}
    file = safetensors.numpy.save(arrays, {"format": "pt"})
    found = parse(file)
    stop = len(file) - 4
    assert found.header_bytes == stop
    assert found.tensors["w"] == Tensor("w", "F16", (2, 1), stop, stop + 4)
    assert found.tensors["ä"][:3] == ("ä", "U8", (0,))
    assert found.metadata == {"format": "pt"}


@given(st.binary(max_size=64) | st.binary(max_size=64).map(framed))
def test_any_bytes_are_a_header_or_a_format_error(file: bytes):
    assert_never_laxer(file)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 5)
    | st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64, -1, 0.0, 1.0, 1e300, "U8", "F4"])
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
members = st.sampled_from(["dtype", "shape", "data_offsets", "extra"])


@given(tables.filter(bool), metadatas, st.data())
def test_a_header_with_strange_members_is_never_taken_where_the_library_refuses(
    table: list[Any], metadata: dict[str, str] | None, data: st.DataObject
):
    file = file_of(table, metadata)
    stop = parse(file).header_bytes
    found = json.loads(file[LENGTH_BYTES:stop])
    name = data.draw(st.sampled_from(sorted(found)))
    if data.draw(st.booleans()):
        found[name] = data.draw(json_values)
    else:
        found[name][data.draw(members)] = data.draw(json_values)
    assert_never_laxer(framed(found, file[stop:]))


@given(tables, metadatas, st.data())
def test_a_damaged_header_is_never_taken_where_the_library_refuses(
    table: list[Any], metadata: dict[str, str] | None, data: st.DataObject
):
    file = file_of(table, metadata)
    stop = parse(file).header_bytes
    body = bytearray(file[LENGTH_BYTES:stop])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body)))
        cut = data.draw(st.integers(0, 3))
        pieces = st.sampled_from(
            [b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"0", b"-0", b".5"]
        )
        more = st.sampled_from(
            [b"e1", b"NaN", b"null", b"true", b"\\ud800", b"\\u0041", b"\n", b" "]
        )
        body[at : at + cut] = data.draw(pieces | more | st.binary(max_size=2))
    assert_never_laxer(framed(bytes(body), file[stop:]))


@given(tables, metadatas, st.data())
def test_only_the_first_header_bytes_matter(
    table: list[Any], metadata: dict[str, str] | None, data: st.DataObject
):
    file = file_of(table, metadata)
    whole = parse(file)
    raw = memoryview(file)[: whole.header_bytes]
    assert header.header_bytes(raw[:LENGTH_BYTES], len(file)) == whole.header_bytes
    assert header.parse(raw, len(file)) == header.read(raw, len(file)) == whole
    with pytest.raises(HeaderError):
        header.parse(raw[: data.draw(st.integers(0, len(raw) - 1))], len(file))


def test_tensors_come_in_the_order_of_the_file_however_the_table_is_sorted():
    table = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
        "nothing": {"dtype": "U8", "shape": [0], "data_offsets": [2, 2]},
        "early": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
    }
    file = framed(table, b"abcd")
    assert list(parse(file).tensors) == ["early", "nothing", "late"]
    assert list(header.read(file, len(file)).tensors) == ["early", "nothing", "late"]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "takes at least 8 bytes, the file has 0"),
        (b"\2\0\0\0\0\0\0", "takes at least 8 bytes, the file has 7"),
        (b"\2" + bytes(7), "says it ends at byte 10 of 8"),
        (b"\1" + bytes(9), "must be at least 2 bytes, says 1"),
        (b"\xff" * 16, f"must be at most {MAX_HEADER_BYTES} bytes, says {2**64 - 1}"),
        (framed(b'{"a"\xff}'), "is not UTF-8"),
        (framed(b" {}"), "must start with '{', was ' '"),
        (framed(b"[]"), "must start with '{', was '['"),
        (framed(b"{]"), "is not JSON"),
        (framed(b'{"w":' + b"[" * 100_000), "is not JSON"),
        (framed(b'{"w":' + b"1" * 5_000), "is not JSON"),
        (framed(b'{"w":{},"w":{}}'), "header has 'w' twice"),
        (framed(b'{"w":{"dtype":"U8","dtype":"U8"}}'), "header has 'dtype' twice"),
        (framed(b'{"__metadata__":{"a":"","a":""}}'), "header has 'a' twice"),
        (framed(b'{"\\udc00":{}}'), "'\\udc00' is not unicode text"),
        (framed(b'{"__metadata__":{"\\udc00":"b"}}'), "'\\udc00' is not unicode text"),
        (framed(b'{"__metadata__":{"a":"\\ud800"}}'), "'\\ud800' is not unicode text"),
        (framed({"__metadata__": None}), "__metadata__ must be an object, was None"),
        (framed({"__metadata__": {"a": 1}}), "must map text to text, 'a' was 1"),
        (framed({"w": [1, 2]}), "'w' must have dtype, shape and data_offsets"),
        (one(more=1), "'w' must have dtype, shape and data_offsets"),
        (one(dtype="U9"), "'w' has the unknown dtype 'U9'"),
        (one(dtype=8), "'w' has the unknown dtype 8"),
        (one(shape=4), "'w': shape must be whole numbers, was 4"),
        (one(shape=[4.0]), "'w': shape must be whole numbers, was [4.0]"),
        (one(shape=[True, 4]), "'w': shape must be whole numbers, was [True, 4]"),
        (one(shape=[-4]), "'w': shape must not be negative, was [-4]"),
        (framed(b'{"w":{"shape":[-0]}}'), "must have no sign, was -0"),
        (one(shape=[3]), "'w' takes 3 bytes (U8 [3]), its data_offsets span 4"),
        (one(dtype="F64", shape=[2**57]), "'w' must take less than 2^63 bits: F64"),
        (one(shape=[0, 2**60], data_offsets=[0, 0]), "'w' must take less than 2^63 bits"),
        (one(dtype="F6_E3M2", shape=[5]), "'w' must fill whole bytes, has 30 bits"),
        (one(data_offsets=[0, 4, 4]), "'w' must have two data_offsets, was (0, 4, 4)"),
        (one(data_offsets=[4, 0]), "its data_offsets span -4"),
        (one(data_offsets=[1, 5]), "'w' leaves a hole before it: starts at"),
        (one() + b"e", "the tensors end at byte"),
        (one()[:-1], "the tensors end at byte"),
        (framed({}, b"a"), "the tensors end at byte 10, the file at 11"),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_to_do(file: bytes, reason: str):
    with pytest.raises(HeaderError) as caught:
        parse(file)
    assert reason in caught.value.message
    assert caught.value.hint
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("mark", [b"[],", b"{},", b"0,"], ids=["lists", "objects", "numbers"])
def test_a_header_that_would_become_far_more_objects_than_tensors_is_refused_unread(
    mark: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cached.core.header.json.loads", None)
    with pytest.raises(HeaderError, match="must have at most 2000000 of"):
        parse(framed(b'{"a":[' + mark * 2_000_000 + b"0]}"))


def test_a_header_of_200_000_tensors_is_within_the_bounds():
    raw = header.write(("w", "BF16", (1, 2, 3)) for _ in range(100))
    marks = sum(map(raw.count, (b"{", b"[", b",")))
    assert marks * 2_000 <= header.MAX_MARKS


def test_tensors_must_not_overlap():
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    with pytest.raises(HeaderError, match="'b' overlaps the one before it"):
        parse(framed({"a": entry, "b": entry}, b"abcd"))


def test_a_header_that_was_never_checked_is_still_a_typed_error():
    with pytest.raises(HeaderError, match="is not JSON"):
        header.read(framed(b"{]"), 10)
