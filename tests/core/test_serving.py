"""Requests of workers: what each is answered, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cached.core import effects, events, serving
from cached.core.errors import BadReply, StoreUnavailable
from cached.core.loads import Load
from cached.core.objects import PeerId, Range, VersionRef
from cached.core.peers import COST
from tests.fakes.world import BLOCK, OWNER, World, manifest, stored

if TYPE_CHECKING:
    from collections.abc import Iterable

ONE = manifest(stored("a.safetensors", 40), stored("b.txt", 1))
A, B = 0, 1


def loading() -> tuple[World, int]:
    """A world with a peer that holds a lease while the model is being filled."""
    world = World({"m": ONE}, slots=1)
    peer, request = world.opened("m")
    while world.answer(request) is None:
        world.end(world.jobs[0])
    return world, peer


def test_the_first_request_must_be_hello():
    world = World({"m": ONE})
    world.post(events.Connected(PeerId(77), OWNER, 1))

    answer = world.answer(world.ask(77, "open", model="m"))

    assert answer is not None
    assert answer.code == "bad_request"


def test_another_major_version_is_refused():
    world = World({"m": ONE})

    answer = world.answer(world.ask(world.connect(), "hello", protocol=[2, 0]))

    assert answer is not None
    assert answer.code == "protocol_mismatch"
    assert "2.0" in str(answer.body)


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        ("dance", {}),
        ("open", {}),
        ("open", {"model": 7}),
        ("open", {"model": "m", "until": "tomorrow"}),
        ("open", {"model": "m", "tensors": "all"}),
        ("wait", {"ranges": "all"}),
        ("cancel", {"request": "x"}),
        ("status", {"model": ["m"]}),
    ],
)
def test_what_the_protocol_does_not_know_is_a_bad_request(op, fields):
    world = World({"m": ONE})

    answer = world.answer(world.ask(world.connect(), op, **fields))

    assert answer is not None
    assert answer.code == "bad_request"


@pytest.mark.parametrize(
    "ranges",
    [
        [[2, 0, 1]],
        [[0, 0, 41 * BLOCK]],
        [[0, 5, 4]],
        [[-1, 0, 1]],
        [[0, -1, 1]],
        [[0, 1]],
        7,
        [[0, 0.5, 1]],
    ],
)
def test_ranges_outside_the_files_are_a_bad_request(ranges):
    world, peer = loading()

    answer = world.answer(world.ask(peer, "wait", ranges=ranges))

    assert answer is not None
    assert answer.code == "bad_request"


def test_an_unknown_model_is_named_with_those_that_are_known():
    world = World({"m": ONE, "n": ONE})

    answer = world.answer(world.opened("x")[1])

    assert answer is not None
    assert answer.code == "model_unknown"
    assert "m, n" in str(answer.body)


def test_open_is_answered_when_headers_are_there_and_ready_when_all_is():
    world = World({"m": ONE}, slots=1)
    early, late = world.opened("m")[1], world.opened("m", until="ready")[1]

    while world.answer(early) is None:
        world.end(world.jobs[0])

    answer = world.answer(early)
    assert answer is not None
    assert answer.body["complete"] is False
    assert answer.body["path"] is None
    assert [file.index for file in answer.files] == [A, B]
    assert world.answer(late) is None
    world.run()
    answer = world.answer(late)
    assert answer is not None
    assert answer.body["complete"] is True


def test_a_waited_for_range_is_fetched_next():
    world, peer = loading()
    request = world.ask(peer, "wait", ranges=[[A, 33 * BLOCK, 34 * BLOCK]])

    for _ in range(2):  # the one in flight, then ours
        world.end(world.job(effects.FetchPart))

    answer = world.answer(request)
    assert answer is not None
    assert answer.code is None
    assert (A, 33) in world.there[world.leases[peer]]


def test_tensors_named_in_open_go_first_and_ready_means_those():
    world = World({"m": ONE}, slots=1)
    name = "a.safetensors:33"
    _, request = world.opened("m", tensors=[name], until="ready")

    while world.answer(request) is None:
        world.end(world.jobs[0])

    version = next(iter(world.there))
    assert (A, 33) in world.there[version]
    assert len(world.there[version]) < 20


def test_open_knows_a_tensor_of_several_files_by_file_and_name():
    world = World(
        {"m": manifest(stored("a.safetensors", 40), stored("b.safetensors", 40))}, slots=1
    )
    _, request = world.opened("m", tensors=["b.safetensors::b.safetensors:33"], until="ready")

    while world.answer(request) is None:
        world.end(world.jobs[0])

    answer = world.answer(request)
    assert answer is not None
    assert answer.code is None
    assert (B, 33) in next(iter(world.there.values()))


def test_the_tensors_of_an_open_are_looked_up_once_for_each_load(monkeypatch):
    asked: list[VersionRef] = []
    look_up = Load.tensor_ranges

    def counted(load: Load, names: Iterable[str]) -> list[tuple[int, Range]]:
        asked.append(load.of)
        return look_up(load, names)

    monkeypatch.setattr(Load, "tensor_ranges", counted)
    world = World({"m": ONE}, slots=1)
    _, request = world.opened("m", tensors=["a.safetensors:33"], until="ready")
    while not asked:
        world.end(world.jobs[0])
    world.ask(world.connect(), "evict", model="m")
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code is None
    assert len(asked) == len(set(asked)) == 2


def test_a_tensor_that_the_model_has_not_is_named():
    world = World({"m": ONE})
    _, request = world.opened("m", tensors=["nobody"])
    world.run()

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "tensor_unknown"


def test_one_connection_holds_one_lease():
    world, peer = loading()

    answer = world.answer(world.ask(peer, "open", model="m"))

    assert answer is not None
    assert answer.code == "bad_request"


def test_one_connection_waits_for_one_lease():
    """Two would both be granted, and one of them never given back."""
    world = World({"m": ONE, "n": manifest(stored("c.safetensors", 4))})
    peer, first = world.opened("m")

    second = world.answer(world.ask(peer, "open", model="n"))
    world.run()
    granted = world.answer(first)
    world.leave(peer)

    assert second is not None
    assert second.code == "bad_request"
    assert granted is not None
    assert granted.code is None
    assert [world.status(name)["leases"] for name in "mn"] == [0, 0]


@pytest.mark.parametrize("names", [["nobody"], None])
def test_a_connection_whose_open_failed_or_was_cancelled_can_open_again(names):
    world = World({"m": ONE})
    peer, first = world.opened("m", tensors=names)
    if names is None:
        world.ask(peer, "cancel", request=first)
    world.run()
    failed = world.answer(first)

    second = world.answer(world.ask(peer, "open", model="m"))

    assert failed is not None
    assert failed.code is not None
    assert second is not None
    assert second.code is None


def ones(start: int, count: int) -> list[list[int]]:
    """Ranges of one byte, far behind what is fetched next."""
    return [[A, 9 * BLOCK + 2 * at, 9 * BLOCK + 2 * at + 1] for at in range(start, start + count)]


def test_the_ranges_that_one_process_waits_for_are_bounded(monkeypatch):
    monkeypatch.setattr(serving, "MAX_WAITING", 2 * (100 + 2 * COST))
    world, peer = loading()
    first = world.ask(peer, "wait", ranges=ones(0, 60))
    assert world.answer(first) is None

    beyond = world.answer(world.ask(peer, "wait", ranges=ones(60, 41)))
    within = world.ask(peer, "wait", ranges=ones(60, 40))

    assert beyond is not None
    assert beyond.code == "bad_request"
    assert world.answer(within) is None
    world.ask(peer, "cancel", request=first)
    assert world.answer(world.ask(peer, "wait", ranges=ones(0, 60))) is None
    world.run()
    answer = world.answer(world.ask(peer, "wait", ranges=ones(0, 100)))
    assert answer is not None
    assert answer.code is None


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_what_nobody_waits_for_any_more_is_not_fetched_first(is_cancelled):
    world, peer = loading()
    request = world.ask(peer, "wait", ranges=[[A, 33 * BLOCK, 34 * BLOCK]])

    if is_cancelled:
        world.ask(peer, "cancel", request=request)
    else:
        world.leave(peer)
    world.end(world.job(effects.FetchPart))

    after = world.job(effects.FetchPart)
    assert isinstance(after, effects.FetchPart)
    assert after.part.start < 33 * BLOCK


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
OPS = [
    "hello",
    "open",
    "descriptors",
    "wait",
    "arrivals",
    "check",
    "cancel",
    "status",
    "prefetch",
    "evict",
]
MEMBERS = st.sampled_from(
    ["protocol", "model", "tensors", "until", "files", "ranges", "seen", "request"]
)
FIELDS = st.dictionaries(
    MEMBERS, JSON | st.sampled_from(["m", "all", [1, 0], [[0, 0, 1]], "\ud800"]), max_size=4
)


@given(st.lists(st.tuples(st.sampled_from(OPS), FIELDS), max_size=8), st.booleans())
@settings(max_examples=50)
def test_whatever_a_worker_asks_is_answered_or_waited_for(requests, is_leased):
    world, peer = loading() if is_leased else (World({"m": ONE}), 0)
    peer = peer or world.connect()

    asked = [world.ask(peer, op, **fields) for op, fields in requests]
    world.run()

    assert all(world.answer(request) is not None for request in asked)


def test_descriptors_are_sent_for_the_files_asked_for():
    world, peer = loading()

    answer = world.answer(world.ask(peer, "descriptors", files=[B]))
    beyond = world.answer(world.ask(peer, "descriptors", files=[2]))

    assert answer is not None
    assert [file.index for file in answer.files] == [B]
    assert beyond is not None
    assert beyond.code == "bad_request"


def test_arrivals_tell_what_is_there_and_wait_for_more():
    world, peer = loading()
    first = world.answer(world.ask(peer, "arrivals", seen=0))
    assert first is not None
    seen = first.body["seen"]
    assert isinstance(seen, int)
    assert seen > 0

    more = world.ask(peer, "arrivals", seen=seen)
    assert world.answer(more) is None
    world.end(world.job(effects.FetchPart))

    assert world.answer(more) is not None
    world.run()
    last = world.answer(world.ask(peer, "arrivals", seen=41 * BLOCK))
    assert last is not None
    assert last.body["complete"] is True


def test_cancel_answers_both():
    world, peer = loading()
    waiting = world.ask(peer, "wait", ranges="all")

    cancelled = world.answer(world.ask(peer, "cancel", request=waiting))

    assert cancelled is not None
    answer = world.answer(waiting)
    assert answer is not None
    assert answer.code == "timed_out"


def test_a_load_that_fails_tells_every_waiter_why():
    world, peer = loading()
    waiting = [world.ask(peer, "wait", ranges="all"), world.ask(peer, "arrivals", seen=1 << 30)]

    for _ in range(3):
        world.end(world.job(effects.FetchPart), error=StoreUnavailable("503 SlowDown"))
        world.sleep(30)

    for request in waiting:
        answer = world.answer(request)
        assert answer is not None
        assert answer.code == "load_failed"
        assert "503 SlowDown" in str(answer.body)


def test_a_cut_that_made_progress_goes_on_at_once_at_the_next_byte():
    world, _ = loading()
    world.end(world.job(effects.FetchPart))  # b.txt
    first = world.job(effects.FetchPart)
    assert isinstance(first, effects.FetchPart)

    world.end(first, error=BadReply("cut short"), blocks=2)

    again = world.job(effects.FetchPart)
    assert isinstance(again, effects.FetchPart)
    assert again.part.start == first.part.start + 2 * BLOCK
    world.run()
    assert set(world.fetched.values()) == {1}


def test_a_leased_model_is_not_evicted_on_request():
    world, _ = loading()
    world.run()

    answer = world.answer(world.ask(world.connect(), "evict", model="m"))

    assert answer is not None
    assert answer.code == "not_permitted"
    assert world.status("m")["state"] == "resident"


def test_a_peer_that_left_gets_nothing_and_holds_nothing():
    world, peer = loading()
    waiting = world.ask(peer, "wait", ranges="all")
    world.leave(peer)
    world.run()

    assert world.answer(waiting) is None
    assert world.status("m")["leases"] == 0


def test_evicting_a_model_that_is_loading_tells_its_waiters():
    world = World({"m": ONE}, slots=1)
    _, request = world.opened("m", until="ready")
    for _ in range(4):
        world.end(world.jobs[0])

    world.ask(world.connect(), "evict", model="m")
    world.run()

    answer = world.answer(request)
    assert answer is not None
