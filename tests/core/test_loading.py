"""Models get in, fail, are tried again and go, and whoever waits hears of it."""

from __future__ import annotations

from cached.core import effects, events
from cached.core.errors import AccessDenied, LoadFailed, ObjectChanged, StoreUnavailable
from cached.core.loading import unknown_version
from cached.core.loads import Model
from cached.core.objects import ModelRef
from tests.fakes.world import BLOCK, Sent, World, manifest, stored

ONE = manifest(stored("a.safetensors", 8))
TWO = manifest(stored("a.safetensors", 8, etag='"2"'))
OTHER = manifest(stored("b.safetensors", 8, etag='"b"'), uri="s3://bucket/other/")
THIRD = manifest(stored("c.safetensors", 8, etag='"c"'), uri="s3://bucket/third/")


def resident(world: World, name: str) -> None:
    peer, _ = world.opened(name, until="ready")
    world.run()
    world.leave(peer)
    assert world.status(name)["state"] == "resident"


def evict(world: World, name: str) -> Sent | None:
    return world.answer(world.ask(world.connect(), "evict", model=name))


def listings(world: World) -> list[effects.Resolve]:
    return [job for job in world.jobs if isinstance(job, effects.Resolve)]


def evicted(world: World) -> list[str]:
    return [effect.of.name for effect in world.log if isinstance(effect, effects.Evicted)]


def failed_while_loading(world: World, error: LoadFailed | ObjectChanged) -> int:
    """Return a peer with a lease of a version whose load then failed."""
    peer, request = world.opened("m")
    while world.answer(request) is None:
        world.end(world.jobs[0])
    world.end(world.job(effects.FetchPart), error=error)
    return peer


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


def test_a_prefetch_by_the_operator_asks_again_at_once_for_a_part_that_was_put_off():
    world = World({"m": ONE})
    world.opened("m")
    while not any(isinstance(job, effects.FetchPart) for job in world.jobs):
        world.end(world.jobs[0])
    error = StoreUnavailable("503", retry_after_s=50.0)
    world.end(world.job(effects.FetchPart), error=error)
    jobs_before = list(world.jobs)

    world.ask(world.connect(), "prefetch", model="m")

    assert not jobs_before
    assert isinstance(world.jobs[0], effects.FetchPart)


def test_a_store_that_asks_for_days_delays_a_part_by_a_minute_at_most():
    world = World({"m": ONE})
    world.opened("m")
    while not any(isinstance(job, effects.FetchPart) for job in world.jobs):
        world.end(world.jobs[0])
    error = StoreUnavailable("503", retry_after_s=864_000.0)
    world.end(world.job(effects.FetchPart), error=error)

    world.sleep(61)

    assert isinstance(world.jobs[0], effects.FetchPart)


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


def test_memory_that_is_being_freed_is_waited_for():
    world = World({"one": ONE, "other": OTHER}, budget_bytes=10 * BLOCK)
    resident(world, "one")
    evict(world, "one")
    _, request = world.opened("other")

    world.end(world.job(effects.Resolve))

    assert world.answer(request) is None
    assert world.status("other")["state"] == "admitting"
    world.run()
    answer = world.answer(request)
    assert answer is not None
    assert answer.code is None


def test_a_prefetch_waits_for_memory_that_is_being_freed():
    world = World({"one": ONE, "other": OTHER}, budget_bytes=10 * BLOCK, prefetch=["other"])
    listing = world.jobs.pop()  # takes its time
    resident(world, "one")
    evict(world, "one")
    world.jobs.append(listing)

    world.end(listing)
    world.run()

    assert world.status("other")["state"] == "resident"


def test_who_waits_for_memory_that_turns_out_to_be_mapped_is_refused_then():
    world = World({"one": ONE, "other": OTHER}, budget_bytes=10 * BLOCK)
    resident(world, "one")
    world.mapped.update(world.there)
    evict(world, "one")
    _, request = world.opened("other")
    world.end(world.job(effects.Resolve))

    world.end(world.job(effects.Free))

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "over_budget"


def test_nobody_is_evicted_in_place_of_memory_that_is_being_freed():
    world = World({"one": ONE, "other": OTHER, "third": THIRD}, budget_bytes=20 * BLOCK)
    resident(world, "one")
    resident(world, "other")
    world.opened("third")
    world.end(world.job(effects.Resolve))
    before = [effect for effect in world.log if isinstance(effect, effects.Free)]

    world.opened("third")

    assert [effect for effect in world.log if isinstance(effect, effects.Free)] == before
    assert len(before) == 1


def test_the_next_open_gets_the_new_version_though_the_budget_has_no_room_for_both():
    world = World({"m": ONE}, slots=1, budget_bytes=10 * BLOCK)
    peer = failed_while_loading(world, ObjectChanged("replaced"))
    world.listings["m"] = TWO
    world.leave(peer)

    _, again = world.opened("m", until="ready")
    world.end(world.job(effects.Resolve))
    world.run()

    fresh = world.answer(again)
    assert fresh is not None
    assert fresh.body.get("version") == TWO.version


def test_a_failed_version_is_freed_when_its_last_holder_leaves_and_not_asked_about_before():
    world = World({"m": ONE}, slots=1)
    peer = failed_while_loading(world, LoadFailed("refused"))
    world.run()
    wake_at_s = world.wake_at_s

    world.leave(peer)
    world.run()

    assert wake_at_s is None
    assert not world.there


def test_a_free_that_failed_is_tried_again():
    world = World({"m": ONE}, budget_bytes=10 * BLOCK)
    resident(world, "m")
    evict(world, "m")

    world.end(world.job(effects.Free), error=LoadFailed("cannot remove: read-only"))
    assert world.status("m")["state"] == "resident"
    evict(world, "m")
    world.run()

    assert world.status("m")["state"] == "absent"
    resident(world, "m")


def test_the_failure_of_a_version_that_is_already_going_changes_nothing():
    world = World({"m": ONE})
    world.opened("m")
    world.end(world.job(effects.Resolve))
    create = world.job(effects.CreateSegments)
    assert isinstance(create, effects.CreateSegments)
    evict(world, "m")
    world.jobs.remove(create)

    world.post(events.SegmentsFailed(create.of, LoadFailed("no room")))
    world.run()

    assert world.status("m")["state"] == "resident"


def test_a_pinned_model_stays_and_the_newcomer_is_refused():
    world = World({"one": ONE, "other": OTHER}, budget_bytes=10 * BLOCK, pinned=["one"])
    resident(world, "one")

    _, request = world.opened("other")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "over_budget"
    assert world.status("one")["state"] == "resident"


def test_a_store_cannot_put_a_model_off_for_more_than_a_minute():
    world = World({"m": ONE})
    _, request = world.opened("m")
    error = StoreUnavailable("503", retry_after_s=999_999_999.0)

    world.end(world.job(effects.Resolve), error=error)
    world.sleep(60.1)
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code is None


def test_an_open_waits_as_long_as_the_store_asked_and_the_operator_does_not():
    world = World({"m": ONE})
    world.opened("m")
    world.end(world.job(effects.Resolve), error=StoreUnavailable("503", retry_after_s=30.0))

    world.opened("m")
    before = len(listings(world))
    world.ask(world.connect(), "prefetch", model="m")
    world.ask(world.connect(), "prefetch", model="m")

    assert (before, len(listings(world))) == (0, 1)
    world.run()
    assert world.status("m")["state"] == "resident"
    world.sleep(31)
    assert not world.jobs


def test_evict_ends_the_wait_for_a_store():
    world = World({"m": ONE}, prefetch=["m"])
    world.end(world.job(effects.Resolve), error=StoreUnavailable("503", retry_after_s=30.0))

    answer = evict(world, "m")

    assert answer is not None
    assert answer.body == {"freed_bytes": 0}
    assert world.status("m")["state"] == "absent"
    world.sleep(1000)
    assert not world.jobs
    resident(world, "m")


def test_evict_ends_the_retries_of_a_prefetch_that_failed():
    world = World({"m": ONE}, prefetch=["m"], budget_bytes=4 * BLOCK)
    world.run()
    assert world.status("m")["state"] == "failed"

    evict(world, "m")
    world.sleep(1000)

    assert not world.jobs
    assert world.status("m")["state"] == "absent"


def test_evict_ends_the_wait_for_room():
    world = World({"one": ONE, "other": OTHER}, budget_bytes=10 * BLOCK)
    resident(world, "one")
    evict(world, "one")
    world.ask(world.connect(), "prefetch", model="other")
    world.end(world.job(effects.Resolve))

    evict(world, "other")
    world.run()

    assert world.status("other")["state"] == "absent"


def test_a_listing_from_before_an_evict_counts_no_more():
    world = World({"m": ONE})
    _, request = world.opened("m", until="ready")
    old = world.job(effects.Resolve)
    evict(world, "m")  # the opener wants it still: it is listed anew
    world.end(old)
    assert world.status("m")["state"] == "resolving"

    world.listings["m"] = TWO
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.body["version"] == TWO.version


def test_prefetches_get_in_in_the_order_of_the_configuration():
    world = World({"one": ONE, "other": OTHER}, budget_bytes=10 * BLOCK, prefetch=["one", "other"])
    first, second = listings(world)

    world.end(second)
    assert world.status("other")["state"] == "admitting"
    world.end(first)
    world.run()

    assert world.status("one")["state"] == "resident"
    assert world.status("other")["state"] == "failed"


def test_a_prefetch_whose_listing_fails_holds_the_next_up_no_longer():
    world = World({"one": ONE, "other": OTHER}, prefetch=["one", "other"])
    first, second = listings(world)
    world.end(second)

    world.end(first, error=StoreUnavailable("503"))
    world.run()

    assert world.status("other")["state"] == "resident"


def test_what_a_worker_asks_for_does_not_wait_for_a_prefetch():
    world = World({"one": ONE, "other": OTHER}, prefetch=["one", "other"])
    _, request = world.opened("other")
    _, second = listings(world)

    world.end(second)
    while world.answer(request) is None:
        world.end(world.jobs[1])

    assert world.status("one")["state"] == "resolving"


def test_an_evict_lets_the_next_prefetch_have_its_turn():
    world = World({"one": ONE, "other": OTHER}, prefetch=["one", "other"])
    first, second = listings(world)
    world.end(second)

    evict(world, "one")
    world.end(world.job(effects.CreateSegments))
    world.end(first)

    assert world.status("one")["state"] == "absent"
    assert world.status("other")["state"] == "loading"


def test_what_models_have_on_pages_is_not_taken_from_the_machine_twice():
    world = World({"one": ONE, "other": OTHER}, available_bytes=10 * BLOCK)
    resident(world, "one")

    resident(world, "other")

    assert world.status("one")["state"] == "resident"


def test_a_version_of_a_model_that_is_not_there_is_refused_with_how_to_load_it():
    error = unknown_version(Model(ModelRef("m", "s3://b/m/")), "77aa")
    assert error.message == "m has no version '77aa' in memory: nothing of it is there"
    assert error.hint == "cached prefetch m loads the version that the store lists"
