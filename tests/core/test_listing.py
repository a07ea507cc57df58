"""The store is asked; a new version comes beside the old, which stays to go back to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cached.core import effects
from cached.core.errors import ObjectChanged, StoreUnavailable
from tests.fakes.world import BLOCK, World, manifest, stored

if TYPE_CHECKING:
    from cached.core.objects import Manifest

OLD = manifest(stored("a.safetensors", 8), stored("config.json", 1))
NEW = manifest(stored("a.safetensors", 8, etag='"2"'), stored("config.json", 1))
THIRD = manifest(stored("a.safetensors", 8, etag='"3"'), stored("config.json", 1))
FOURTH = manifest(stored("a.safetensors", 8, etag='"4"'), stored("config.json", 1))
OTHER = manifest(stored("b.safetensors", 8, etag='"b"'), uri="s3://bucket/other/")


def resident(**more: object) -> World:
    world = World({"m": OLD}, prefetch=["m"], **more)  # type: ignore[arg-type]
    world.run()
    world.listings["m"] = NEW
    return world


def refresh(world: World, **fields: object) -> dict[str, object]:
    answer = world.answer(world.ask(world.connect(), "refresh", model="m", **fields))
    assert answer is not None
    return answer.body


def opened_version(world: World, **fields: object) -> object:
    peer, request = world.opened("m", **fields)
    world.run()
    answer = world.answer(request)
    assert answer is not None
    world.leave(peer)
    return answer.body.get("version") or answer.code


def test_a_refresh_fills_the_new_version_beside_the_old_and_then_switches():
    world = resident()

    assert refresh(world)["version"] == OLD.version
    world.end(world.job(effects.Resolve))
    world.end(world.job(effects.CreateSegments))
    while_loading = world.status("m")
    peer, request = world.opened("m")
    during = world.answer(request)
    world.leave(peer)
    world.run()

    assert while_loading["state"] == "resident"
    assert while_loading["refreshing"] is True
    assert during is not None
    assert during.body["version"] == OLD.version
    assert opened_version(world) == NEW.version
    assert world.status("m")["refreshing"] is False


def test_the_old_version_goes_when_its_last_lease_does_and_not_before():
    world = resident()
    peer, _ = world.opened("m")
    refresh(world)
    world.run()
    versions = world.status("m")["versions"]
    states = {each["version"]: each["state"] for each in versions}  # type: ignore[attr-defined]

    world.leave(peer)
    world.run()

    assert states == {NEW.version: "current", OLD.version: "kept"}
    assert [of.version for of in world.there] == [NEW.version]


def test_an_old_version_that_is_mapped_by_path_alone_is_looked_at_twice_a_second():
    world = resident()
    (old,) = world.there
    world.mapped.add(old)
    refresh(world)
    world.run()
    is_there = old in world.there

    world.mapped.clear()
    world.sleep(0.5)
    world.run()

    assert is_there
    assert old not in world.there
    assert world.wake_at_s is None or world.wake_at_s <= world.now_s


def test_what_did_not_change_is_neither_fetched_again_nor_counted_twice():
    world = resident()
    refresh(world)
    world.run()

    fetched = {file.index for (file, _), n in world.fetched.items() if file.of.load == 2}
    assert fetched == {0}
    assert set(world.fetched.values()) == {1}
    assert sum(world.sizes.values()) == 9 * BLOCK


def test_a_refresh_that_finds_the_same_version_changes_nothing():
    world = resident()
    world.listings["m"] = OLD
    before = dict(world.fetched)

    refresh(world)
    world.run()

    assert world.fetched == before
    assert world.status("m")["state"] == "resident"


def test_going_back_fetches_nothing_and_lasts_until_the_next_refresh():
    world = resident(kept_versions=1, refresh_interval_s=60.0)
    refresh(world)
    world.run()
    before = dict(world.fetched)

    refresh(world, version=OLD.version)
    world.run()
    went_back = opened_version(world)
    world.sleep(61)  # the store is asked, and still lists the new one
    world.run()
    stayed = opened_version(world)
    fetched_going_back = dict(world.fetched)
    refresh(world)
    world.run()

    assert (went_back, stayed) == (OLD.version, OLD.version)
    assert fetched_going_back == before
    assert opened_version(world) == NEW.version


def test_what_was_passed_over_is_so_no_more_once_there_is_nothing_else():
    world = resident(kept_versions=1)
    refresh(world)
    world.run()
    refresh(world, version=OLD.version)
    world.run()
    told = [effect.passed_over for effect in world.log if isinstance(effect, effects.Publish)]
    world.ask(world.connect(), "evict", model="m")
    world.run()
    assert opened_version(world) == NEW.version

    last = [effect for effect in world.log if isinstance(effect, effects.Publish)][-1]
    assert (told[-1], last.passed_over) == ((NEW.version,), ())


def three(**more: object) -> World:
    """The third is current, the other two are kept; the store is looked at each minute."""
    world = resident(kept_versions=2, refresh_interval_s=60.0, **more)
    refresh(world)
    world.run()
    world.listings["m"] = THIRD
    refresh(world)
    world.run()
    assert opened_version(world) == THIRD.version
    return world


def test_going_back_twice_passes_over_both():
    world = three()
    refresh(world, version=NEW.version)
    world.run()
    refresh(world, version=OLD.version)
    world.run()
    for listed in (THIRD, NEW):
        world.listings["m"] = listed
        world.sleep(61)
        world.run()
        assert opened_version(world) == OLD.version
    assert world.status("m")["passed_over"] == [THIRD.version, NEW.version]


def test_staying_at_the_current_version_gives_up_what_is_on_its_way():
    world = three()
    world.listings["m"] = FOURTH
    refresh(world)
    while not any(isinstance(job, effects.FetchPart) for job in world.jobs):
        world.run_one()
    refresh(world, version=THIRD.version)
    world.run()
    world.sleep(61)
    world.run()
    assert opened_version(world) == THIRD.version
    assert world.status("m")["passed_over"] == [FOURTH.version]


@pytest.mark.parametrize("other", [OLD, FOURTH], ids=["what he is at", "another"])
def test_going_back_is_over_once_the_store_lists_what_nobody_went_back_from(other: Manifest):
    world = three()
    refresh(world, version=OLD.version)
    world.run()
    world.listings["m"] = other
    world.sleep(61)
    world.run()
    assert opened_version(world) == other.version
    assert world.status("m")["passed_over"] == []
    last = [effect for effect in world.log if isinstance(effect, effects.Publish)][-1]
    assert last.passed_over == (), "the next daemon is told"
    world.listings["m"] = THIRD
    world.sleep(61)
    world.run()
    assert opened_version(world) == THIRD.version


def test_the_old_listing_again_brings_back_what_is_still_there():
    world = resident(kept_versions=1)
    refresh(world)
    world.run()
    before = dict(world.fetched)
    world.listings["m"] = OLD

    refresh(world)
    world.run()

    assert opened_version(world) == OLD.version
    assert world.fetched == before


def test_two_versions_are_served_side_by_side():
    world = resident(kept_versions=1)
    old_peer, _ = world.opened("m")
    refresh(world)
    world.run()

    assert opened_version(world, version=OLD.version) == OLD.version
    assert opened_version(world, version=NEW.version) == NEW.version
    world.leave(old_peer)


def test_a_version_that_only_the_store_has_is_fetched_for_who_names_it():
    world = resident()
    world.sleep(2)

    assert opened_version(world, version=NEW.version) == NEW.version


def test_a_version_that_nobody_has_is_refused_with_those_that_are_there():
    world = resident()
    world.listings["m"] = OLD
    _, request = world.opened("m", version="no such")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "version_unknown"
    assert OLD.version in str(answer.body["error"])


def test_a_version_that_the_operator_went_back_from_is_refused_with_what_brings_it_again():
    world = resident()
    peer, _ = world.opened("m")
    refresh(world)
    world.run()
    refresh(world, version=OLD.version)
    world.run()
    assert NEW.version not in {of.version for of in world.there}
    _, request = world.opened("m", version=NEW.version)
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "version_unknown"
    assert "the operator went back from it" in str(answer.body["error"])
    assert opened_version(world) == OLD.version
    refresh(world)  # as the hint says
    world.run()
    assert opened_version(world, version=NEW.version) == NEW.version
    world.leave(peer)


def test_naming_unknown_versions_does_not_make_the_store_busy():
    world = resident()
    world.listings["m"] = OLD
    for _ in range(20):
        assert opened_version(world, version="no such") == "version_unknown"

    assert sum(isinstance(effect, effects.Resolve) for effect in world.log) == 1
    world.sleep(2)
    assert opened_version(world, version="no such") == "version_unknown"
    assert sum(isinstance(effect, effects.Resolve) for effect in world.log) == 2


def test_the_store_is_asked_for_a_new_version_at_times_if_that_is_wanted():
    world = resident(refresh_interval_s=60.0)
    world.sleep(61)
    world.run()

    assert opened_version(world) == NEW.version


def test_without_room_for_both_the_old_one_serves_until_it_is_closed():
    world = resident(budget_bytes=12 * BLOCK)
    peer, _ = world.opened("m")
    refresh(world)
    world.run()
    held = (opened_version(world), world.status("m")["error"])

    world.leave(peer)
    world.run()

    assert held[0] == OLD.version
    assert "needs" in str(held[1])
    assert opened_version(world) == NEW.version


def test_who_wants_the_new_version_hears_that_there_is_no_room_for_both():
    world = resident(budget_bytes=12 * BLOCK)
    world.opened("m")
    world.sleep(2)

    assert opened_version(world, version=NEW.version) == "over_budget"


def test_a_new_version_that_fails_leaves_the_old_one_in_place():
    world = resident()
    refresh(world)
    world.end(world.job(effects.Resolve))
    world.end(world.job(effects.CreateSegments))
    world.end(world.job(effects.FetchPart), error=ObjectChanged("412"))
    world.run()

    assert opened_version(world) == OLD.version
    assert "412" in str(world.status("m")["error"])


def test_the_version_that_is_replaced_goes_last_to_make_room_for_its_successor():
    world = World({"m": OLD, "other": OTHER}, budget_bytes=20 * BLOCK, prefetch=["m", "other"])
    world.run()
    world.listings["m"] = NEW

    refresh(world)
    world.run()

    assert opened_version(world) == NEW.version
    assert world.status("other")["state"] == "absent"


@pytest.mark.parametrize("op", ["refresh", "purge"])
def test_only_the_owner_may(op):
    world = resident()
    answer = world.answer(world.ask(world.connect(uid=1), op, model="m"))

    assert answer is not None
    assert answer.code == "not_permitted"


def test_a_listing_that_fails_leaves_what_is_current_and_says_so():
    world = resident()
    refresh(world)
    for _ in range(6):
        world.end(world.job(effects.Resolve), error=StoreUnavailable("503"))
        world.sleep(20)
        if not world.jobs:
            break

    assert world.status("m")["state"] == "resident"
    assert "503" in str(world.status("m")["error"])
    assert opened_version(world) == OLD.version
