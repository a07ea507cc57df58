"""What an earlier daemon left goes on without a GET, or goes; all of it counts."""

from __future__ import annotations

from typing import Any

import pytest

from cached.core import effects
from cached.core.objects import FileRef, Left, Manifest, ObjectFacts, VersionRef
from tests.fakes.world import BLOCK, RIGHT, World, manifest, stored

URI = "s3://bucket/m/"
ONE = manifest(stored("a.safetensors", 8), stored("b.safetensors", 4), uri=URI)
TWO = manifest(stored("a.safetensors", 8, etag='"2"'), stored("b.safetensors", 4), uri=URI)
ELSEWHERE = manifest(stored("a.safetensors", 8), uri="s3://bucket/elsewhere/")
CAN = frozenset({"sha256"})


def left(listing: Manifest | None, load: int = 1, **more: object) -> Left:
    version = listing.version if listing else "broken"
    facts = {"is_published": True, "is_current": True, "is_trusted": True} | more
    size_bytes = listing.size_bytes if listing else 3 * BLOCK
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


def test_of_two_versions_the_current_one_goes_on():
    two = [left(ONE, load=1), left(TWO, load=2, is_current=False)]
    world = World({"m": ONE}, left=two)
    world.run()

    assert [of.version for of in world.there] == [ONE.version]


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
