"""The status reply: every member of docs/wire.md, as plain JSON."""

from __future__ import annotations

import json

from tests.fakes.world import BLOCK, World, manifest, stored

ONE = manifest(stored("a.safetensors", 3), stored("b.txt", 1))
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
