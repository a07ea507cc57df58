"""What a peer waits for is bounded, and given up with the request; a kept error stays as it is."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from cached.core import effects, wire
from cached.core.errors import BadRequest, LoadFailed
from cached.core.objects import PeerId, Range
from cached.core.peers import COST, MAX_WAITING, Peer, Waiter, refusal
from cached.core.shares import Shares
from tests.fakes.world import BLOCK, OWNER, World, load_of, manifest, stored

if TYPE_CHECKING:
    from cached.core.loads import Load

ONE = manifest(stored("b.txt", 40))


def leasing(waiting: Shares | None = None) -> tuple[Peer, Load]:
    load = load_of(ONE)
    peer = Peer((OWNER, 1), waiting or Shares(MAX_WAITING))
    peer.lease = load
    return peer, load


def waiter(op: str, wants: list[tuple[int, Range]]) -> Waiter:
    return Waiter(PeerId(1), 1, op, lambda: None, wants)


def test_what_was_wanted_is_given_up_with_the_request():
    peer, load = leasing(waiting := Shares(MAX_WAITING))
    waits = waiter("wait", [(0, Range(0, 1)), (0, Range(5, 9))])
    peer.began(waits)
    assert (load.planner.has_wants, waiting.of(peer.process)) == (True, COST + 2)
    peer.ended(waits)
    assert (load.planner.has_wants, waiting.of(peer.process)) == (False, 0)


def test_a_refused_want_changes_nothing():
    peer, load = leasing(waiting := Shares(1000))
    for wants in ([(0, Range(0, 1)), (1, Range(0, 1))], [(0, Range(0, 41 * BLOCK))]):
        with pytest.raises(BadRequest):
            peer.began(waiter("wait", wants))
    with pytest.raises(BadRequest, match="would wait for 501"):
        peer.began(waiter("wait", [(0, Range(0, 1))] * (501 - COST)))
    assert (waiting.of(peer.process), load.planner.has_wants) == (0, False)


def test_what_one_process_waits_for_over_many_connections_leaves_room_for_others():
    waiting = Shares(1000)
    crowd = [Peer((OWNER, 1), waiting) for _ in range(100)]
    begun = []
    for peer in crowd:
        with contextlib.suppress(BadRequest):
            peer.began(waiter("status", []))
            begun.append(peer)
    assert len(begun) == 500 // COST
    other = Peer((OWNER, 2), waiting)
    other.began(waiter("status", []))
    for peer in begun:
        peer.ended(waiter("status", []))
    other.ended(waiter("status", []))
    assert waiting.free == 1000


def test_names_that_a_request_keeps_count_as_well():
    """A hundred thousand characters in one that waits are four hundred thousand bytes."""
    kept = Waiter(PeerId(1), 1, "open", lambda: None, (), ["x" * 100_000, "y"])
    assert kept.cost > 100_000 * 4 / 180


def test_after_an_open_another_may_follow():
    peer = Peer((OWNER, 1), Shares(MAX_WAITING))
    first = waiter("open", [])
    peer.began(first)
    assert peer.is_opening
    peer.ended(first)
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
