"""Who gets in: never over the budget, never more than the machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from cached.core import admission, effects
from cached.core.errors import OverBudget
from cached.core.ledger import Ledger
from cached.core.objects import FileRef, Left, Manifest, ModelRef, PeerId, VersionRef
from cached.core.shelf import Shelf
from cached.core.units import parse_bytes
from tests.fakes.world import BLOCK, World, load_of, manifest, stored

if TYPE_CHECKING:
    from cached.core.loads import Load

SIZES = st.integers(0, 1000)
GIB = 1 << 30
REF = ModelRef("m", "s3://b/")
LISTING = manifest(stored("a.safetensors", 1))
OLD = VersionRef("m", "old")


def retired(shelf: Shelf, size_bytes: int) -> Load:
    """A load that was taken out of use and still has its memory."""
    load = load_of(LISTING, "old")
    shelf.ledger.reserve(OLD, size_bytes)
    shelf.retired[OLD] = load
    return load


@given(budget=SIZES, size=SIZES, committed=SIZES, available=SIZES, headroom=SIZES)
def test_usable_is_within_the_budget_and_within_the_machine(
    budget, size, committed, available, headroom
):
    ledger = Ledger(budget)
    size = min(size, budget)
    committed = min(committed, size)
    other = VersionRef("other", "1")
    ledger.reserve(other, size)
    ledger.commit(FileRef(other, 0), 0, committed)

    usable = admission.usable_bytes(available + committed, ledger, headroom)

    reserved = size - committed  # the machine still counts it as available
    assert usable == min(budget - size, available - headroom - reserved)


def test_memory_that_was_promised_but_never_used_does_not_count_twice_when_it_is_released():
    ledger = Ledger(1000)
    other = VersionRef("other", "1")
    ledger.reserve(other, 300)
    ledger.commit(FileRef(other, 0), 0, 100)
    capacity_bytes = 400 + ledger.committed_bytes

    ledger.release(other)

    assert admission.usable_bytes(capacity_bytes, ledger, 0) == 500


@given(needed=SIZES, budget=SIZES, capacity=SIZES)
def test_with_nobody_to_evict_it_fits_or_is_refused_with_its_name(needed, budget, capacity):
    shelf = Shelf((REF,), Ledger(budget))
    model = shelf.models["m"]
    model.capacity_bytes = capacity
    model.is_asked = True

    verdict = admission.decide(model, needed, shelf, headroom_bytes=0, now_s=0.0)

    if needed <= min(budget, capacity):
        assert verdict == ()
    else:
        assert isinstance(verdict, OverBudget)
        assert verdict.message.startswith("m needs")


@given(needed=SIZES, budget=SIZES, going=SIZES, is_leaving=st.booleans())
def test_what_is_being_freed_counts_as_room(needed, budget, going, is_leaving):
    shelf = Shelf((REF,), Ledger(budget))
    going = min(going, budget)
    load = retired(shelf, going)
    if is_leaving:
        shelf.free(load)
    model = shelf.models["m"]
    model.capacity_bytes = budget

    verdict = admission.decide(model, needed, shelf, headroom_bytes=0, now_s=0.0)

    fits = needed <= (budget if is_leaving else budget - going)
    assert (verdict == ()) == fits


def test_what_somebody_holds_is_not_about_to_be_free_and_named_as_leased():
    shelf = Shelf((REF,), Ledger(10))
    load = retired(shelf, 8)
    shelf.free(load)
    load.holders.add(PeerId(1))
    model = shelf.models["m"]
    model.capacity_bytes = 10

    verdict = admission.decide(model, 8, shelf, headroom_bytes=0, now_s=0.0)

    assert isinstance(verdict, OverBudget)
    assert "8 B of it leased" in verdict.message


def test_a_refusal_has_the_numbers():
    error = admission.over_budget("llm", 3 * GIB + GIB // 10, 2 * GIB, 6 * GIB, 8 * GIB)

    assert error.message == "llm needs 3.1 GiB, 2 GiB free (budget 8 GiB, 6 GiB of it leased)"
    assert "evict" in error.hint


def test_a_refusal_of_what_can_never_fit_says_how_much_it_takes():
    error = admission.over_budget("llm", 3 * GIB, GIB, 0, 2 * GIB)

    assert str(error).endswith("give the daemon a memory budget of at least 3 GiB")


def test_less_than_nothing_free_is_shown_as_nothing():
    assert "0 B free" in admission.over_budget("llm", GIB, -GIB, GIB, GIB).message


def test_the_budget_that_a_refusal_advises_is_enough():
    needed_bytes = parse_bytes("237.4MiB") + 30_000

    refused = admission.over_budget(
        "m", needed_bytes, needed_bytes - 4096, 0, parse_bytes("237.4MiB")
    )

    assert "needs 237.5 MiB, 237.4 MiB free" in refused.message
    assert parse_bytes(refused.hint.partition("at least ")[2]) >= needed_bytes


def test_a_version_that_is_about_to_be_current_again_makes_room_for_nobody():
    one, two = (manifest(stored("a.safetensors", 3, etag)) for etag in ('"1"', '"2"'))
    big = manifest(stored("b.safetensors", 5))
    world = World({"m": one, "big": big}, budget_bytes=10 * BLOCK, kept_versions=1)
    for listing in (one, two):
        world.listings["m"] = listing
        world.ask(world.connect(), "refresh", model="m")
        world.run()
    world.listings["m"] = one
    world.ask(world.connect(), "refresh", model="m")
    while not any(isinstance(job, effects.Publish) for job in world.jobs):
        world.run_one()
    publish = world.job(effects.Publish)
    world.opened("big")
    while others := [job for job in world.jobs if job is not publish]:
        world.end(others[0])
    world.run()
    peer, _ = world.opened("m")

    assert world.status("m")["version"] == one.version
    assert world.leases[peer] in world.there
    assert world.status("big")["state"] == "resident"


def refreshed(world: World, *listings: Manifest) -> None:
    """Have the store list these one after another, and load each."""
    for listing in listings:
        world.listings["m"] = listing
        world.ask(world.connect(), "refresh", model="m")
        world.run()


def sharing(*etags: str) -> tuple[Manifest, ...]:
    """Versions that have all but a small file in common."""
    weights = stored("a.safetensors", 4)
    return tuple(manifest(weights, stored("c.txt", 1, etag)) for etag in etags)


def test_versions_that_share_files_make_room_together():
    """Each alone gives back next to nothing; nobody could ever be evicted for another model."""
    one, two = sharing('"1"', '"2"')
    big = manifest(stored("b.safetensors", 6))
    world = World({"m": one, "big": big}, budget_bytes=8 * BLOCK, kept_versions=1)
    refreshed(world, one, two)

    world.opened("big")
    world.run()

    assert world.status("big")["state"] == "resident"
    assert world.status("m")["state"] == "absent"


def test_what_is_kept_goes_before_what_is_current_also_where_it_shares_files():
    one, two = sharing('"1"', '"2"')
    three = manifest(stored("a.safetensors", 4, '"3"'))
    big = manifest(stored("b.safetensors", 6))
    world = World({"m": one, "big": big}, budget_bytes=11 * BLOCK, kept_versions=2)
    refreshed(world, one, two, three)

    world.opened("big")
    world.run()

    assert world.status("big")["state"] == "resident"
    versions = world.status("m")["versions"]
    assert isinstance(versions, list)
    assert [each["version"] for each in versions] == [three.version]


def test_what_the_operator_went_back_to_is_not_evicted_for_another_model():
    """Its next open would bring the version that he went back from."""
    one, two = (manifest(stored("a.safetensors", 4, etag)) for etag in ('"1"', '"2"'))
    big = manifest(stored("b.safetensors", 6))
    world = World({"m": one, "big": big}, budget_bytes=9 * BLOCK, kept_versions=1)
    refreshed(world, one, two)
    world.ask(world.connect(), "refresh", model="m", version=one.version)
    world.run()

    _, request = world.opened("big")
    world.run()

    refused = world.answer(request)
    assert refused is not None
    assert refused.code == "over_budget"
    assert world.status("m")["version"] == one.version


def test_what_an_earlier_daemon_left_is_rated_by_what_fetching_it_would_take():
    """It took milliseconds to take over; it was evicted before all else."""
    hot, cold, new = (manifest(stored("a.safetensors", 4), uri=f"s3://bucket/{n}/") for n in "hcn")
    found = Left(
        of=VersionRef("h", hot.version, 1),
        manifest=hot,
        path="/models/h",
        size_bytes=hot.size_bytes,
        is_published=True,
        is_current=True,
        is_trusted=True,
    )
    listings = {"h": hot, "c": cold, "n": new}
    world = World(listings, budget_bytes=9 * BLOCK, left=[found])
    world.run()
    world.now_s += 5
    for name in ("c", "h", "h", "h"):
        peer, _ = world.opened(name)
        world.now_s += 1
        world.run()
        world.leave(peer)

    world.opened("n")
    world.run()

    states = {name: world.status(name)["state"] for name in listings}
    assert states == {"h": "resident", "c": "absent", "n": "resident"}
