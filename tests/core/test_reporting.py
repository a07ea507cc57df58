"""The status reply: every member of docs/wire.md, as plain JSON."""

from __future__ import annotations

import json

from cached.core import effects
from cached.core.objects import Left, VersionRef
from tests.fakes.world import BLOCK, World, manifest, stored

ONE = manifest(stored("a.safetensors", 3), stored("b.txt", 1))
LEFT = Left(
    of=VersionRef("m", ONE.version, 1),
    manifest=ONE,
    path="/models/m",
    is_published=True,
    is_current=True,
    size_bytes=ONE.size_bytes,
    is_trusted=True,
)
MODEL = {
    "name",
    "uri",
    "state",
    "version",
    "size_bytes",
    "committed_bytes",
    "files",
    "headers",
    "leases",
    "opens",
    "passed_over",
    "path",
    "pinned",
    "load_s",
    "error",
    "confirmed",
    "refreshing",
    "waits_for_room",
    "verified",
    "versions",
}


def test_a_resident_model_is_reported_whole():
    world = World({"m": ONE, "n": ONE}, prefetch=["m"])
    world.run()

    status = world.status("m")

    assert set(status) == MODEL
    assert status["state"] == "resident"
    assert status["committed_bytes"] == status["size_bytes"] == 4 * BLOCK
    assert status["version"] == ONE.version
    assert world.status("n")["state"] == "absent"


def test_status_is_json_and_has_the_memory():
    world = World({"m": ONE}, budget_bytes=9 * BLOCK, prefetch=["m"])
    world.run()

    answer = world.answer(world.ask(world.connect(), "status"))

    assert answer is not None
    body = json.loads(json.dumps(answer.body))
    assert body["memory"] == {
        "budget_bytes": 9 * BLOCK,
        "reserved_bytes": 0,
        "committed_bytes": 4 * BLOCK,
        "leased_bytes": 0,
        "free_bytes": 5 * BLOCK,
    }
    assert body["ready"] is True


def test_a_model_on_its_way_out_is_freeing():
    world = World({"m": ONE}, prefetch=["m"])
    world.run()

    world.ask(world.connect(), "evict", model="m")

    assert world.status("m")["state"] == "freeing"
    world.run()
    assert world.status("m")["state"] == "absent"


def test_only_what_an_earlier_daemon_left_is_unconfirmed():
    world = World({"m": ONE}, left=[LEFT])
    while world.jobs:
        world.run_one()
    before = world.status("m")["confirmed"]
    world.ask(world.connect(), "evict", model="m")
    world.run()
    gone = world.status("m")
    world.ask(world.connect(), "prefetch", model="m")
    while not any(isinstance(job, effects.FetchPart) for job in world.jobs):
        world.run_one()

    assert before is False
    assert (gone["state"], gone["version"], gone["confirmed"]) == ("absent", None, True)
    assert world.status("m")["confirmed"] is True, "the store has just named it"


def test_each_version_counts_what_it_shares_and_the_model_counts_it_once():
    newer = manifest(stored("a.safetensors", 3, etag='"2"'), stored("b.txt", 1))
    world = World({"m": ONE}, prefetch=["m"], kept_versions=1)
    world.run()
    world.listings["m"] = newer
    world.ask(world.connect(), "refresh", model="m")
    world.run()

    status = world.status("m")
    versions = status["versions"]
    assert isinstance(versions, list)
    assert [each["version"] for each in versions] == [newer.version, ONE.version]
    assert [each["committed_bytes"] for each in versions] == [4 * BLOCK, 4 * BLOCK]
    assert status["committed_bytes"] == 7 * BLOCK


def test_only_what_was_loaded_took_time():
    world = World({"m": ONE, "n": ONE}, prefetch=["n"], left=[LEFT])
    world.run()

    assert world.status("m")["state"] == world.status("n")["state"] == "resident"
    assert world.status("m")["load_s"] is None
    assert world.status("n")["load_s"] == 0.0, "time stands still"


def test_a_new_version_that_waits_for_room_beside_what_others_hold_is_told_so():
    newer = manifest(stored("a.safetensors", 3, etag='"2"'), stored("b.txt", 1))
    world = World({"m": ONE}, budget_bytes=6 * BLOCK, prefetch=["m"])
    world.run()
    peer, _ = world.opened("m")
    before = world.status("m")["waits_for_room"]
    world.listings["m"] = newer
    world.ask(world.connect(), "refresh", model="m")
    world.run()
    waiting = world.status("m")

    world.leave(peer)
    world.run()
    after = world.status("m")

    assert before is False
    assert (waiting["waits_for_room"], waiting["refreshing"]) == (True, True)
    assert "needs" in str(waiting["error"])
    assert waiting["version"] == ONE.version
    assert (after["waits_for_room"], after["version"]) == (False, newer.version)
