"""What the operator asks is answered; who may not, is refused. See test_leaving, test_listing."""

from __future__ import annotations

import pytest

from tests.fakes.world import World, manifest, stored

ONE = manifest(stored("a.safetensors", 8))


@pytest.mark.parametrize("op", ["prefetch", "evict", "refresh", "purge"])
@pytest.mark.parametrize(("uid", "may"), [(0, True), (1000, True), (1001, False)])
def test_changes_are_for_the_owner_and_root(op, uid, may):
    world = World({"m": ONE}, prefetch=["m"])
    world.run()
    request = world.ask(world.connect(uid=uid), op, model="m")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == (None if may else "not_permitted")


def test_status_is_for_everybody_and_tells_of_the_gets():
    world = World({"m": ONE}, slots=4)
    answer = world.answer(world.ask(world.connect(uid=7), "status"))

    assert answer is not None
    assert answer.body["gets"] == {"in_flight": 0, "window": 4}


@pytest.mark.parametrize("op", ["status", "prefetch", "evict", "refresh"])
def test_an_unknown_model_is_named_with_those_that_are_known(op):
    world = World({"m": ONE})
    answer = world.answer(world.ask(world.connect(), op, model="n"))

    assert answer is not None
    assert answer.code == "model_unknown"
    assert "known are m" in str(answer.body["error"])


def test_an_unknown_version_to_go_back_to_changes_nothing():
    world = World({"m": ONE}, prefetch=["m"])
    world.run()

    answer = world.answer(world.ask(world.connect(), "refresh", model="m", version="x"))

    assert answer is not None
    assert answer.code == "version_unknown"
    assert world.status("m")["state"] == "resident"
