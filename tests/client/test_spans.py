"""Ranges are joined and compared as the naive list of their bytes would be."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cached.client import spans
from cached.core.header import Tensor

RANGE = st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(0, 20)).map(
    lambda each: (each[0], min(each[1:]), max(each[1:]))
)
RANGES = st.lists(RANGE, max_size=8)


def naive(ranges: list[spans.Range]) -> set[tuple[int, int]]:
    return {(index, at) for index, start, stop in ranges for at in range(start, stop)}


@given(RANGES)
def test_joined_ranges_hold_the_same_bytes_and_do_not_touch(ranges: list[spans.Range]):
    found = spans.joined(ranges)
    assert naive(found) == naive(ranges)
    for (index, _, stop), (next_index, start, _) in pairwise(found):
        assert index < next_index or stop < start


@given(RANGES, RANGES)
def test_common_bytes_are_those_in_both(ranges: list[spans.Range], there: list[spans.Range]):
    ranges, there = spans.joined(ranges), spans.joined(there)
    expected = len(naive(ranges) & naive(there))
    assert spans.common_bytes(ranges, spans.by_file(there)) == expected


@given(RANGES, RANGE)
def test_a_tensor_is_covered_when_all_its_bytes_are_there(
    there: list[spans.Range], wanted: spans.Range
):
    there = spans.joined(there)
    index, start, stop = wanted
    tensor = Tensor("w", "U8", (stop - start,), start, stop)
    is_there = naive([wanted]) <= naive(there)
    assert spans.covers(spans.by_file(there), index, tensor) == is_there
