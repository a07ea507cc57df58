"""A version goes when nobody has it, also by path alone; what cannot go is offered again."""

from __future__ import annotations

from cached.core import effects
from cached.core.errors import LoadFailed
from tests.fakes.world import BLOCK, Sent, World, manifest, stored

ONE = manifest(stored("a.safetensors", 8))
OTHER = manifest(stored("b.safetensors", 8, etag='"b"'), uri="s3://bucket/other/")


def ask(world: World, op: str, **fields: object) -> Sent | None:
    request = world.ask(world.connect(), op, **fields)
    world.run()
    return world.answer(request)


def resident(**more: object) -> World:
    world = World({"m": ONE, "other": OTHER}, prefetch=["m"], **more)  # type: ignore[arg-type]
    world.run()
    return world


def test_evict_is_answered_when_the_memory_is_back():
    world = resident()
    request = world.ask(world.connect(), "evict", model="m")
    before = world.answer(request)
    world.run()

    answer = world.answer(request)
    assert before is None
    assert answer is not None
    assert answer.body == {"freed_bytes": 8 * BLOCK}
    assert not world.there


def test_what_a_process_maps_by_path_alone_is_not_evicted_and_offered_on():
    world = resident()
    world.mapped.update(world.there)

    answer = ask(world, "evict", model="m")

    assert answer is not None
    assert answer.code == "not_permitted"
    assert "no lease" in str(answer.body["error"])
    assert world.status("m")["state"] == "resident"
    peer, request = world.opened("m")
    opened = world.answer(request)
    assert opened is not None
    assert opened.code is None
    assert not world.jobs
    world.leave(peer)


def test_memory_that_is_mapped_by_path_alone_counts_as_leased():
    world = resident(budget_bytes=10 * BLOCK)
    world.mapped.update(world.there)

    _, request = world.opened("other")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "over_budget"
    assert "2 MiB of it leased" in str(answer.body["error"])
    world.mapped.clear()
    world.sleep(1)
    _, again = world.opened("other")
    world.run()
    fresh = world.answer(again)
    assert fresh is not None
    assert fresh.code is None


def test_an_opener_that_comes_while_a_version_is_on_its_way_out_gets_it_again_either_way():
    for is_mapped in (False, True):
        world = resident()
        world.ask(world.connect(), "evict", model="m")
        _, request = world.opened("m")
        if is_mapped:
            world.mapped.update(world.there)
        world.run()

        answer = world.answer(request)
        assert answer is not None
        assert answer.code is None
        loads = [effect for effect in world.log if isinstance(effect, effects.CreateSegments)]
        assert len(loads) == (1 if is_mapped else 2)


def test_purge_takes_all_that_nobody_has_and_says_what():
    world = World({"m": ONE, "other": OTHER, "third": OTHER}, prefetch=["m", "other", "third"])
    world.run()
    peer, _ = world.opened("third")
    world.mapped.update(of for of in world.there if of.name == "other")

    answer = ask(world, "purge")

    assert answer is not None
    assert answer.body == {"freed_bytes": 8 * BLOCK, "models": ["m"]}
    assert world.status("other")["state"] == "resident"
    assert world.status("third")["state"] == "resident"
    world.leave(peer)


def test_purge_of_nothing_is_answered_at_once():
    world = World({"m": ONE})
    answer = world.answer(world.ask(world.connect(), "purge"))

    assert answer is not None
    assert answer.body == {"freed_bytes": 0, "models": []}


def test_purge_gives_up_what_is_being_loaded():
    world = World({"m": ONE}, prefetch=["m"])
    world.end(world.job(effects.Resolve))
    world.end(world.job(effects.CreateSegments))
    request = world.ask(world.connect(), "purge")
    for job in [job for job in world.jobs if isinstance(job, effects.FetchPart)]:
        world.end(job, error=LoadFailed("cut"))
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.body["models"] == ["m"]
    assert not world.there


def test_a_failed_version_goes_though_somebody_has_it_and_counts_until_he_has_not():
    world = World({"m": ONE}, slots=1)
    peer, request = world.opened("m")
    while world.answer(request) is None:
        world.end(world.jobs[0])
    world.end(world.job(effects.FetchPart), error=LoadFailed("no"))
    world.run()
    while_held = sum(world.sizes.values())

    world.leave(peer)
    world.run()

    assert while_held == 8 * BLOCK
    assert not world.sizes
