"""What is remembered of models and loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cached.core.errors import TensorUnknown
from cached.core.header import Header, Tensor
from cached.core.objects import Range, StoredObject
from tests.fakes.world import BLOCK, header_of, load_of, manifest, stored

if TYPE_CHECKING:
    from cached.core.loads import Load

LISTING = manifest(stored("a.safetensors", 4), stored("b.txt", 1))


def test_memory_is_counted_in_whole_pages():
    listing = manifest(
        StoredObject("k", "k", 1, '"1"'),
        StoredObject("l", "l", 4096, '"1"'),
        StoredObject("m", "m", 0, '"1"'),
    )

    assert load_of(listing).own_bytes() == 8192


def test_a_load_has_headers_when_it_is_mappable_and_each_safetensors_file_has_one():
    load = load_of(LISTING)
    load.headers[0] = header_of(LISTING.objects[0])
    assert not load.has_headers

    load.is_mappable = True

    assert load.has_headers


def test_a_load_covers_what_is_there_and_all_once_it_is_complete():
    load = load_of(LISTING)
    load.planner.done(0, 0, BLOCK)

    assert load.covers([(0, Range(0, BLOCK))])
    assert not load.covers([(0, Range(0, BLOCK + 1))])
    load.path = "/models/m"
    assert load.covers([(0, Range(0, BLOCK + 1))])


def with_tensors(**tables: list[str]) -> Load:
    """A load of files with these tensors."""
    listing = manifest(*(stored(f"{stem}.safetensors", 4) for stem in tables))
    load = load_of(listing)
    for index, names in enumerate(tables.values()):
        tensors = {
            name: Tensor(name, "U8", (1,), 100 + at, 101 + at) for at, name in enumerate(names)
        }
        load.headers[index] = Header(header_bytes=100, tensors=tensors, metadata={})
    return load


def test_tensors_are_found_by_name_and_by_file_and_name():
    load = with_tensors(a=["x", "both"], b=["y", "both", "a.safetensors::odd"])

    ranges = load.tensor_ranges(
        ["y", "b.safetensors::both", "a.safetensors::odd", "a.safetensors::x"]
    )

    assert ranges == [
        (1, Range(100, 101)),
        (1, Range(101, 102)),
        (1, Range(102, 103)),
        (0, Range(100, 101)),
    ]


def test_a_name_that_several_files_have_is_refused_with_those_to_use():
    load = with_tensors(a=["x", "both"], b=["both"])

    with pytest.raises(TensorUnknown, match="m has 2 tensors named 'both'") as caught:
        load.tensor_ranges(["x", "both"])

    assert "a.safetensors::both, b.safetensors::both" in caught.value.hint


@pytest.mark.parametrize("name", ["z", "a.safetensors::z", "b.safetensors::x", "c::x", "", "::x"])
def test_a_name_that_no_file_has_is_refused(name):
    load = with_tensors(a=["x"], b=["y"])

    with pytest.raises(TensorUnknown, match="m has no tensor named") as caught:
        load.tensor_ranges([name])

    assert caught.value.hint.endswith("such as x")


def test_a_name_is_refused_by_a_model_without_tensors():
    with pytest.raises(TensorUnknown) as caught:
        with_tensors(a=[]).tensor_ranges(["x"])

    assert "it has no tensors" in caught.value.hint
