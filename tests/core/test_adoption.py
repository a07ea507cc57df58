"""What an earlier daemon left goes on without a GET, or goes; all of it counts."""

from __future__ import annotations

from typing import Any

import pytest

from cached.core import effects, events
from cached.core.errors import LoadFailed
from cached.core.objects import FileRef, Left, Manifest, ObjectFacts, Range, VersionRef
from tests.fakes.world import BLOCK, RIGHT, World, manifest, stored

URI = "s3://bucket/m/"
ONE = manifest(stored("a.safetensors", 8), stored("b.safetensors", 4), uri=URI)
TWO = manifest(stored("a.safetensors", 8, etag='"2"'), stored("b.safetensors", 4), uri=URI)
ELSEWHERE = manifest(stored("a.safetensors", 8), uri="s3://bucket/elsewhere/")
CAN = frozenset({"sha256"})


def left(listing: Manifest | None, load: int = 1, **more: object) -> Left:
    version = listing.version if listing else "broken"
    facts = {"is_published": True, "is_current": True, "is_trusted": True} | more
    size_bytes = facts.pop("size_bytes", listing.size_bytes if listing else 3 * BLOCK)
    of = VersionRef(str(facts.pop("name", "m")), version, load)
    return Left(of=of, manifest=listing, path=f"/models/{of}", size_bytes=size_bytes, **facts)  # type: ignore[arg-type]


def gets(world: World) -> int:
    return sum(isinstance(effect, effects.FetchPart) for effect in world.log)


def test_a_complete_version_is_served_before_the_store_has_said_anything():
    world = World({"m": ONE}, prefetch=["m"], left=[left(ONE)], verify="checksum", can_check=CAN)
    while world.jobs:
        world.end(world.jobs[0])
    _, request = world.opened("m", until="ready")

    answer = world.answer(request)
    assert answer is not None
    assert answer.body["complete"] is True
    assert world.status("m")["confirmed"] is False
    world.run()
    assert world.status("m")["confirmed"] is True
    assert gets(world) == 0


def test_a_complete_version_is_adopted_though_it_is_not_prefetched():
    world = World({"m": ONE}, left=[left(ONE)])
    world.run()

    assert world.status("m")["state"] == "resident"
    assert gets(world) == 0


def test_a_store_that_does_not_answer_leaves_it_unconfirmed_and_served():
    world = World({"m": ONE}, left=[left(ONE)])
    del world.listings["m"]
    world.run()

    assert world.status("m")["state"] == "resident"
    assert world.status("m")["confirmed"] is False


def test_another_version_in_the_store_is_fetched_beside_it():
    world = World({"m": TWO}, left=[left(ONE)])
    world.run()

    assert world.status("m")["version"] == TWO.version
    assert {file.index for file, _ in world.fetched} == {0}, "b.safetensors did not change"


def test_half_a_version_goes_on_where_it_stopped():
    world = World({"m": ONE}, prefetch=["m"], left=[left(ONE, is_published=False)])
    world.half = {(0, block) for block in range(6)} | {(1, block) for block in range(4)}
    world.run()

    assert world.status("m")["state"] == "resident"
    assert {block for file, block in world.fetched if file.index == 0} == {6, 7}
    assert not [file for file, _ in world.fetched if file.index == 1]


def test_half_a_version_of_a_model_that_is_not_prefetched_goes():
    world = World({"m": ONE}, left=[left(ONE, is_published=False)])
    world.run()

    assert not world.sizes
    assert gets(world) == 0


def test_what_nobody_knows_how_to_use_goes_and_counts_until_it_is_gone():
    going = [
        left(None, load=1),
        left(ELSEWHERE, load=2),
        left(ONE, load=3, name="not configured"),
    ]
    world = World({"m": ONE}, left=going, budget_bytes=40 * BLOCK)
    peer = world.connect()
    answer = world.answer(world.ask(peer, "status"))
    assert answer is not None
    memory = answer.body["memory"]
    assert isinstance(memory, dict)
    world.run()

    assert memory["free_bytes"] == (40 - 3 - 8 - 12) * BLOCK
    assert not world.sizes


def test_the_current_version_is_offered_and_the_other_kept_or_freed():
    two = [left(ONE, load=1), left(TWO, load=2, is_current=False)]
    world = World({"m": ONE}, left=two)
    world.run()
    keeping = World({"m": ONE}, left=two, kept_versions=1)
    keeping.run()

    assert [of.version for of in world.there] == [ONE.version]
    assert [of.version for of in keeping.there] == [ONE.version, TWO.version]
    assert keeping.status("m")["version"] == ONE.version
    assert states(keeping) == {ONE.version: "current", TWO.version: "kept"}
    assert keeping.current["m"].version == ONE.version


def states(world: World) -> dict[object, object]:
    versions = world.status("m")["versions"]
    assert isinstance(versions, list)
    return {one["version"]: one["state"] for one in versions}


def test_one_can_go_back_to_what_was_kept_without_a_get():
    two = [left(ONE, load=1, is_current=False), left(TWO, load=2)]
    world = World({"m": TWO}, left=two, kept_versions=1)
    world.run()
    world.ask(world.connect(), "refresh", model="m", version=ONE.version)
    world.run()

    assert world.status("m")["version"] == ONE.version
    assert states(world) == {ONE.version: "current", TWO.version: "kept"}
    assert gets(world) == 0


def test_what_the_operator_went_back_from_does_not_come_again_by_itself():
    found = [
        left(ONE, load=1, passed_over=(TWO.version,)),
        left(TWO, load=2, is_current=False),
    ]
    world = World({"m": TWO}, left=found, prefetch=["m"])
    world.run()
    is_confirmed = world.status("m")["confirmed"]
    _, request = world.opened("m", version=TWO.version)
    world.run()
    refused = world.answer(request)
    went_back = world.status("m")["version"]
    world.ask(world.connect(), "refresh", model="m")
    world.run()

    assert is_confirmed is True
    assert refused is not None
    assert refused.code == "version_unknown"
    assert went_back == ONE.version
    assert world.status("m")["version"] == TWO.version


def test_only_the_record_of_the_current_version_counts():
    found = [left(ONE, load=1), left(TWO, load=2, is_current=False, passed_over=(ONE.version,))]
    world = World({"m": ONE}, left=found)
    world.run()

    assert [e.passed_over for e in world.log if isinstance(e, effects.Publish)] == [(), ()]


def test_going_back_waits_until_all_that_was_left_is_opened():
    two = [left(ONE, load=1, is_current=False), left(TWO, load=2)]
    world = World({"m": TWO}, left=two, kept_versions=1)
    request = world.ask(world.connect(), "refresh", model="m", version=ONE.version)
    refused = world.answer(request)
    world.run()

    assert refused is not None
    assert refused.code == "daemon_unavailable"
    assert states(world) == {ONE.version: "kept", TWO.version: "current"}


def test_a_worker_of_the_dead_daemon_gets_the_version_again_that_it_had():
    two = [left(ONE, load=1, is_current=False), left(TWO, load=2)]
    world = World({"m": TWO}, left=two)
    _, request = world.opened("m", version=ONE.version)
    early = world.answer(request)
    world.run()
    answer = world.answer(request)

    assert early is None
    assert answer is not None
    assert answer.body["version"] == ONE.version
    assert gets(world) == 0


def test_versions_that_share_a_file_are_counted_once_and_by_the_one_that_stays():
    inodes = {ONE.version: ((1, 1), (1, 2)), TWO.version: ((1, 3), (1, 2))}
    two = [
        left(ONE, 1, is_current=False, inodes=inodes[ONE.version], size_bytes=8 * BLOCK),
        left(TWO, load=2, inodes=inodes[TWO.version]),
    ]
    world = World({"m": TWO}, left=two, kept_versions=1, budget_bytes=20 * BLOCK)
    world.run()
    both = world.engine._shelf.ledger.used_bytes
    world.ask(world.connect(), "refresh", model="m", version=ONE.version)
    world.run()

    assert both == sum(world.sizes.values()) == 20 * BLOCK


def test_a_kept_version_that_turns_out_changed_goes_and_the_current_one_stays():
    two = [left(ONE, load=1, is_current=False), left(TWO, load=2)]
    world = World({"m": TWO}, left=two, kept_versions=1)
    while not (isinstance(world.jobs[0], effects.CreateSegments) and world.jobs[0].of == two[0].of):
        world.run_one()
    world.jobs.pop(0)
    world.post(events.SegmentsFailed(two[0].of, LoadFailed("changed")))
    world.run()

    assert world.status("m")["state"] == "resident"
    assert world.status("m")["confirmed"] is True
    assert states(world) == {TWO.version: "current"}
    assert set(world.sizes) == {two[1].of}


def test_what_is_evicted_while_it_is_taken_over_goes_whole():
    two = [left(ONE, load=1, is_current=False), left(TWO, load=2)]
    world = World({"m": TWO}, left=two, kept_versions=1)
    request = world.ask(world.connect(), "evict", model="m")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.body == {"freed_bytes": 24 * BLOCK}
    assert not world.sizes


def test_half_a_newer_version_goes_on_beside_the_current_one():
    found = [
        left(ONE, load=1, inodes=((1, 1), (1, 2))),
        left(TWO, load=2, is_published=False, is_current=False, inodes=((1, 3), (1, 2))),
    ]
    world = World({"m": TWO}, left=found)
    world.half = {(0, block) for block in range(6)} | {(1, block) for block in range(4)}
    world.run()

    assert world.status("m")["version"] == TWO.version
    assert sorted((file.index, block) for file, block in world.fetched) == [(0, 6), (0, 7)]
    assert world.status("m")["confirmed"] is True


def test_half_a_version_that_the_store_has_no_more_goes():
    found = [left(ONE, load=1), left(TWO, load=2, is_published=False, is_current=False)]
    world = World({"m": ONE}, left=found)
    world.run()

    assert set(world.sizes) == {found[0].of}
    assert gets(world) == 0


def test_half_a_version_stays_while_the_store_does_not_answer_and_is_not_waited_for():
    found = [left(ONE, load=1), left(TWO, load=2, is_published=False, is_current=False)]
    world = World({"m": ONE}, left=found)
    del world.listings["m"]
    world.run()
    _, request = world.opened("m", version=TWO.version)
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "version_unknown"
    assert set(world.sizes) == {each.of for each in found}


def test_what_is_left_counts_as_on_pages_before_it_is_opened():
    whole = tuple((Range(0, file.size_bytes),) for file in ONE.objects)
    part = ((Range(0, 6 * BLOCK),), (Range(BLOCK, 2 * BLOCK),))
    found = [
        left(ONE, load=1, there=whole),
        left(TWO, load=2, is_published=False, is_current=False, there=part),
        left(None, load=3),
    ]
    world = World({"m": ONE}, left=found)
    before = memory_of(world)
    del world.listings["m"]
    world.run()

    assert (before["committed_bytes"], before["reserved_bytes"]) == (22 * BLOCK, 5 * BLOCK)
    versions = world.status("m")["versions"]
    assert isinstance(versions, list)
    assert [each["committed_bytes"] for each in versions] == [12 * BLOCK, 7 * BLOCK]
    assert memory_of(world)["committed_bytes"] == 19 * BLOCK, "what is of no use has gone"


def test_what_is_left_does_not_take_from_the_machine_twice():
    other = manifest(stored("o.safetensors", 8), uri="s3://bucket/o/")
    world = World({"o": other}, left=[left(ONE)], available_bytes=8 * BLOCK)
    _, request = world.opened("o")
    world.end(world.job(effects.Resolve))  # before the memory of the other is back

    assert world.answer(request) is None
    assert any(isinstance(job, effects.CreateSegments) for job in world.jobs)


def memory_of(world: World) -> dict[str, int]:
    answer = world.answer(world.ask(world.connect(), "status"))
    assert answer is not None
    memory = answer.body["memory"]
    assert isinstance(memory, dict)
    return memory


def test_half_a_version_makes_room_for_who_is_asked_for():
    found = [left(ONE, load=1), left(TWO, load=2, is_published=False, is_current=False)]
    other = manifest(stored("o.safetensors", 8), uri="s3://bucket/o/")
    world = World({"m": ONE, "o": other}, left=found, budget_bytes=26 * BLOCK)
    del world.listings["m"]
    world.run()
    _, request = world.opened("o")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code is None
    assert found[1].of not in world.sizes
    assert world.status("m")["state"] == "resident"


def test_a_prefetch_waits_for_what_is_taken_over_to_be_of_no_use():
    two = [left(ONE, load=1, is_current=False), left(TWO, load=2)]
    other = manifest(stored("o.safetensors", 8), uri="s3://bucket/o/")
    world = World({"m": TWO, "o": other}, left=two, prefetch=["m", "o"], budget_bytes=24 * BLOCK)
    world.end(world.job(effects.Resolve))  # of the other: before anything is opened
    world.run()

    assert world.status("o")["state"] == "resident"
    assert not [effect for effect in world.log if isinstance(effect, effects.Refused)]


def test_a_version_that_is_mapped_by_a_worker_of_the_dead_daemon_counts_on():
    world = World({"m": TWO}, left=[left(ONE, load=1, is_current=False), left(TWO, load=2)])
    old = VersionRef("m", ONE.version, 1)
    world.mapped.add(old)
    world.run()
    counted = old in world.sizes
    world.mapped.clear()
    world.sleep(1)
    world.run()

    assert counted
    assert old not in world.sizes


def test_what_does_not_fit_the_budget_any_more_goes(monkeypatch):
    world = World({"m": ONE}, left=[left(ONE)], budget_bytes=12 * BLOCK)
    world.run()
    with monkeypatch.context() as patched:
        patched.setattr(World, "check", lambda self: None)  # it is there already, and goes
        smaller = World({"m": ONE}, left=[left(ONE)], budget_bytes=11 * BLOCK)
        smaller.run()

    assert world.status("m")["state"] == "resident"
    assert smaller.status("m")["state"] == "absent"


@pytest.mark.parametrize("pinned", [(), ("m",)])
def test_what_fits_goes_on_though_another_model_does_not_fit_any_more(monkeypatch, pinned):
    """What had to go counted first, and everything after it had to go as well."""
    big = manifest(stored("a.safetensors", 20), uri="s3://bucket/big/")
    found = [left(big, name="big"), left(ONE)]
    monkeypatch.setattr(World, "check", lambda self: None)  # it is there already, and goes
    world = World({"big": big, "m": ONE}, left=found, pinned=pinned, budget_bytes=12 * BLOCK)
    world.run()

    assert (world.status("big")["state"], world.status("m")["state"]) == ("absent", "resident")
    assert gets(world) == 0


def test_what_is_pinned_goes_on_before_what_is_not():
    other = manifest(stored("a.safetensors", 8), uri="s3://bucket/other/")
    found = [left(other, name="other"), left(ONE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "check", lambda self: None)  # it is there already, and goes
        listings = {"other": other, "m": ONE}
        world = World(listings, left=found, pinned=["m"], budget_bytes=12 * BLOCK)
        world.run()

    assert (world.status("other")["state"], world.status("m")["state"]) == ("absent", "resident")


def test_what_an_earlier_boot_left_is_read_only_when_it_was_checked():
    facts = {"a.safetensors": ObjectFacts(checksum=RIGHT)}
    world = World(
        {"m": ONE},
        prefetch=["m"],
        left=[left(ONE, is_trusted=False)],
        verify="checksum",
        can_check=CAN,
    )
    world.facts = facts
    world.run()

    assert world.status("m")["state"] == "resident"
    fetched = {file.index for file, _ in world.fetched}
    assert fetched == {1}, "what has no checksum is fetched anew"
    assert len([job for job in world.log if isinstance(job, effects.Check)]) == 1


def test_a_file_of_an_earlier_boot_that_turns_out_wrong_is_fetched_anew_to_its_end():
    found = left(ONE, is_trusted=False)
    world = World({"m": ONE}, prefetch=["m"], left=[found], verify="checksum", can_check=CAN)
    world.facts = {stored.path: ObjectFacts(checksum=RIGHT) for stored in ONE.objects}
    world.wrong = {(FileRef(found.of, 0), 7)}
    world.run()

    assert world.status("m")["state"] == "resident"
    assert sorted((file.index, block) for file, block in world.fetched) == [
        (0, block) for block in range(8)
    ]


def test_what_an_earlier_boot_left_goes_if_nothing_is_checked():
    world = World({"m": ONE}, left=[left(ONE, is_trusted=False)])
    world.run()

    assert not world.sizes


def test_new_loads_have_other_numbers_than_what_was_left():
    world = World({"m": TWO}, prefetch=["m"], left=[left(ONE, load=7, is_current=False)])
    world.run()

    assert {of.load for of in world.there} == {8}


def test_half_a_version_that_is_not_trusted_is_filled_though_its_header_is_not_read_yet():
    relic = left(ONE, is_published=False, is_trusted=False)
    world = World({"m": ONE}, prefetch=["m"], left=[relic], verify="checksum", can_check=CAN)
    world.half = {(0, 0)}
    world.facts = {file.path: ObjectFacts(checksum=RIGHT) for file in ONE.objects}
    world.run()

    assert world.status("m")["state"] == "resident"


@pytest.mark.parametrize("member", ["etag", "key", "size_bytes", "version_id"])
def test_a_description_that_does_not_add_up_goes(member: str):
    other: Any = 9 * BLOCK if member == "size_bytes" else "another"
    spoilt = (ONE.objects[0]._replace(**{member: other}), *ONE.objects[1:])
    world = World({"m": ONE}, prefetch=["m"], left=[left(ONE._replace(objects=spoilt))])
    world.run()

    assert world.status("m")["version"] == ONE.version
    assert not [effect for effect in world.log if isinstance(effect, effects.Adopted)]
    assert {file.index for file, _ in world.fetched} == {0, 1}


def test_a_version_without_a_list_of_digests_goes_where_they_are_asked_for():
    """It could never be checked: the store is asked what there is, and its list."""
    world = World({"m": ONE}, left=[left(ONE)], prefetch=["m"], verify="digest", can_check=CAN)
    world.run()

    status = world.status("m")
    assert (status["state"], world.sizes) == ("failed", {})
    assert "cached digest" in str(status["error"])


@pytest.mark.parametrize(
    ("told", "verified"),
    [(("crc32", "length"), "crc32 length"), (("digest", "digest"), "digest"), ((), "length")],
)
@pytest.mark.parametrize("verify", ["checksum", "off"])
def test_by_what_the_earlier_daemon_checked_is_told_on(
    verify: str, told: tuple[str, ...], verified: str
):
    world = World({"m": ONE}, left=[left(ONE, checked_by=told)], verify=verify, can_check=CAN)
    world.run()

    assert world.status("m")["verified"] == verified
    (publish,) = [effect for effect in world.log if isinstance(effect, effects.Publish)]
    assert publish.checked_by == (told or ("", ""))


def test_what_is_checked_anew_is_told_by_what_it_was_now():
    found = [left(ONE, is_trusted=False, checked_by=("crc32", "crc32"))]
    world = World({"m": ONE}, left=found, verify="checksum", can_check=CAN)
    world.facts = {stored.path: ObjectFacts(checksum=RIGHT) for stored in ONE.objects}
    world.run()

    assert world.status("m")["verified"] == "sha256"


def test_a_file_that_half_a_version_shares_was_checked_with_the_other():
    found = [
        left(ONE, load=1, inodes=((1, 1), (1, 2)), checked_by=("crc32", "sha256")),
        left(TWO, load=2, is_published=False, is_current=False, inodes=((1, 3), (1, 2))),
    ]
    world = World({"m": TWO}, left=found, verify="checksum", can_check=CAN)
    world.run()

    assert world.status("m")["version"] == TWO.version
    assert world.status("m")["verified"] == "sha256 length"
