"""The GETs of a load: headers first, long headers whole, slots full, nothing twice."""

from __future__ import annotations

from cached.core import effects, events
from cached.core.errors import (
    BadReply,
    HeaderError,
    LoadFailed,
    OutOfSpace,
    StoreBusy,
    StoreUnavailable,
)
from tests.fakes.world import BLOCK, World, header_of, manifest, stored

WIDE = manifest(*(stored(f"{n}.safetensors", 40) for n in range(3)))


def mapped(world: World) -> int:
    _, request = world.opened("m")
    world.end(world.job(effects.Resolve))
    world.end(world.job(effects.CreateSegments))
    return request


def fetches(world: World) -> list[effects.FetchPart]:
    return [job for job in world.jobs if isinstance(job, effects.FetchPart)]


def test_the_first_get_of_each_file_runs_alone():
    world = World({"m": WIDE}, slots=8)

    mapped(world)

    assert [(job.part.file.index, job.part.start) for job in fetches(world)] == [
        (0, 0),
        (1, 0),
        (2, 0),
    ]


def test_all_slots_are_used_once_headers_are_known():
    world = World({"m": WIDE}, slots=8)
    mapped(world)
    for _ in range(3):
        world.end(world.job(effects.FetchPart))
        world.end(world.job(effects.ReadHeader))

    assert len(fetches(world)) == 8


def test_a_header_that_is_longer_than_the_first_part_is_fetched_whole_before_the_rest():
    world = World({"m": manifest(stored("a.safetensors", 80))}, slots=1)
    request = mapped(world)
    world.end(world.job(effects.FetchPart))
    header = world.job(effects.ReadHeader)
    assert isinstance(header, effects.ReadHeader)
    assert header.there_bytes == 4 * BLOCK
    world.jobs.remove(header)
    world.post(events.HeaderSized(header.file, 10 * BLOCK))

    while not any(isinstance(job, effects.ReadHeader) for job in world.jobs):
        (fetch,) = fetches(world)
        assert fetch.part.start < 10 * BLOCK
        world.end(fetch)

    again = world.job(effects.ReadHeader)
    assert isinstance(again, effects.ReadHeader)
    assert again.there_bytes >= 10 * BLOCK
    assert world.answer(request) is None


def test_a_refused_header_fails_the_load_and_names_the_model_and_the_file():
    world = World({"m": WIDE}, slots=1)
    request = mapped(world)
    refused = 0
    while refused < 2:  # the second time it is not the way's fault
        assert world.answer(request) is None
        job = world.jobs[0]
        if isinstance(job, effects.ReadHeader) and job.file.index == 0:
            world.jobs.remove(job)
            world.post(events.HeaderRefused(job.file, HeaderError("overlaps at 7")))
            refused += 1
        else:
            world.end(job)

    answer = world.answer(request)
    assert answer is not None
    assert "cannot load m: 0.safetensors of s3://bucket/m/: overlaps at 7" in str(answer.body)


def test_a_failed_load_is_freed_when_its_last_get_has_ended_and_not_before():
    world = World({"m": WIDE}, slots=3)
    mapped(world)
    first, second, third = fetches(world)
    world.end(first, error=OutOfSpace("full"))  # from the sink, not the store

    assert any(isinstance(effect, effects.CancelParts) for effect in world.log)
    world.end(second)
    assert not any(isinstance(job, effects.Free) for job in world.jobs)
    world.end(third, error=BadReply("cancelled"))

    assert any(isinstance(job, effects.Free) for job in world.jobs)


def test_back_off_holds_all_gets_of_the_load_until_its_time():
    world = World({"m": WIDE}, slots=1)
    mapped(world)

    world.end(fetches(world)[0], error=StoreUnavailable("SlowDown", retry_after_s=3.0))
    assert not fetches(world)
    world.sleep(2.9)
    assert not fetches(world)
    world.sleep(0.2)

    assert len(fetches(world)) == 1


def test_an_empty_safetensors_file_has_its_header_looked_at():
    world = World({"m": manifest(stored("a.safetensors", 0), stored("b.txt", 1))})

    mapped(world)

    header = world.job(effects.ReadHeader)
    assert isinstance(header, effects.ReadHeader)
    assert header.there_bytes == 0
    assert header_of(stored("a.safetensors", 1)).tensors == {}


def first_fetch(world: World) -> effects.FetchPart:
    while not fetches(world):
        world.end(world.jobs[0])
    return fetches(world)[0]


def test_a_stalled_get_is_sent_a_second_time_and_the_loser_is_cut():
    world = World({"m": manifest(stored("a.bin", 8))}, slots=4)
    world.opened("m")
    job = first_fetch(world)
    world.stall(job.part, 0.3)
    first, second = [
        job for job in world.jobs if isinstance(job, effects.FetchPart)
        if job.part.part_id == 0
    ]  # fmt: skip

    world.end(second)
    cuts = [effect for effect in world.log if isinstance(effect, effects.CancelParts)]
    world.end(first, error=BadReply("cut"))
    world.run()

    assert first.part._replace(hedge=1) == second.part
    assert [cut.part_id for cut in cuts] == [0]
    assert world.status("m")["state"] == "resident"
    assert set(world.fetched.values()) == {1}


def test_a_stall_within_patience_is_waited_for():
    world = World({"m": manifest(stored("a.bin", 8))}, slots=4)
    world.opened("m")
    job = first_fetch(world)
    world.stall(job.part, 0.1)

    assert len(fetches(world)) == 2


def test_a_failure_of_one_attempt_leaves_the_other_alone():
    world = World({"m": manifest(stored("a.bin", 8))}, slots=4)
    world.opened("m")
    job = first_fetch(world)
    world.stall(job.part, 0.3)
    world.end(job, error=BadReply("reset"), blocks=1)
    retried = [effect for effect in world.log if isinstance(effect, effects.Retried)]
    world.run()

    assert not retried
    assert set(world.fetched.values()) == {1}
    assert world.status("m")["state"] == "resident"


def test_both_attempts_failing_is_one_failure():
    world = World({"m": manifest(stored("a.bin", 8))}, slots=4)
    peer, _ = world.opened("m")
    job = first_fetch(world)
    world.stall(job.part, 0.3)
    for each in [each for each in world.jobs if isinstance(each, effects.FetchPart)]:
        if each.part.part_id == job.part.part_id:
            world.end(each, error=LoadFailed("no"))
    world.leave(peer)
    world.run()

    assert world.status("m")["state"] == "failed"
    assert not world.there


def test_a_get_that_only_drips_is_sent_again_once_nothing_else_is_to_do():
    """It is never idle, so nothing says that it stalls."""
    world = World({"m": manifest(stored("a.bin", 16))}, slots=4)
    world.opened("m")
    job = first_fetch(world)
    while others := [each for each in world.jobs if each is not job]:
        world.end(others[0])
    world.sleep(0.49)
    before = len(fetches(world))
    world.sleep(0.02)
    again = fetches(world)

    assert before == 1
    assert [each.part.hedge for each in again] == [0, 1]
    world.end(again[1])
    world.end(job, error=StoreUnavailable("cut"))
    world.run()
    assert world.status("m")["state"] == "resident"
    assert set(world.fetched.values()) == {1}


def test_waiting_workers_come_first_then_what_is_pinned_then_the_rest():
    one = manifest(stored("a.bin", 8), uri="s3://bucket/one/")
    world = World({"a": one, "b": one, "c": one}, slots=1, prefetch=["a", "b"], pinned=["b"])
    while not fetches(world):
        world.end(world.jobs[0])
    world.opened("c")
    while len([job for job in world.jobs if not isinstance(job, effects.FetchPart)]):
        world.end(next(job for job in world.jobs if not isinstance(job, effects.FetchPart)))
    order = []
    while fetches(world):
        order.append(fetches(world)[0].part.file.of.name)
        world.run_one()
    assert list(dict.fromkeys(order[1:])) == ["c", "b", "a"]


def test_the_window_is_halved_when_the_store_is_asked_too_much():
    world = World({"m": manifest(stored("a.bin", 200))}, slots=8)
    world.opened("m")
    first_fetch(world)
    full = len(fetches(world))
    for job in fetches(world):
        world.end(job, error=StoreBusy("503 SlowDown"))
    after = len(fetches(world))
    world.sleep(0.2)

    assert (full, after) == (8, 4)
    assert len(fetches(world)) <= 4


def test_a_straggler_sets_no_timer_while_every_slot_is_taken():
    """The daemon spun on a time that had come, while the window was too small for a hedge."""
    world = World({"m": manifest(stored("a.bin", 8))}, slots=2)
    world.opened("m")
    first, second = first_fetch(world), fetches(world)[1]
    world.end(second)  # one slot is free: the other one's age is looked at
    while others := [job for job in world.jobs if job is not first]:
        world.end(others[0])
    timer_s = world.wake_at_s
    world.stall(first.part, 0.3)  # the hedge takes it
    world.sleep(5.0)

    assert timer_s == 0.5
    assert world.wake_at_s is None or world.wake_at_s > world.now_s
