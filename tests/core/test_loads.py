"""What is remembered of models and loads; back-off."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cached.core.ledger import Ledger
from cached.core.loads import Load, Shelf, delay_s, footprint_bytes
from cached.core.objects import ModelRef, Range, StoredObject, VersionRef
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
