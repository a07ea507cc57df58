"""Sets of bytes of one file, as sorted ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from cached.core.objects import Range

if TYPE_CHECKING:
    from collections.abc import Iterator


class RangeSet:
    """Bytes of one file: half-open ranges, sorted, never empty, never touching.

    Every operation finds its place by bisection; a file has some hundred ranges at most.
    """

    __slots__ = ("_starts", "_stops")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __iter__(self) -> Iterator[Range]:
        return map(Range, self._starts, self._stops)

    def __repr__(self) -> str:
        return f"RangeSet({[tuple(span) for span in self]})"

    def add(self, start: int, stop: int) -> int:
        """Put ``[start, stop)`` in; return how many of its bytes were not there yet."""
        if start >= stop:
            return 0
        # Ranges that overlap or touch the new one: they become one with it.
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        new_bytes = stop - start - self._overlap(first, last, start, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        return new_bytes

    def remove(self, start: int, stop: int) -> int:
        """Take ``[start, stop)`` out; return how many of its bytes were there."""
        if start >= stop:
            return 0
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if first >= last:
            return 0
        removed_bytes = self._overlap(first, last, start, stop)
        kept = [(self._starts[first], start), (stop, self._stops[last - 1])]
        kept = [span for span in kept if span[0] < span[1]]
        self._starts[first:last] = [span[0] for span in kept]
        self._stops[first:last] = [span[1] for span in kept]
        return removed_bytes

    def _overlap(self, first: int, last: int, start: int, stop: int) -> int:
        """Return the bytes that the ranges first … last - 1 share with ``[start, stop)``."""
        return sum(
            min(stop, self._stops[at]) - max(start, self._starts[at]) for at in range(first, last)
        )

    def covers(self, start: int, stop: int) -> bool:
        """Return whether all of ``[start, stop)`` is in it; True for an empty range."""
        if start >= stop:
            return True
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and stop <= self._stops[at]

    def first(self, start: int, stop: int) -> Range | None:
        """Return the whole range that holds the first byte of ``[start, stop)`` that is in."""
        at = bisect_right(self._stops, start)
        if start < stop and at < len(self._starts) and self._starts[at] < stop:
            return Range(self._starts[at], self._stops[at])
        return None

    def within(self, start: int, stop: int) -> list[Range]:
        """Return what of ``[start, stop)`` is in it, in order."""
        found = []
        at = bisect_right(self._stops, start)
        while start < stop and at < len(self._starts) and self._starts[at] < stop:
            found.append(Range(max(start, self._starts[at]), min(stop, self._stops[at])))
            at += 1
        return found

    def missing(self, start: int, stop: int) -> list[Range]:
        """Return what of ``[start, stop)`` is not in it, in order."""
        gaps = []
        at = bisect_right(self._stops, start)
        while start < stop and at < len(self._starts) and self._starts[at] < stop:
            if start < self._starts[at]:
                gaps.append(Range(start, self._starts[at]))
            start = self._stops[at]
            at += 1
        if start < stop:
            gaps.append(Range(start, stop))
        return gaps
