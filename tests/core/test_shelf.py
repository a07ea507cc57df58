"""Where loads stand, what they count, and who pays for what two of them share."""

from __future__ import annotations

from cached.core.effects import Free
from cached.core.ledger import Ledger
from cached.core.loads import Flight, file_bytes
from cached.core.objects import FileRef, ModelRef, Part, PeerId, VersionRef
from cached.core.shelf import Shelf
from tests.fakes.world import BLOCK, load_of, manifest, stored

LISTING = manifest(stored("a.safetensors", 4), stored("b.txt", 1))
PART = Part(0, FileRef(VersionRef("m", "1"), 0), "s3://b/m/", LISTING.objects[0], 0, BLOCK)


def test_what_somebody_holds_is_leased_current_or_retired():
    shelf = Shelf((ModelRef("m", "s3://b/m/"),), Ledger(100))
    current = load_of(LISTING, "2")
    retired = load_of(LISTING, "1")
    shelf.models["m"].current = current
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
    load = load_of(LISTING, "1")
    shelf.retired[load.of] = load
    shelf.ledger.reserve(load.of, 10)
    assert shelf.gives_back(shelf.leaving) == 0

    load.in_flight[0] = Flight(PART, 0.0)
    assert shelf.gives_back(shelf.leaving) == 10
    load.in_flight.clear()
    shelf.free(load)
    assert shelf.gives_back(shelf.leaving) == 10
    assert shelf.effects == [Free(load.of)]
    load.holders.add(PeerId(1))
    assert shelf.gives_back(shelf.leaving) == 0


def test_a_shelf_finds_loads_current_and_retired():
    shelf = Shelf((ModelRef("m", "s3://b/m/"),), Ledger(0))
    current = load_of(LISTING, "2")
    retired = load_of(LISTING, "1")
    shelf.models["m"].current = current
    shelf.retired[retired.of] = retired

    assert shelf.find(current.of) is current
    assert shelf.find(retired.of) is retired
    assert shelf.coming(current.of) is None
    assert shelf.find(VersionRef("m", "3")) is None


def test_bytes_that_are_there_take_whole_pages():
    shelf = Shelf((), Ledger(1 << 20))
    file = FileRef(VersionRef("m", "1"), 0)
    shelf.ledger.reserve(file.of, file_bytes(5000))
    shelf.commit(file, 100, 200)
    assert shelf.ledger.committed_bytes == 4096
    shelf.commit(file, 200, 5000)

    assert shelf.ledger.reserved_bytes == 0
    assert shelf.ledger.release(file.of) == 8192
