"""Every byte is asked for once, in the order in which workers wait, in few and short GETs.

The figures are in virtual time: parts from the real planner, over a link that they share.
"""

from __future__ import annotations

import random
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cached.core import parts
from cached.core.objects import Manifest, StoredObject
from cached.core.parts import MAX_PART_BYTES, MIN_PART_BYTES, PartSize, Planned, Planner
from tests.fakes.link import FakeLink
from tests.reference.planning import NaivePlanner

MIB = 1 << 20
UNIT = 256 << 10
SIZES = [1 * MIB, 2 * MIB, 4 * MIB, 8 * MIB]


def manifest(*sizes: int | tuple[str, int]) -> Manifest:
    """Return a manifest of files: a size alone is a safetensors file."""
    files = [size if isinstance(size, tuple) else (".safetensors", size) for size in sizes]
    return Manifest(
        "s3://bucket/m/",
        "v",
        tuple(
            StoredObject(f"m/{at}{suffix}", f"{at}{suffix}", size, '"e"')
            for at, (suffix, size) in enumerate(files)
        ),
    )


def opened(*sizes: int | tuple[str, int], learnt: list[Planned] | None = None) -> Planner:
    """Return a planner that knows every header, and has them."""
    planner = Planner(manifest(*sizes), learnt=learnt or [])
    for at, size in enumerate(sizes):
        if isinstance(size, int):
            planner.header_known(at, 8)
            planner.done(at, 0, min(size, MIB))
    return planner


def drained(planner: Planner, size: int = MAX_PART_BYTES) -> list[Planned]:
    """Return every part that can be planned now."""
    return list(iter(lambda: planner.next(size), None))


class PlannerMachine(RuleBasedStateMachine):
    """The planner against lists of units, on files of whole units."""

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
        self.gated = data.draw(st.sets(st.sampled_from(range(len(sizes)))))
        self.sizes = sizes
        learnt = [self.draw_range(data) for _ in range(data.draw(st.integers(0, 3)))]
        suffixes = [".safetensors" if at in self.gated else ".bin" for at in range(len(sizes))]
        files = [(suffix, size * UNIT) for suffix, size in zip(suffixes, sizes, strict=True)]
        self.planner = Planner(manifest(*files), learnt=[scaled(where) for where in learnt])
        self.naive = NaivePlanner(sizes, self.gated, MIB // UNIT, learnt)

    def draw_range(self, data: st.DataObject) -> Planned:
        at = data.draw(st.sampled_from(range(len(self.sizes))))
        start = data.draw(st.integers(0, self.sizes[at]))
        return at, start, data.draw(st.integers(start, self.sizes[at]))

    @rule(size=st.sampled_from(SIZES))
    def plan(self, size: int) -> None:
        choices = self.naive.choices(size // UNIT)
        part = self.planner.next(size)
        assert part in [where and scaled(where) for where in choices]
        if part is not None:
            self.naive.take((part[0], part[1] // UNIT, part[2] // UNIT))

    @precondition(lambda self: self.naive.flying)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        part = data.draw(st.sampled_from(list(self.naive.flying)))
        reached = data.draw(st.sampled_from([part[1], part[2]]) | st.integers(part[1], part[2]))
        at, start, stop = scaled(part)
        self.planner.done(at, start, reached * UNIT)
        if reached < part[2]:
            self.planner.failed(at, reached * UNIT, stop)
        self.naive.end(part, reached)

    @rule(data=st.data())
    def want(self, data: st.DataObject) -> None:
        where = self.draw_range(data)
        self.planner.want(*scaled(where))
        self.naive.want(*where)

    @precondition(lambda self: self.naive.wanted)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        where = data.draw(st.sampled_from(self.naive.wanted))
        self.planner.give_up(*scaled(where))
        self.naive.give_up(where)

    @precondition(lambda self: self.gated)
    @rule(data=st.data(), header=st.integers(1, 12))
    def know_header(self, data: st.DataObject, header: int) -> None:
        at = data.draw(st.sampled_from(sorted(self.gated)))
        self.planner.header_known(at, header * UNIT)
        self.naive.header_known(at, header)

    @precondition(lambda self: not self.naive.flying)
    @rule(data=st.data())
    def find_there(self, data: st.DataObject) -> None:
        at, start, stop = self.draw_range(data)
        self.planner.done(at, start * UNIT, stop * UNIT)
        self.naive.mark(at, start, stop, "there")

    @invariant()
    def agrees_on_every_byte(self) -> None:
        planner, naive = self.planner, self.naive
        assert planner.is_complete == (naive.count("pending") + naive.count("flying") == 0)
        for at, file in enumerate(naive.files):
            for unit, state in enumerate(file.units):
                assert planner.has(at, unit * UNIT, (unit + 1) * UNIT) == (state == "there")
        assert planner.has_wants == naive.has_wants()


def scaled(where: Planned) -> Planned:
    return where[0], where[1] * UNIT, where[2] * UNIT


TestPlanner = PlannerMachine.TestCase
TestPlanner.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.data())
def test_any_course_of_events_fetches_every_byte_once(data):
    sizes = data.draw(st.lists(st.integers(0, 20 * MIB), min_size=1, max_size=3))
    planner = Planner(manifest(*sizes))
    unread = {at for at, size in enumerate(sizes) if size}
    there: list[Planned] = []
    flying: list[Planned] = []
    while not planner.is_complete:
        if data.draw(st.booleans()):
            at = data.draw(st.sampled_from(range(len(sizes))))
            start = data.draw(st.integers(0, sizes[at]))
            planner.want(at, start, data.draw(st.integers(start, sizes[at])))
        part = planner.next(data.draw(st.sampled_from(SIZES)))
        if part is not None:
            flying.append(part)
        if flying and (part is None or data.draw(st.booleans())):
            at, start, stop = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
            reached = data.draw(st.sampled_from([stop, stop, start]) | st.integers(start, stop))
            there.append((at, start, reached))
            planner.done(at, start, reached)
            planner.failed(at, reached, stop)
            if at in unread and planner.has(at, 0, 1):
                planner.header_known(at, 1)
                unread.remove(at)
    for at, size in enumerate(sizes):
        spans = sorted(span[1:] for span in there if span[0] == at and span[1] < span[2])
        assert all(one[1] == other[0] for one, other in pairwise(spans))
        assert sum(stop - start for start, stop in spans) == size
        assert planner.has(at, 0, size)


@given(
    st.lists(st.integers(0, 70 * MIB), min_size=1, max_size=4),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20 * MIB)), max_size=12),
    st.integers(0, 2 * MIB),
)
def test_wants_all_over_the_files_take_hardly_more_gets(sizes, wants, header):
    planner = Planner(manifest(*sizes))
    gets = drained(planner)
    for at, size in enumerate(sizes):
        planner.header_known(at, min(header, size))
    for number, (place, length) in enumerate(wants):
        at = number % len(sizes)
        start = int(sizes[at] * place)
        planner.want(at, start, min(start + length, sizes[at]))
        gets.extend(part for part in [planner.next(MAX_PART_BYTES)] if part)
    gets += drained(planner)
    assert sum(stop - start for _, start, stop in gets) == sum(sizes)
    assert len(gets) <= -(-sum(sizes) // MAX_PART_BYTES) + 2 * len(sizes)


def test_headers_go_first_then_small_files_then_file_by_file():
    planner = Planner(
        manifest(20 * MIB, (".bin", 9 * MIB), (".json", 100), 3 * MIB, ("tokenizer", MIB))
    )
    assert drained(planner, 4 * MIB) == [
        (0, 0, MIB),
        (3, 0, MIB),
        (2, 0, 100),
        (4, 0, MIB),
        (1, 0, 4 * MIB),
        (1, 4 * MIB, 8 * MIB),
        (1, 8 * MIB, 9 * MIB),
    ]


def test_the_first_get_of_a_safetensors_file_runs_alone():
    planner = Planner(manifest(20 * MIB))
    assert drained(planner) == [(0, 0, MIB)]
    planner.done(0, 0, MIB)
    assert drained(planner) == []
    planner.header_known(0, 4096)
    assert drained(planner) == [
        (0, MIB, 8 * MIB),
        (0, 8 * MIB, 16 * MIB),
        (0, 16 * MIB, 20 * MIB),
    ]


def test_where_headers_are_checked_first_nothing_waits_for_them_but_they_come_early():
    files = (20 * MIB, ("list.json", 100), (".bin", 9 * MIB), 3 * MIB)
    planner = Planner(manifest(*files), is_checked_first=True)
    assert drained(planner) == [
        (1, 0, 100),
        (0, 0, 8 * MIB),
        (3, 0, 3 * MIB),
        (0, 8 * MIB, 16 * MIB),
        (0, 16 * MIB, 20 * MIB),
        (2, 0, 8 * MIB),
        (2, 8 * MIB, 9 * MIB),
    ]


def test_the_rest_of_a_long_header_goes_before_other_files():
    planner = Planner(manifest((".bin", 20 * MIB), 20 * MIB))
    assert planner.next(MIB) == (1, 0, MIB)
    assert planner.next(MIB) == (0, 0, MIB)
    planner.header_known(1, 3 * MIB - 5)
    assert planner.next(MIB) == (1, MIB, 2 * MIB)
    assert planner.next(MIB) == (1, 2 * MIB, 3 * MIB)
    assert planner.next(MIB) == (0, MIB, 2 * MIB)


def test_what_a_worker_waits_for_goes_first_and_in_the_order_of_asking():
    planner = opened(40 * MIB, 40 * MIB)
    planner.want(1, 20 * MIB, 21 * MIB)
    planner.want(0, 10 * MIB, 13 * MIB)
    assert planner.has_wants
    assert drained(planner, 2 * MIB)[:4] == [
        (1, 20 * MIB, 22 * MIB),
        (0, 10 * MIB, 12 * MIB),
        (0, 12 * MIB, 14 * MIB),
        (0, MIB, 2 * MIB),
    ]
    assert not planner.has_wants


def test_a_want_before_the_header_waits_for_it_and_holds_up_nobody():
    planner = Planner(manifest(40 * MIB, (".bin", 2 * MIB)))
    planner.want(0, 30 * MIB, 31 * MIB)
    assert drained(planner) == [(0, 0, MIB), (1, 0, 2 * MIB)]
    assert not planner.has_wants
    planner.header_known(0, 100)
    assert planner.next(MIB) == (0, 30 * MIB, 31 * MIB)


def test_a_want_for_what_is_in_flight_plans_nothing():
    planner = opened(40 * MIB)
    assert planner.next(4 * MIB) == (0, MIB, 4 * MIB)
    planner.want(0, 2 * MIB, 3 * MIB)
    assert planner.next(4 * MIB) == (0, 4 * MIB, 8 * MIB)


def test_a_failed_part_goes_on_where_it_ended_before_other_bytes():
    planner = opened(40 * MIB)
    assert planner.next(4 * MIB) == (0, MIB, 4 * MIB)
    planner.next(4 * MIB)
    planner.done(0, MIB, 2 * MIB + 7)
    planner.failed(0, MIB, 4 * MIB)
    assert planner.next(4 * MIB) == (0, 2 * MIB + 7, 4 * MIB)
    assert planner.next(4 * MIB) == (0, 8 * MIB, 12 * MIB)


def test_a_failed_part_that_a_worker_came_to_wait_for_goes_before_other_wants():
    planner = opened(40 * MIB)
    planner.next(4 * MIB)
    planner.want(0, 2 * MIB, 3 * MIB)
    planner.want(0, 20 * MIB, 21 * MIB)
    planner.failed(0, MIB, 4 * MIB)
    assert planner.next(4 * MIB) == (0, MIB, 4 * MIB)
    assert planner.next(4 * MIB) == (0, 20 * MIB, 24 * MIB)


def test_fifty_workers_that_want_the_same_cost_one_part():
    planner = opened(40 * MIB)
    for _ in range(50):
        planner.want(0, 20 * MIB, 20 * MIB + 5)
    assert planner.next(MIB) == (0, 20 * MIB, 21 * MIB)
    assert not planner.has_wants
    assert planner.touched == [(0, 20 * MIB, 20 * MIB + 5)]


def test_what_one_of_two_workers_gives_up_goes_first_still():
    planner = opened(40 * MIB)
    for _ in range(2):
        planner.want(0, 20 * MIB, 21 * MIB)
    planner.give_up(0, 20 * MIB, 21 * MIB)
    seen = [planner.has_wants]
    planner.give_up(0, 20 * MIB, 21 * MIB)
    seen.append(planner.has_wants)
    assert seen == [True, False]
    assert planner.next(MIB) == (0, MIB, 2 * MIB)


@pytest.mark.parametrize("is_gated", [False, True])
def test_wants_that_were_given_up_take_no_memory(is_gated):
    """In the queue, and behind the gate of a file whose header is not known."""
    planner = Planner(manifest(40 * MIB)) if is_gated else opened(40 * MIB)
    planner.next(MIB)
    used_bytes = []
    tracemalloc.start()
    for at in range(30):
        wants = [(0, 20 * MIB + at * 1_000 + unit, 30 * MIB) for unit in range(1_000)]
        for where in wants:
            planner.want(*where)
        assert planner.has_wants != is_gated
        for where in wants:
            planner.give_up(*where)
        used_bytes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert used_bytes[29] < 1.5 * used_bytes[9]


def test_what_was_wanted_in_an_earlier_load_goes_before_file_order():
    before = opened(40 * MIB, ("config.json", 10), 40 * MIB)
    before.want(2, 20 * MIB, 21 * MIB)
    before.want(0, 30 * MIB, 31 * MIB)
    before.want(2, 20 * MIB, 21 * MIB)
    assert before.touched == [(2, 20 * MIB, 21 * MIB), (0, 30 * MIB, 31 * MIB)]
    planner = Planner(manifest(40 * MIB, ("config.json", 10), 40 * MIB), learnt=before.touched)
    assert drained(planner, MIB) == [(0, 0, MIB), (2, 0, MIB), (1, 0, 10)]
    planner.header_known(0, 8)
    planner.header_known(2, 8)
    assert [planner.next(MIB) for _ in range(3)] == [
        (2, 20 * MIB, 21 * MIB),
        (0, 30 * MIB, 31 * MIB),
        (0, MIB, 2 * MIB),
    ]


def test_what_was_learnt_of_a_file_that_is_not_there_is_left_out():
    planner = opened(2 * MIB, learnt=[(7, 0, 5), (0, MIB, 9 * MIB)])
    assert drained(planner) == [(0, MIB, 2 * MIB)]


def test_what_is_remembered_of_wants_is_bounded(monkeypatch):
    monkeypatch.setattr(parts, "MAX_TOUCHED", 3)
    planner = opened(2 * MIB)
    for start in range(5):
        planner.want(0, start, start + 1)
    assert planner.touched == [(0, 0, 1), (0, 1, 2), (0, 2, 3)]


def test_empty_files_need_no_part():
    planner = Planner(manifest(0, (".bin", 0)))
    planner.want(0, 0, 0)
    assert planner.is_complete
    assert drained(planner) == []
    assert planner.has(0, 0, 0)


def test_shows_what_is_there():
    planner = opened(4 * MIB)
    planner.done(0, 2 * MIB, 3 * MIB)
    assert [tuple(span) for span in planner.ranges(0)] == [(0, MIB), (2 * MIB, 3 * MIB)]


def observed(size: PartSize, *seconds: float) -> int:
    for one in seconds:
        size.observe(size.size_bytes, one)
    return size.size_bytes // MIB


def test_a_fast_part_doubles_the_next_ones_up_to_the_longest():
    size = PartSize()
    assert [observed(size, 0.049) for _ in range(5)] == [2, 4, 8, 8, 8]


def test_parts_of_another_length_count_for_nothing():
    size = PartSize()
    size.observe(MIN_PART_BYTES, 0.01)
    for _ in range(20):
        size.observe(MIN_PART_BYTES, 0.01)
        size.observe(100, 9.0)
        size.observe(MAX_PART_BYTES, 9.0)
    assert size.size_bytes == 2 * MIB


def test_two_slow_parts_halve_the_next_ones_down_to_the_shortest():
    size = PartSize()
    assert observed(size, 0.01, 0.01, 0.01) == 8
    assert observed(size, 0.4) == 8
    assert observed(size, 0.4) == 4
    assert observed(size, 0.3, 0.3) == 2
    assert observed(size, 0.3, 0.3) == 1
    assert observed(size, 0.3, 0.3) == 1


def test_one_slow_part_alone_changes_nothing():
    size = PartSize()
    observed(size, 0.01, 0.01, 0.01)
    assert observed(size, *[5.0, 0.1] * 20) == 8


def test_a_link_that_turns_slow_is_met_in_one_step():
    size = PartSize()
    observed(size, 0.01, 0.01, 0.01)
    assert observed(size, 0.9, 0.9) == 1


def test_a_link_that_is_neither_fast_nor_slow_keeps_its_length():
    size = PartSize()
    assert observed(size, *[0.112] * 100) == 1
    observed(size, 0.01)
    assert observed(size, *[0.18] * 100) == 2


def test_steady_parts_that_would_be_quick_enough_at_twice_the_length_double():
    size = PartSize()
    assert observed(size, *[0.08] * 7) == 1
    assert observed(size, 0.08) == 2


@given(st.integers(1, 32), st.floats(5e6, 5e9), st.floats(0, 0.2))
@example(1, 20971521.0, 0.0)  # quick, and too slow at twice the length: it went up and down
def test_a_steady_link_comes_to_rest_at_one_length(slots, bytes_per_s, latency):
    size = PartSize(slots)
    seen = []
    for _ in range(40 * slots):
        size.observe(size.size_bytes, latency + size.size_bytes * slots / bytes_per_s)
        seen.append(size.size_bytes)
    assert set(seen) <= set(SIZES)
    assert len(set(seen[20 * slots :])) == 1


def wait_for_tensor(rng: random.Random, slots: int, latency_s: float) -> float:
    """Return what 16 MiB anywhere in 2 GiB take when asked for 1 s after the first GET."""
    planner = Planner(manifest(*[512 * MIB] * 4))
    link = FakeLink(
        planner, 75e6, slots=slots, latency_s=lambda _: latency_s * (0.5 + rng.random())
    )
    link.know_headers(30_000)
    link.run(lambda: False, at_s=1.0)
    file = rng.randrange(4)
    start = rng.randrange(30_000, 496 * MIB)
    planner.want(file, start, start + 16 * MIB)
    return link.run(lambda: planner.has(file, start, start + 16 * MIB)) - 1.0


@pytest.mark.parametrize("latency_s", [0.0, 0.02])
@pytest.mark.parametrize("slots", [4, 8])
def test_any_tensor_comes_within_half_a_second_over_75_megabytes_per_second(slots, latency_s):
    waits_s = [wait_for_tensor(random.Random(seed), slots, latency_s) for seed in range(8)]
    assert max(waits_s) <= 0.47


def tensors_of(sizes: list[int], rng: random.Random) -> list[Planned]:
    """Return what a model's tensors look like: a few large ones, many small ones."""
    tensors: list[Planned] = []
    for at, size in enumerate(sizes):
        start = 30_000
        while start < size:
            stop = min(size, start + rng.choice([4096, 12_288, 2 * MIB, 7 * MIB]))
            tensors.append((at, start, stop))
            start = stop
    return tensors


def gets_for_openers(sizes: list[int], bytes_per_s: float, openers: int, seed: int) -> int:
    """Return the GETs of a load while openers read all its tensors, each in its own order."""
    rng = random.Random(seed)
    planner = Planner(manifest(*sizes))
    link = FakeLink(planner, bytes_per_s, latency_s=lambda _: 0.001 + 0.02 * rng.random() ** 8)
    link.know_headers(30_000)
    tensors = tensors_of(sizes, rng)
    queues = [rng.sample(tensors, len(tensors)) for _ in range(openers)]

    def read_on() -> bool:
        for queue in queues:
            while queue and planner.has(*queue[-1]):
                queue.pop()
            if queue:
                planner.want(*queue[-1])
        return planner.is_complete

    link.run(read_on)
    return link.gets


@pytest.mark.parametrize("bytes_per_s", [0.35e9, 0.7e9, 1.6e9])
@pytest.mark.parametrize(
    "sizes", [[600 * MIB + 1], [60 * MIB + 5] * 4, [25 * MIB] * 20], ids=["one", "demo", "many"]
)
def test_openers_in_any_order_cost_few_gets_more(sizes: list[int], bytes_per_s: float):
    allowed = -(-sum(sizes) // MAX_PART_BYTES) + 64 + len(sizes)
    assert gets_for_openers(sizes, bytes_per_s, openers=50, seed=7) <= allowed


def test_a_link_is_kept_busy():
    planner = Planner(manifest(512 * MIB))
    link = FakeLink(planner, 75e6)
    link.know_headers(30_000)
    took_s = link.run(lambda: planner.is_complete)
    assert took_s <= 1.02 * 512 * MIB / 75e6
