"""Models get in, fail, are tried again and go, and whoever waits hears of it."""

from __future__ import annotations

from cached.core import effects
from cached.core.errors import AccessDenied, ObjectChanged, StoreUnavailable
from tests.fakes.world import BLOCK, World, manifest, stored

ONE = manifest(stored("a.safetensors", 8))
TWO = manifest(stored("a.safetensors", 8, etag='"2"'))
OTHER = manifest(stored("b.safetensors", 8, etag='"b"'), uri="s3://bucket/other/")


def resident(world: World, name: str) -> None:
    peer, _ = world.opened(name, until="ready")
    world.run()
    world.leave(peer)
    assert world.status(name)["state"] == "resident"


def test_a_listing_that_fails_is_tried_again_with_back_off():
    world = World({"m": ONE})
    _, request = world.opened("m")

    world.end(world.job(effects.Resolve), error=StoreUnavailable("503"))
    assert not world.jobs
    assert world.answer(request) is None
    world.sleep(0.2)
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code is None


def test_retry_after_is_honoured():
    world = World({"m": ONE})
    world.opened("m")

    world.end(world.job(effects.Resolve), error=StoreUnavailable("503", retry_after_s=7.0))
    world.sleep(6.9)
    assert not world.jobs
    world.sleep(0.2)

    assert world.jobs


def test_a_permanent_failure_is_told_at_once_and_the_next_open_tries_again():
    world = World({"m": ONE})
    _, first = world.opened("m")
    error = AccessDenied("s3:ListBucket on bucket was denied", hint="allow it")
    world.end(world.job(effects.Resolve), error=error)

    answer = world.answer(first)
    assert answer is not None
    assert answer.code == "load_failed"
    assert answer.body["error"] == {
        "code": "load_failed",
        "message": "cannot load m: s3:ListBucket on bucket was denied",
        "hint": "allow it",
    }
    _, second = world.opened("m")
    world.run()
    later = world.answer(second)
    assert later is not None
    assert later.code is None


def test_room_is_made_by_evicting_what_nobody_holds():
    world = World({"one": ONE, "other": OTHER}, budget_bytes=10 * BLOCK)
    resident(world, "one")

    resident(world, "other")

    assert world.status("one")["state"] == "absent"


def test_what_is_leased_stays_and_the_newcomer_is_refused_with_the_numbers():
    world = World({"one": ONE, "other": OTHER}, budget_bytes=10 * BLOCK)
    world.opened("one", until="ready")
    world.run()

    _, request = world.opened("other")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "over_budget"
    text = str(answer.body["error"])
    assert "needs 2 MiB" in text
    assert "2 MiB of it leased" in text
    assert world.status("one")["state"] == "resident"


def test_a_prefetch_that_nobody_waits_for_evicts_nobody():
    world = World({"one": ONE, "other": OTHER}, budget_bytes=10 * BLOCK, prefetch=["one", "other"])

    world.run()

    assert world.status("one")["state"] == "resident"
    assert world.status("other")["state"] == "failed"


def test_memory_that_the_machine_has_not_is_refused_though_the_budget_allows_it():
    world = World({"one": ONE}, available_bytes=4 * BLOCK)

    _, request = world.opened("one")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "over_budget"


def test_a_replaced_object_tells_stale_and_the_next_open_gets_the_new_version():
    world = World({"m": ONE}, slots=1)
    peer, opened = world.opened("m")
    world.end(world.job(effects.Resolve))
    world.end(world.job(effects.CreateSegments))
    world.end(world.job(effects.FetchPart))
    world.end(world.job(effects.ReadHeader))
    waiting = world.ask(peer, "wait", ranges="all")
    assert world.answer(opened) is not None

    world.listings["m"] = TWO
    world.end(world.job(effects.FetchPart), error=ObjectChanged("replaced"))

    answer = world.answer(waiting)
    assert answer is not None
    assert answer.code == "stale"
    _, again = world.opened("m", until="ready")
    world.run(limit=60)
    fresh = world.answer(again)
    assert fresh is not None
    assert fresh.body["version"] == TWO.version
    checked = world.answer(world.ask(peer, "check"))
    assert checked is not None
    assert checked.body == {"stale": True, "current": TWO.version}


def test_a_version_that_is_still_mapped_counts_until_it_is_freed():
    world = World({"one": ONE, "other": OTHER}, budget_bytes=10 * BLOCK)
    resident(world, "one")
    version = next(iter(world.there))
    world.mapped.add(version)

    owner = world.connect()
    world.ask(owner, "evict", model="one")
    world.end(world.job(effects.Free))
    _, request = world.opened("other")
    world.run(limit=5)
    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "over_budget"

    world.mapped.clear()
    world.sleep(1.1)
    world.run()
    resident(world, "other")


def test_a_failed_prefetch_is_tried_again_by_itself():
    world = World({"m": ONE}, prefetch=["m"])
    for _ in range(6):
        world.end(world.job(effects.Resolve), error=StoreUnavailable("down"))
        world.sleep(5)
    world.sleep(10)
    world.run()

    assert world.is_ready
