"""What the next daemon is told comes back as it was, and nothing else is believed."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.adapters.segments.description import (
    MARK_BYTES,
    Description,
    Marks,
    boot_id,
    encode,
    marks_of,
    parse,
    ranges,
)
from cached.core.objects import Manifest, Range, StoredObject, VersionRef

OF = VersionRef("llm", "0123")
OBJECTS = (
    StoredObject("m/a.bin", "a.bin", 5, '"e"', "v1", "crc32:AAAA"),
    StoredObject("m/é/b", "é/b", 0, ""),
)
MANIFEST = Manifest("s3://b/m/", OF.version, OBJECTS)
TOLD = json.loads(encode(OF, MANIFEST, "boot"))

texts = st.text(st.characters(codec="utf-8"), max_size=20)
names = st.from_regex(r"[a-zA-Z0-9_é-]{1,20}", fullmatch=True)
stored = st.builds(
    StoredObject,
    key=texts,
    path=st.lists(names, min_size=1, max_size=3).map("/".join),
    size_bytes=st.integers(0, 1 << 62),
    etag=texts,
    version_id=st.none() | texts,
    checksum=st.none() | texts,
)
manifests = st.builds(
    Manifest,
    uri=texts,
    version=names.filter(lambda name: name != "current"),
    objects=st.lists(stored, min_size=1, max_size=5, unique_by=lambda one: one.path).map(tuple),
)
json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(manifests, names, texts)
def test_a_description_comes_back_as_it_was(manifest, name, boot):
    of = VersionRef(name, manifest.version)
    assert parse(encode(of, manifest, boot)) == Description(of, manifest, boot)


@given(
    st.binary(max_size=200)
    | st.builds(lambda at: encode(OF, MANIFEST, "b")[:at], st.integers(0, 400))
)
def test_of_any_bytes_comes_a_value_or_an_error_of_one_type(data):
    with contextlib.suppress(ValueError):
        parse(data)


@given(st.sampled_from(sorted(TOLD)), json_values)
def test_any_field_may_hold_anything(field, value):
    with contextlib.suppress(ValueError):
        parse(json.dumps({**TOLD, field: value}).encode())


@given(st.sampled_from(sorted(TOLD["objects"][0])), json_values)
def test_any_field_of_an_object_may_hold_anything(field, value):
    changed = {**TOLD, "objects": [{**TOLD["objects"][0], field: value}]}
    try:
        found = parse(json.dumps(changed).encode())
    except ValueError:
        return
    (one,) = found.manifest.objects
    assert type(one.size_bytes) is int
    assert one.size_bytes >= 0
    assert ".." not in one.path.split("/")


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": 2},
        {"layout": None},
        {"name": "../x"},
        {"name": "a/b"},
        {"name": ""},
        {"version": "current"},
        {"version": ".."},
        {"uri": 1},
        {"uri": "\ud800"},
        {"boot_id": None},
        {"objects": []},
        {"objects": {}},
        {"objects": [1]},
        {"objects": [{**TOLD["objects"][0], "path": "../x"}]},
        {"objects": [{**TOLD["objects"][0], "path": "/etc/passwd"}]},
        {"objects": [{**TOLD["objects"][0], "size_bytes": True}]},
        {"objects": [{**TOLD["objects"][0], "size_bytes": -1}]},
        {"objects": [{**TOLD["objects"][0], "size_bytes": 1.0}]},
        {"objects": [{**TOLD["objects"][0], "size_bytes": 1 << 63}]},
        {"objects": [{**TOLD["objects"][0], "etag": "\udfff"}]},
        {"objects": [{**TOLD["objects"][0], "checksum": 7}]},
        {"objects": [TOLD["objects"][0]] * 2},
    ],
)
def test_what_cannot_be_is_not_believed(changes):
    with pytest.raises(ValueError):
        parse(json.dumps({**TOLD, **changes}).encode())


def test_what_is_nested_too_deep_is_not_believed():
    with pytest.raises(ValueError, match="too deep"):
        parse(b"[" * 100_000)


def test_a_start_of_the_machine_has_a_name_that_stays():
    assert boot_id() == boot_id()
    assert len(boot_id()) == 36


MIB = MARK_BYTES
SIZES = [5 * MIB // 2, 0, MIB, 10]
TABLE = Manifest("", "1", tuple(StoredObject(str(i), str(i), n, "") for i, n in enumerate(SIZES)))


def test_a_file_has_a_mark_for_every_megabyte_that_it_begins():
    assert [marks_of(size) for size in (0, 1, MIB, MIB + 1)] == [0, 1, 1, 2]


def test_a_map_says_which_bytes_are_there():
    assert ranges(b"\1\0\1" + b"\1" + b"\0", TABLE) == [
        [Range(0, MIB), Range(2 * MIB, 5 * MIB // 2)],
        [],
        [Range(0, MIB)],
        [],
    ]
    assert ranges(b"\1\1\1" + b"\2" + b"\1", TABLE) == [[(0, SIZES[0])], [], [], [(0, 10)]]


@pytest.mark.parametrize("size", [0, 4, 6])
def test_a_map_of_another_length_is_not_believed(size):
    with pytest.raises(ValueError, match=f"has {size} bytes, must have 5"):
        ranges(bytes(size), TABLE)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 2, 3]),
            st.integers(0, SIZES[0]),
            st.integers(0, SIZES[0]),
            st.booleans(),
        )
    )
)
def test_only_what_is_there_is_ever_marked(spans):
    fd = os.memfd_create("map")
    os.ftruncate(fd, 5)
    marks = Marks(os.dup(fd), SIZES)
    there: list[set[int]] = [set() for _ in SIZES]
    for index, start, stop, is_fetched_anew in spans:
        span = Range(min(start, SIZES[index]), min(stop, SIZES[index]))
        if is_fetched_anew:
            if span.start < span.stop:
                marks.unmark(index, *span)
                there[index] -= {*range(span.start // MIB, (span.stop - 1) // MIB + 1)}
            continue
        marks.mark(index, span)
        there[index] |= {
            number
            for number in range(marks_of(SIZES[index]))
            if span.start <= number * MIB and min((number + 1) * MIB, SIZES[index]) <= span.stop
        }
    found = ranges(os.pread(fd, 9, 0), TABLE)
    for index, numbers in enumerate(there):
        marked = {
            number
            for span in found[index]
            for number in range(span.start // MIB, marks_of(span.stop))
        }
        assert marked == numbers
    marks.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("start", "stop", "left"),
    [(1, 2, b"\0\1\1\1\1"), (MIB - 1, MIB + 1, b"\0\0\1\1\1"), (MIB, MIB, b"\1" * 5)],
)
def test_with_any_byte_that_may_change_goes_the_mark(start, stop, left):
    fd = os.memfd_create("map")
    os.pwrite(fd, b"\1" * 5, 0)
    marks = Marks(os.dup(fd), SIZES)
    marks.unmark(0, start, stop)
    assert os.pread(fd, 9, 0) == left
    marks.close()
    os.close(fd)


def test_a_mark_that_cannot_be_taken_out_is_an_error():
    fd = os.memfd_create("map")
    os.ftruncate(fd, 5)
    os.pwrite(fd, b"\1", 1)
    marks = Marks(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), SIZES)
    marks.unmark(2, 0, MIB)  # nothing is to be written
    with pytest.raises(OSError, match="Bad file descriptor"):
        marks.unmark(0, 0, 2 * MIB)
    marks.close()
    os.close(fd)


def test_a_map_that_is_closed_takes_nothing_and_none_that_cannot_be_written_is_an_error():
    fd = os.memfd_create("map")
    os.ftruncate(fd, 5)
    marks = Marks(os.dup(fd), SIZES)
    marks.close()
    marks.mark(0, Range(0, MIB))
    assert os.pread(fd, 9, 0) == bytes(5)
    os.pwrite(fd, b"\1" * 5, 0)
    marks.unmark(0, 0, MIB)
    assert os.pread(fd, 9, 0) == b"\1" * 5
    os.close(fd)
    full = Marks(os.open("/dev/full", os.O_WRONLY), SIZES)
    full.mark(0, Range(0, MIB))
    full.close()
    full.close()
