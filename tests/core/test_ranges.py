"""A set of ranges is a set of bytes."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cached.core.ranges import RangeSet
from tests.reference.bytes_of_a_file import NaiveRanges

offsets = st.integers(0, 40)


class RangesMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ranges = RangeSet()
        self.naive = NaiveRanges()

    @rule(start=offsets, stop=offsets)
    def add(self, start: int, stop: int) -> None:
        assert self.ranges.add(start, stop) == self.naive.add(start, stop)

    @rule(start=offsets, stop=offsets)
    def remove(self, start: int, stop: int) -> None:
        assert self.ranges.remove(start, stop) == self.naive.remove(start, stop)

    @rule(start=offsets, stop=offsets)
    def look(self, start: int, stop: int) -> None:
        assert self.ranges.covers(start, stop) == self.naive.covers(start, stop)
        assert self.ranges.within(start, stop) == self.naive.within(start, stop)
        assert self.ranges.missing(start, stop) == self.naive.missing(start, stop)
        assert self.ranges.first(start, stop) == self.naive.first(start, stop)

    @invariant()
    def holds_the_same_bytes_in_the_fewest_ranges(self) -> None:
        assert list(self.ranges) == self.naive.spans()


TestRanges = RangesMachine.TestCase
TestRanges.settings = settings(max_examples=50)


def test_shows_its_ranges():
    ranges = RangeSet()
    ranges.add(0, 4)
    ranges.add(6, 9)
    assert repr(ranges) == "RangeSet([(0, 4), (6, 9)])"
