"""Loads are checked as they come: by what the store tells, or by the list that came with them."""

from __future__ import annotations

from typing import Any

import pytest

from cached.core import effects, events
from cached.core.digests import Digests, FileDigests
from cached.core.errors import HeaderError, ObjectChanged, StoreUnavailable
from cached.core.objects import ObjectFacts
from tests.fakes.world import BLOCK, RIGHT, World, manifest, right_crc, stored

ONE = manifest(stored("a.safetensors", 8), stored("b.txt", 2))
LISTED = manifest(stored("a.safetensors", 8), stored("cached.manifest.json", 1))
CAN = frozenset({"sha256"})


def checked_world(listing=ONE, **more: object) -> World:
    options = {"verify": "checksum", "can_check": CAN} | more
    world = World({"m": listing}, prefetch=["m"], **options)  # type: ignore[arg-type]
    world.facts = {stored.path: ObjectFacts(checksum=RIGHT) for stored in listing.objects}
    return world


def logged(world: World, kind: type) -> list[Any]:
    return [effect for effect in world.log if isinstance(effect, kind)]


def until(world: World, kind: type) -> effects.Effect:
    """End jobs until one of this kind is there."""
    for _ in range(1000):
        found = [job for job in world.jobs if isinstance(job, kind)]
        if found:
            return found[0]
        world.end(world.jobs[0])
    raise AssertionError(kind)


def read_header(world: World) -> effects.ReadHeader:
    """Let all go on until a header is to be read; return that job."""
    reading = until(world, effects.ReadHeader)
    assert isinstance(reading, effects.ReadHeader)
    return reading


def refuse(world: World, reading: effects.ReadHeader) -> None:
    world.jobs.remove(reading)
    world.post(events.HeaderRefused(reading.file, HeaderError("no JSON")))


def test_each_file_is_asked_about_once_and_checked():
    world = checked_world()
    world.run()

    assert world.status("m")["state"] == "resident"
    assert world.status("m")["verified"] == "sha256"
    assert len(logged(world, effects.Describe)) == 2
    assert {look.algorithm for look in logged(world, effects.Looked)} == {"sha256"}


def test_files_that_are_checked_by_their_length_alone_are_told_of():
    world = checked_world()
    world.facts = {"a.safetensors": ObjectFacts(checksum=RIGHT)}
    world.run()

    assert world.status("m")["state"] == "resident"
    assert world.status("m")["verified"] == "sha256 length"


def test_a_file_that_two_versions_share_is_told_by_what_it_was_checked_once():
    world = checked_world()
    world.run()
    world.facts = {}
    world.listings["m"] = manifest(stored("a.safetensors", 8))
    world.ask(world.connect(), "refresh", model="m")
    world.run()

    assert world.status("m")["version"] == world.listings["m"].version
    assert world.status("m")["verified"] == "sha256"


def crc_world(size_blocks: int = 8, **more: object) -> World:
    listing = manifest(stored("a.safetensors", size_blocks))
    world = checked_world(listing, can_check=frozenset({"crc32"}), **more)
    (file,) = listing.objects
    world.facts = {file.path: ObjectFacts(checksum=right_crc(file.size_bytes))}
    return world


def test_a_crc_is_computed_while_bytes_pass_and_only_what_came_before_is_read_back():
    world = crc_world(40)
    world.run()

    parts = [job.part for job in logged(world, effects.FetchPart)]
    passed = sum(part.stop - part.start for part in parts if part.algorithm == "crc32")
    checks = logged(world, effects.Check)
    assert world.status("m")["state"] == "resident"
    assert world.status("m")["verified"] == "crc32"
    assert {part.algorithm for part in parts} == {"", "crc32"}
    assert passed + sum(check.stop - check.start for check in checks) == 40 * BLOCK


def test_wrong_bytes_that_passed_are_fetched_once_more():
    world = crc_world(40)
    world.spoil = {(0, 39)}
    world.run()

    assert [each.is_final for each in logged(world, effects.Mismatched)] == [False]
    assert world.status("m")["state"] == "resident"
    gets = [job.part for job in logged(world, effects.FetchPart)]
    assert sum(part.stop - part.start for part in gets) == 2 * 40 * BLOCK


def test_wrong_bytes_that_passed_twice_fail_the_load():
    world = crc_world(40)
    world.spoil = {(0, 39)}
    while not logged(world, effects.Mismatched):
        world.end(world.jobs[0])
    world.spoil = {(0, 39)}
    peer, request = world.opened("m", until="ready")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "checksum_mismatch"
    # of the file as a whole, not of the part whose sum came last
    told = [each[2:] for each in logged(world, effects.Mismatched)]
    assert told == [("crc32", 0, 40 * BLOCK, False), ("crc32", 0, 40 * BLOCK, True)]
    assert f"bytes 0 to {40 * BLOCK} were wrong twice" in str(answer.body["error"])
    world.leave(peer)


@pytest.mark.parametrize("error", [None, StoreUnavailable("it came")], ids=["too", "in vain"])
def test_what_the_slower_of_two_attempts_says_of_bytes_that_were_wrong_does_not_count(error):
    world = crc_world(40)
    world.spoil = {(0, 39)}
    last: list[effects.FetchPart] = []
    while not (len(world.jobs) == len(last) == 1 and last[0].part.stop == 40 * BLOCK):
        world.end(world.jobs[0])
        last = [job for job in world.jobs if isinstance(job, effects.FetchPart)]
    (first,) = last
    world.post(events.PartStalled(first.part, first.part.start, 9.0))
    late = next(job for job in world.jobs if job is not first)
    world.end(first)
    assert [each.is_final for each in logged(world, effects.Mismatched)] == [False]
    world.end(late, error=error)
    world.run()

    assert world.status("m")["state"] == "resident"
    assert [each.is_final for each in logged(world, effects.Mismatched)] == [False]


def test_the_first_get_is_not_behind_a_look():
    world = checked_world(slots=1)

    assert isinstance(until(world, effects.FetchPart), effects.FetchPart)
    assert not logged(world, effects.Describe)


def test_nothing_is_published_before_the_sums_are_right():
    world = checked_world()
    check = until(world, effects.Check)
    for job in [job for job in world.jobs if not isinstance(job, effects.Check)]:
        world.end(job)
    while others := [job for job in world.jobs if not isinstance(job, effects.Check)]:
        world.end(others[0])

    assert world.status("m")["state"] == "loading"
    assert check in world.jobs
    world.run()
    assert world.status("m")["state"] == "resident"


def test_a_wrong_byte_is_fetched_once_more_and_who_reads_early_keeps_his_view():
    world = checked_world()
    world.spoil = {(0, 3)}
    peer, request = world.opened("m")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code is None
    assert world.status("m")["state"] == "resident"
    mismatched = logged(world, effects.Mismatched)
    assert [(each.path, each.is_final) for each in mismatched] == [("a.safetensors", False)]
    gets = [job.part for job in logged(world, effects.FetchPart) if job.part.file.index == 0]
    assert sum(part.stop - part.start for part in gets) == 2 * 8 * BLOCK
    world.leave(peer)


@pytest.mark.parametrize("is_slow", [False, True], ids=["read before", "read after"])
def test_a_header_that_came_with_wrong_bytes_is_read_anew(is_slow: bool):
    world = checked_world(manifest(stored("a.safetensors", 2)))
    world.spoil = {(0, 0)}
    reading = read_header(world)
    if not is_slow:
        world.end(reading)
    while not logged(world, effects.Mismatched):
        world.end(next(job for job in world.jobs if job is not reading))
    assert world.status("m")["headers"] is False
    if is_slow:
        world.end(reading)
        assert world.status("m")["headers"] is False
    world.run()

    assert world.status("m")["state"] == "resident"
    assert len(logged(world, effects.ReadHeader)) == 2


@pytest.mark.parametrize("verify", ["off", "checksum"])
def test_a_header_that_cannot_be_read_is_fetched_once_more(verify):
    world = checked_world(manifest(stored("a.safetensors", 2)), verify=verify)
    refuse(world, read_header(world))
    world.run()

    assert [each.algorithm for each in logged(world, effects.Mismatched)] == ["header"]
    assert world.status("m")["state"] == "resident"
    assert world.status("m")["headers"] is True


def test_bytes_that_are_found_wrong_while_their_header_is_fetched_again_are_in_flight_once():
    world = crc_world(2)
    world.spoil = {(0, 0)}
    reading = read_header(world)
    while not logged(world, effects.Check):
        world.end(next(job for job in world.jobs if job is not reading))
    refuse(world, reading)
    assert world.job(effects.FetchPart)
    world.end(world.job(effects.Check))

    assert [each.algorithm for each in logged(world, effects.Mismatched)] == ["header", "crc32"]
    assert len([job for job in world.jobs if isinstance(job, effects.FetchPart)]) == 1
    world.run()
    assert world.status("m")["state"] == "resident"
    assert world.status("m")["headers"] is True


def test_a_staller_is_cancelled_when_the_other_attempt_fails_after_the_last_byte():
    world = checked_world(manifest(stored("a.safetensors", 4)), verify="off")
    until(world, effects.FetchPart)
    first = world.job(effects.FetchPart)
    assert isinstance(first, effects.FetchPart)
    world.post(events.PartStalled(first.part, first.part.start, 9.0))
    world.end(first, error=StoreUnavailable("reset"), blocks=4)

    cancelled = [each.part_id for each in logged(world, effects.CancelParts)]
    assert cancelled == [first.part.part_id]
    world.run()
    assert world.status("m")["state"] == "resident"


def test_a_header_that_cannot_be_read_twice_fails_the_load():
    world = checked_world(manifest(stored("a.safetensors", 2)), verify="off")
    _, request = world.opened("m")
    refuse(world, read_header(world))
    refuse(world, read_header(world))
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "load_failed"
    assert len(logged(world, effects.Mismatched)) == 1


def test_a_header_that_was_found_right_and_cannot_be_read_fails_the_load_at_once():
    world = checked_world(manifest(stored("a.safetensors", 2)), verify="checksum")
    reading = read_header(world)
    while others := [job for job in world.jobs if job is not reading]:
        world.end(others[0])
    refuse(world, reading)

    assert world.status("m")["state"] != "loading"
    assert logged(world, effects.Mismatched) == []


def test_a_header_of_wrong_bytes_that_cannot_be_read_is_no_failure_once_they_are_known():
    world = checked_world(manifest(stored("a.safetensors", 2)))
    world.spoil = {(0, 0)}
    reading = read_header(world)
    while not logged(world, effects.Mismatched):
        world.end(next(job for job in world.jobs if job is not reading))
    refuse(world, reading)
    world.run()

    assert world.status("m")["state"] == "resident"


def test_bytes_that_are_wrong_twice_fail_the_load_with_the_file_and_the_algorithm():
    world = checked_world()
    world.spoil = {(0, 3)}
    _, request = world.opened("m", until="ready")
    for _ in range(1000):
        if not world.jobs:
            break
        world.end(world.jobs[0])
        if any(not each.is_final for each in logged(world, effects.Mismatched)):
            world.spoil.add((0, 3))

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "checksum_mismatch"
    error = str(answer.body["error"])
    assert "a.safetensors" in error
    assert "sha256" in error
    assert [each.is_final for each in logged(world, effects.Mismatched)] == [False, True]
    assert not world.there


def test_a_look_that_fails_is_tried_again():
    world = checked_world()
    look = until(world, effects.Describe)
    world.end(look, error=StoreUnavailable("503"))
    world.run()
    world.sleep(1)
    world.run()

    assert world.status("m")["state"] == "resident"


def test_a_look_that_fails_for_good_fails_the_load():
    world = checked_world()
    world.end(until(world, effects.Describe), error=ObjectChanged("412"))

    assert world.status("m")["state"] == "failed"


def test_looks_take_slots_as_gets_do():
    world = checked_world(slots=2)
    for _ in range(200):
        if not world.jobs:
            break
        kinds = effects.FetchPart | effects.Describe
        assert len([job for job in world.jobs if isinstance(job, kinds)]) <= 2
        world.end(world.jobs[-1])


def test_parts_are_wide_where_each_get_costs_a_call_of_kms():
    big = manifest(stored("a.safetensors", 1200))
    for has_bucket_key in (False, True):
        world = checked_world(big, slots=1)
        facts = ObjectFacts(RIGHT, None, "aws:kms", "key", has_bucket_key)
        world.facts = {"a.safetensors": facts}
        world.run()

        longest = max(job.part.stop - job.part.start for job in logged(world, effects.FetchPart))
        assert (longest > 8 << 20) == (not has_bucket_key)


def digests_of(listing, wrong: set[int] = frozenset()) -> Digests:  # type: ignore[assignment]
    files = {}
    for stored_object in listing.objects:
        count = stored_object.size_bytes // BLOCK
        blocks = tuple((1 if at in wrong else 0).to_bytes(32) for at in range(count))
        files[stored_object.path] = FileDigests(stored_object.size_bytes, bytes(32), blocks)
    return Digests(BLOCK, files)


def test_with_digests_nothing_is_granted_before_its_block_matched():
    world = checked_world(LISTED, verify="digest")
    world.digests = digests_of(LISTED)
    _, request = world.opened("m")
    until(world, effects.ReadDigests)
    while others := [job for job in world.jobs if not isinstance(job, effects.ReadDigests)]:
        world.end(others[0])
    before = world.answer(request)
    world.run()

    assert before is None
    answer = world.answer(request)
    assert answer is not None
    assert answer.code is None
    assert world.status("m")["verified"] == "digest"
    assert not logged(world, effects.Describe)


def test_a_header_whose_block_is_longer_than_the_first_get_is_waited_for_by_nothing():
    listing = manifest(stored("a.safetensors", 40), stored("cached.manifest.json", 1))
    world = checked_world(listing, verify="digest")
    sums = (bytes(32), bytes(32))
    files = {"a.safetensors": FileDigests(40 * BLOCK, bytes(32), sums)}
    world.digests = Digests(32 * BLOCK, files)
    _, request = world.opened("m")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code is None
    assert world.status("m")["state"] == "resident"


def test_blocks_longer_than_what_comes_before_a_header_are_fetched_whole():
    """A header is read once its block matched, and the rest of a file comes after its header."""
    listing = manifest(*(stored(f"{name}.safetensors", 64) for name in "abc"), LISTED.objects[1])
    world = checked_world(listing, verify="digest", slots=1)
    block_bytes = 8 * BLOCK
    files = {
        each.path: FileDigests(each.size_bytes, bytes(32), (bytes(32),) * 8)
        for each in listing.objects
    }
    world.digests = Digests(block_bytes, files)
    _, request = world.opened("m")
    while world.answer(request) is None:
        world.end(world.jobs[0])
    come = {(file.index, block) for file, block in world.fetched}
    world.run()

    assert world.status("m")["state"] == "resident"
    first = {(index, block) for index in range(3) for block in range(8)}
    assert first <= come
    assert max(block for _, block in come) < 40, "no file is whole before the others' headers"


def test_without_a_list_verify_by_digest_refuses_the_model_and_says_what_to_do():
    world = checked_world(ONE, verify="digest")
    _, request = world.opened("m")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "load_failed"
    assert "cached digest s3://" in str(answer.body["error"])


def test_without_a_list_a_directory_without_a_slash_is_told_to_write_one():
    world = checked_world(ONE._replace(uri="file:///srv/m"), verify="digest")
    _, request = world.opened("m")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert "cached digest file:///srv/m" in str(answer.body["error"])


def test_a_list_that_does_not_fit_the_model_refuses_it():
    world = checked_world(LISTED, verify="digest")
    world.digests = Digests(BLOCK, {})
    _, request = world.opened("m")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "load_failed"


def failed_by(world: World) -> str:
    """Let all end; return the hint that who waits for the model is given."""
    _, request = world.opened("m", until="ready")
    world.run()
    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "checksum_mismatch"
    error = answer.body["error"]
    assert isinstance(error, dict)
    return str(error["hint"])


def test_bytes_that_are_not_what_the_list_says_are_refused_with_what_to_do():
    world = checked_world(LISTED, verify="digest")
    world.digests = digests_of(LISTED, wrong={3})

    assert "cached digest s3://bucket/m/" in failed_by(world)


def test_bytes_that_are_not_what_the_store_says_are_refused_with_what_to_do():
    world = checked_world()
    other = RIGHT.replace("AAAA", "BBBB", 1)
    world.facts = {stored.path: ObjectFacts(checksum=other) for stored in ONE.objects}

    assert "upload the file again" in failed_by(world)
