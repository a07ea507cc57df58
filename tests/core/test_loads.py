"""What is remembered of models and loads; back-off."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.core.effects import Free
from cached.core.errors import TensorUnknown
from cached.core.header import Header, Tensor
from cached.core.ledger import Ledger
from cached.core.loads import Load, Shelf, delay_s, footprint_bytes
from cached.core.objects import FileRef, ModelRef, Part, PeerId, Range, StoredObject, VersionRef
from cached.core.parts import Planner
from tests.fakes.world import BLOCK, header_of, manifest, stored

LISTING = manifest(stored("a.safetensors", 4), stored("b.txt", 1))


@given(st.integers(1, 50), st.floats(0, 1, exclude_max=True), st.floats(0, 1000) | st.none())
def test_a_delay_grows_to_its_cap_and_is_never_below_what_the_store_asked(failures, jitter, asked):
    wait_s = delay_s(failures, jitter, asked)

    assert 0.05 <= wait_s <= max(20.0, asked or 0.0)
    assert wait_s >= (asked or 0.0)
    assert delay_s(failures + 1, jitter, asked) >= wait_s


def test_memory_is_counted_in_whole_pages():
    listing = manifest(
        StoredObject("k", "k", 1, '"1"'),
        StoredObject("l", "l", 4096, '"1"'),
        StoredObject("m", "m", 0, '"1"'),
    )

    assert footprint_bytes(listing) == 8192


def test_a_load_has_headers_when_it_is_mappable_and_each_safetensors_file_has_one():
    load = Load(VersionRef("m", "1"), LISTING, Planner(LISTING), 0.0)
    load.headers[0] = header_of(LISTING.objects[0])
    assert not load.has_headers

    load.is_mappable = True

    assert load.has_headers


def test_a_load_covers_what_is_there_and_all_once_it_is_complete():
    load = Load(VersionRef("m", "1"), LISTING, Planner(LISTING), 0.0)
    load.planner.done(0, 0, BLOCK)

    assert load.covers([(0, Range(0, BLOCK))])
    assert not load.covers([(0, Range(0, BLOCK + 1))])
    load.path = "/models/m"
    assert load.covers([(0, Range(0, BLOCK + 1))])


def load_of(**tables: list[str]) -> Load:
    """A load of files with these tensors."""
    listing = manifest(*(stored(f"{stem}.safetensors", 4) for stem in tables))
    load = Load(VersionRef("m", "1"), listing, Planner(listing), 0.0)
    for index, names in enumerate(tables.values()):
        tensors = {
            name: Tensor(name, "U8", (1,), 100 + at, 101 + at) for at, name in enumerate(names)
        }
        load.headers[index] = Header(header_bytes=100, tensors=tensors, metadata={})
    return load


def test_tensors_are_found_by_name_and_by_file_and_name():
    load = load_of(a=["x", "both"], b=["y", "both", "a.safetensors::odd"])

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
    load = load_of(a=["x", "both"], b=["both"])

    with pytest.raises(TensorUnknown, match="m has 2 tensors named 'both'") as caught:
        load.tensor_ranges(["x", "both"])

    assert "a.safetensors::both, b.safetensors::both" in caught.value.hint


@pytest.mark.parametrize("name", ["z", "a.safetensors::z", "b.safetensors::x", "c::x", "", "::x"])
def test_a_name_that_no_file_has_is_refused(name):
    load = load_of(a=["x"], b=["y"])

    with pytest.raises(TensorUnknown, match="m has no tensor named") as caught:
        load.tensor_ranges([name])

    assert caught.value.hint.endswith("such as x")


def test_a_name_is_refused_by_a_model_without_tensors():
    with pytest.raises(TensorUnknown) as caught:
        load_of(a=[]).tensor_ranges(["x"])

    assert "it has no tensors" in caught.value.hint


def test_what_somebody_holds_is_leased_current_or_retired():
    shelf = Shelf((ModelRef("m", "s3://b/m/"),), Ledger(100))
    current = Load(VersionRef("m", "2"), LISTING, Planner(LISTING), 0.0)
    retired = Load(VersionRef("m", "1"), LISTING, Planner(LISTING), 0.0)
    shelf.models["m"].load = current
    shelf.retired[retired.of] = retired
    shelf.ledger.reserve(current.of, 10)
    shelf.ledger.reserve(retired.of, 3)
    assert shelf.leased_bytes == 0

    current.holders.update({PeerId(1), PeerId(2)})
    assert shelf.leased_bytes == 10
    retired.holders.add(PeerId(3))
    assert shelf.leased_bytes == 13


def test_a_retired_load_is_leaving_while_its_gets_end_and_while_it_is_freed():
    shelf = Shelf((ModelRef("m", "s3://b/m/"),), Ledger(100))
    load = Load(VersionRef("m", "1"), LISTING, Planner(LISTING), 0.0)
    shelf.retired[load.of] = load
    shelf.ledger.reserve(load.of, 10)
    assert shelf.leaving_bytes == 0

    load.in_flight[0] = Part(0, FileRef(load.of, 0), "s3://b/m/", LISTING.objects[0], 0, BLOCK)
    assert shelf.leaving_bytes == 10
    load.in_flight.clear()
    shelf.free(load)
    assert shelf.leaving_bytes == 10
    assert shelf.effects == [Free(load.of)]
    load.holders.add(PeerId(1))
    assert shelf.leaving_bytes == 0


def test_a_shelf_finds_loads_current_and_retired():
    shelf = Shelf((ModelRef("m", "s3://b/m/"),), Ledger(0))
    current = Load(VersionRef("m", "2"), LISTING, Planner(LISTING), 0.0)
    retired = Load(VersionRef("m", "1"), LISTING, Planner(LISTING), 0.0)
    shelf.models["m"].load = current
    shelf.retired[retired.of] = retired

    assert shelf.find(current.of) is current
    assert shelf.find(retired.of) is retired
    assert shelf.current(retired.of) is None
    assert shelf.find(VersionRef("m", "3")) is None
