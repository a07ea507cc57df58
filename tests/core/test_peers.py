"""What a peer waits for is bounded, and given up with the request; a kept error stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cached.core import effects, wire
from cached.core.errors import BadRequest, LoadFailed
from cached.core.objects import PeerId, Range
from cached.core.peers import Peer, Waiter, refusal
from tests.fakes.world import BLOCK, OWNER, World, load_of, manifest, stored

if TYPE_CHECKING:
    from cached.core.loads import Load

ONE = manifest(stored("b.txt", 40))


def leasing() -> tuple[Peer, Load]:
    load = load_of(ONE)
    peer = Peer(OWNER)
    peer.lease = load
    return peer, load


def waiter(op: str, wants: list[tuple[int, Range]]) -> Waiter:
    return Waiter(PeerId(1), 1, op, lambda: None, wants)


def test_what_was_wanted_is_given_up_with_the_request():
    peer, load = leasing()
    wants = [(0, Range(0, 1)), (0, Range(5, 9))]
    peer.want(load, wants)
    wanted = load.planner.has_wants
    peer.ended(waiter("wait", wants))
    assert (wanted, load.planner.has_wants, peer.ranges) == (True, False, 0)


def test_a_refused_want_changes_nothing():
    peer, load = leasing()
    for wants in ([(0, Range(0, 1)), (1, Range(0, 1))], [(0, Range(0, 41 * BLOCK))]):
        with pytest.raises(BadRequest):
            peer.want(load, wants)
    with pytest.raises(BadRequest, match="ranges already"):
        peer.want(load, [(0, Range(0, 1))] * (wire.MAX_RANGES_WAITING + 1))
    assert (peer.ranges, load.planner.has_wants) == (0, False)


def test_after_an_open_another_may_follow():
    peer = Peer(OWNER)
    peer.is_opening = True
    peer.ended(waiter("open", []))
    assert not peer.is_opening


def test_an_error_that_is_kept_gains_no_traceback_however_often_it_is_told():
    """Each raise would add to it, and keep what the frames hold."""
    error = LoadFailed("the store said no")
    assert refusal(error) == (wire.error_body(error), ())

    world = World({"m": manifest(stored("a.safetensors", 40))}, slots=1)
    peer, request = world.opened("m")
    while world.answer(request) is None:
        world.end(world.jobs[0])
    (load,) = [model.coming for model in world.engine._shelf.models.values()]
    assert load is not None
    while load.error is None:
        world.end(world.job(effects.FetchPart), error=error)
    answers = [world.answer(world.ask(peer, "wait", ranges="all")) for _ in range(3)]
    assert [answer and answer.code for answer in answers] == ["load_failed"] * 3
    assert load.error.__traceback__ is None
