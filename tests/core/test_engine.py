"""The engine, driven by hypothesis against a naive outside: no order of events breaks a promise."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cached.core import effects
from cached.core.engine import LAST_REQUESTS_S
from cached.core.errors import BadReply, ObjectChanged, ObjectMissing, StoreError, StoreUnavailable
from cached.core.events import DrainRequested
from cached.core.objects import Left, Manifest, ObjectFacts, Part, VersionRef
from tests.fakes.world import BLOCK, OWNER, RIGHT, World, manifest, right_crc, stored

SMALL, WIDE, BIG = (f"s3://bucket/{name}/" for name in ("small", "wide", "big"))
FOUR = [stored(f"{n}.safetensors", 2 + n) for n in range(4)]
LISTINGS = {
    "small": manifest(stored("a.safetensors", 3), stored("config.json", 1), uri=SMALL),
    "wide": manifest(*FOUR, stored("empty", 0), uri=WIDE),
    "big": manifest(stored("model.safetensors", 70), uri=BIG),
}
NEWER = {
    "small": manifest(stored("a.safetensors", 4, '"2"'), stored("config.json", 1), uri=SMALL),
    "wide": manifest(*FOUR, stored("more", 1), uri=WIDE),
    "big": manifest(stored("model.safetensors", 60, '"2"'), uri=BIG),
}
ERRORS: list[StoreError] = [
    StoreUnavailable("503", retry_after_s=2.0),
    BadReply("cut short"),
    ObjectChanged("412"),
    ObjectMissing("404"),
]

OPS = ["status", "check", "prefetch", "evict", "arrivals", "refresh", "purge"]


@st.composite
def versions_left(draw: st.DrawFn, blocks: int) -> list[Left]:
    """What an earlier daemon left: of each model up to two versions, with equal files shared."""
    found: list[Left] = []
    for name in draw(st.lists(st.sampled_from(list(LISTINGS)), unique=True)):
        listings = draw(st.lists(st.sampled_from([LISTINGS, NEWER]), unique_by=id, min_size=1))
        for listing in (each[name] for each in listings):
            is_published = draw(st.booleans())
            is_current = is_published and not any(
                each.is_current and each.of.name == name for each in found
            )
            left = Left(
                of=VersionRef(name, listing.version, len(found) + 1),
                manifest=listing,
                path=f"/models/{name}/{listing.version}",
                is_published=is_published,
                is_current=is_current,
                size_bytes=0,
                is_trusted=not is_published or draw(st.booleans()),
                passed_over=draw(st.sampled_from([(), (NEWER[name].version,)])),
                inodes=tuple((len(found), at) for at in range(len(listing.objects))),
            )
            found.append(_sharing(left, found))
    return _fitting(found, blocks * BLOCK)


def _sharing(left: Left, found: list[Left]) -> Left:
    """Return it with the files of a complete version that has equal ones."""
    inodes = list(left.inodes)
    for other in found:
        if other.is_published and other.of.name == left.of.name:
            assert left.manifest is not None
            assert other.manifest is not None
            for index, stored in enumerate(left.manifest.objects):
                if stored in other.manifest.objects:
                    inodes[index] = other.inodes[other.manifest.objects.index(stored)]
    return left._replace(inodes=tuple(inodes))


def _fitting(found: list[Left], budget_bytes: int) -> list[Left]:
    """Return as many as the budget takes, each file counted in the version that is offered."""
    counted: set[tuple[int, int]] = set()
    fitting: dict[VersionRef, Left] = {}
    for left in sorted(found, key=lambda each: not each.is_current):
        assert left.manifest is not None
        pairs = zip(left.inodes, left.manifest.objects, strict=True)
        own_bytes = sum(stored.size_bytes for inode, stored in pairs if inode not in counted)
        if own_bytes <= budget_bytes:
            budget_bytes -= own_bytes
            counted |= set(left.inodes)
            fitting[left.of] = left._replace(size_bytes=own_bytes)
    return [fitting[left.of] for left in found if left.of in fitting]


class EngineMachine(RuleBasedStateMachine):
    """Workers come, ask and go; GETs end in any order, well or not; clocks leap."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(LISTINGS)
        self.peers: list[int] = []
        self.requests: list[tuple[int, int]] = []

    @initialize(blocks=st.sampled_from([72, 76, 90]), data=st.data())
    def begin(self, blocks: int, data: st.DataObject) -> None:
        """Not even "big" beside "small" fits into 72 blocks, not "wide" with them into 76."""
        prefetch = data.draw(st.sampled_from([["small"], ["small", "big"], list(LISTINGS)]))
        verify = data.draw(st.sampled_from(["off", "checksum"]))
        self.world = World(
            LISTINGS,
            budget_bytes=blocks * BLOCK,
            slots=3,
            prefetch=prefetch,
            pinned=["small"],
            verify=verify,
            can_check=frozenset({"crc32", "sha256"}),
            kept_versions=data.draw(st.integers(0, 1)),
            left=data.draw(versions_left(blocks)),
        )
        self.world.half = data.draw(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 5))))
        for listing in (*LISTINGS.values(), *NEWER.values()):
            for file in listing.objects[::2]:
                kept = data.draw(st.sampled_from([RIGHT, right_crc(file.size_bytes)]))
                self.world.facts[file.path] = ObjectFacts(checksum=kept)

    @rule()
    def connect(self) -> None:
        self.peers.append(self.world.connect())

    @precondition(lambda self: self.peers)
    @rule(
        data=st.data(),
        until=st.sampled_from(["header", "ready"]),
        which=st.sampled_from([None, LISTINGS, NEWER]),
    )
    def open(self, data: st.DataObject, until: str, which: dict[str, Manifest] | None) -> None:
        peer = data.draw(st.sampled_from(self.peers))
        name = data.draw(st.sampled_from([*LISTINGS, "nobody"]))
        fields = {"version": which[name].version} if which and name in which else {}
        request = self.world.ask(peer, "open", model=name, until=until, **fields)
        self.requests.append((peer, request))

    @rule(name=st.sampled_from(list(LISTINGS)), which=st.sampled_from([LISTINGS, NEWER]))
    def replace(self, name: str, which: dict[str, Manifest]) -> None:
        self.world.listings[name] = which[name]

    @precondition(lambda self: self.world.shown)
    @rule(data=st.data())
    def map_by_path(self, data: st.DataObject) -> None:
        of = data.draw(st.sampled_from(sorted(self.world.shown)))
        self.world.mapped ^= {of}

    @precondition(lambda self: self.stalling)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        part = data.draw(st.sampled_from(self.stalling))
        self.world.stall(part, 1.0)

    @property
    def stalling(self) -> list[Part]:
        fetches = [job.part for job in self.world.jobs if isinstance(job, effects.FetchPart)]
        return [part for part in fetches if not part.hedge]

    @precondition(lambda self: self.world.verify != "off")
    @rule(index=st.integers(0, 3), block=st.integers(0, 5))
    def spoil(self, index: int, block: int) -> None:
        """The next bytes that come there will be wrong ones."""
        self.world.spoil.add((index, block))

    @precondition(lambda self: self.world.leases)
    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        peer = data.draw(st.sampled_from(sorted(self.world.leases)))
        objects = self.world.manifest_of(self.world.leases[peer]).objects
        index = data.draw(st.integers(0, len(objects) - 1))
        blocks = objects[index].size_bytes // BLOCK
        start = data.draw(st.integers(0, blocks))
        stop = data.draw(st.integers(start, blocks))
        ranges = [[index, start * BLOCK, stop * BLOCK]]
        request = self.world.ask(peer, "wait", ranges=ranges)
        self.requests.append((peer, request))
        answer = self.world.answer(request)
        if answer is not None and answer.code is None:
            self.assert_there(peer, index, range(start, stop))

    def assert_there(self, peer: int, index: int, blocks: range) -> None:
        there = self.world.there[self.world.leases[peer]]
        assert all((index, block) in there for block in blocks)

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), op=st.sampled_from(OPS))
    def ask(self, data: st.DataObject, op: str) -> None:
        peer = data.draw(st.sampled_from(self.peers))
        name = data.draw(st.sampled_from(list(LISTINGS)))
        fields: dict[str, object] = {"seen": 0} if op == "arrivals" else {"model": name}
        if op == "refresh" and data.draw(st.booleans()):
            fields["version"] = data.draw(st.sampled_from([LISTINGS, NEWER]))[name].version
        self.requests.append((peer, self.world.ask(peer, op, **fields)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        peer, request = data.draw(st.sampled_from(self.requests))
        if peer in self.peers:
            self.world.ask(peer, "cancel", request=request)
            assert self.world.answer(request) is not None

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        peer = data.draw(st.sampled_from(self.peers))
        self.peers.remove(peer)
        self.requests = [pair for pair in self.requests if pair[0] != peer]
        self.world.leave(peer)

    @precondition(lambda self: self.world.jobs)
    @rule(data=st.data())
    def end_well(self, data: st.DataObject) -> None:
        self.world.end(data.draw(st.sampled_from(self.world.endable)))

    @precondition(lambda self: self.world.jobs)
    @rule()
    def end_all_well(self) -> None:
        """So that models become resident, and others have to go for them."""
        self.world.run()

    @precondition(lambda self: any(_can_fail(job) for job in self.world.endable))
    @rule(data=st.data(), error=st.sampled_from(ERRORS), blocks=st.integers(0, 8))
    def end_badly(self, data: st.DataObject, error: StoreError, blocks: int) -> None:
        jobs = [job for job in self.world.endable if _can_fail(job)]
        self.world.end(data.draw(st.sampled_from(jobs)), error=error, blocks=blocks)

    @rule(seconds=st.floats(0, 1000))
    def sleep(self, seconds: float) -> None:
        self.world.sleep(seconds)

    @invariant()
    def memory_stays_within_the_budget(self) -> None:
        self.world.check()

    @invariant()
    def slots_are_not_exceeded(self) -> None:
        kinds = effects.FetchPart | effects.Describe
        assert len([job for job in self.world.jobs if isinstance(job, kinds)]) <= 3

    @invariant()
    def no_byte_is_fetched_twice(self) -> None:
        assert all(count == 1 for (_, _), count in self.fetched_in_current().items())

    def fetched_in_current(self) -> dict[tuple[object, int], int]:
        """A version that was freed may be fetched again, so only first loads are looked at."""
        freed = {effect.of for effect in self.world.log if isinstance(effect, effects.Evicted)}
        return {key: n for key, n in self.world.fetched.items() if key[0].of not in freed}

    def teardown(self) -> None:
        """Whatever happened: once the outside behaves, every request gets its one answer."""
        self.world.mapped.clear()
        self.world.spoil.clear()
        for _ in range(200):
            self.world.run()
            if all(self.world.answer(request) for _, request in self.requests):
                return
            self.world.sleep(30)
        unanswered = [pair for pair in self.requests if not self.world.answer(pair[1])]
        ops = [effect for effect in self.world.log if isinstance(effect, effects.Refused)]
        assert not unanswered, (unanswered, ops)


def _can_fail(job: effects.Effect) -> bool:
    return isinstance(job, effects.FetchPart | effects.Resolve | effects.Free | effects.Describe)


EngineMachine.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=60,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],  # explaining takes minutes
)
TestEngine = EngineMachine.TestCase


def test_a_prefetched_model_becomes_resident_and_the_daemon_ready():
    world = World(LISTINGS, prefetch=LISTINGS)

    is_ready_before = world.is_ready
    world.run()

    assert (is_ready_before, world.is_ready) == (False, True)
    assert {world.status(name)["state"] for name in LISTINGS} == {"resident"}


def test_nothing_to_prefetch_is_ready_at_once():
    assert World(LISTINGS).is_ready


@given(st.integers(1, 50))
@settings(max_examples=5)
def test_many_openers_of_an_absent_model_make_one_load(openers):
    world = World(LISTINGS)
    requests = [world.opened("big")[1] for _ in range(openers)]

    world.run()

    assert all((answer := world.answer(r)) is not None and answer.code is None for r in requests)
    assert set(world.fetched.values()) == {1}
    assert sum(isinstance(effect, effects.Resolve) for effect in world.log) == 1


def test_a_drain_answers_what_is_waited_for_and_then_stops():
    world = World(LISTINGS)
    _, request = world.opened("big", until="ready")
    world.post(DrainRequested())
    is_drained_before = world.is_drained
    refused = world.opened("small")[1]

    world.run()
    world.sleep(LAST_REQUESTS_S)

    assert (is_drained_before, world.is_drained) == (False, True)
    answer, late = world.answer(request), world.answer(refused)
    assert answer is not None
    assert answer.code is None
    assert late is not None
    assert late.code == "daemon_unavailable"


def test_a_drain_ends_in_time_though_the_store_hangs():
    world = World(LISTINGS)
    _, request = world.opened("big", until="ready")
    world.post(DrainRequested())

    world.sleep(5)

    assert world.is_drained
    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "daemon_unavailable"


def test_a_second_wish_to_drain_ends_it_at_once():
    world = World(LISTINGS)
    _, request = world.opened("big", until="ready")
    world.post(DrainRequested())
    is_drained_before = world.is_drained

    world.post(DrainRequested())

    assert (is_drained_before, world.is_drained) == (False, True)
    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "daemon_unavailable"


def test_a_drain_answers_what_follows_on_the_last_answer():
    world = World(LISTINGS)
    last, _ = world.opened("big", until="ready")
    world.post(DrainRequested())
    world.sleep(2)
    world.run()

    world.sleep(LAST_REQUESTS_S / 2)
    waited = world.answer(world.ask(last, "wait", ranges="all"))
    watched = world.answer(world.ask(world.connect(), "status", model="big"))

    assert waited is not None
    assert waited.code is None
    assert watched is not None
    assert watched.code is None
    assert not world.is_drained
    world.sleep(LAST_REQUESTS_S / 2)
    assert world.is_drained


def test_a_drain_ends_at_once_when_nobody_is_connected_any_more():
    world = World(LISTINGS)
    peer, _ = world.opened("big", until="ready")
    world.post(DrainRequested())
    world.run()

    is_drained_before = world.is_drained
    world.leave(peer)

    assert (is_drained_before, world.is_drained) == (False, True)


def test_a_drain_without_connections_ends_at_once():
    world = World(LISTINGS, prefetch=LISTINGS)

    world.post(DrainRequested())

    assert world.is_drained


@pytest.mark.parametrize("is_early", [True, False])
def test_who_waits_for_a_listing_in_back_off_is_told_at_once_in_a_drain(is_early):
    """And no timer rings for it, which would keep the daemon busy until the drain ends."""
    world = World(LISTINGS)
    _, request = world.opened("small")
    if is_early:
        world.post(DrainRequested())
    world.end(world.job(effects.Resolve), error=StoreUnavailable("503"))
    if not is_early:
        world.post(DrainRequested())

    answer = world.answer(request)
    assert answer is not None
    assert answer.code == "daemon_unavailable"
    assert world.wake_at_s == world.now_s + LAST_REQUESTS_S


def test_a_drain_that_waits_for_one_model_sets_no_timer_for_the_listing_of_another():
    world = World(LISTINGS, prefetch=["small"])
    world.opened("big", until="ready")
    resolve = next(job for job in world.jobs if isinstance(job, effects.Resolve))
    world.end(resolve, error=StoreUnavailable("503"))

    world.post(DrainRequested())

    assert world.wake_at_s == world.now_s + 5.0


def test_the_owner_is_the_only_one_beside_root_to_evict():
    world = World(LISTINGS, prefetch=["small"])
    world.run()

    stranger = world.connect(uid=OWNER + 1)
    refused = world.answer(world.ask(stranger, "evict", model="small"))
    root = world.connect(uid=0)
    asked = world.ask(root, "evict", model="small")
    is_answered = world.answer(asked) is not None
    world.run()
    granted = world.answer(asked)

    assert not is_answered
    assert refused is not None
    assert refused.code == "not_permitted"
    assert granted is not None
    assert granted.body["freed_bytes"] == 4 * BLOCK
