"""A set of bytes, one by one."""

from __future__ import annotations


class NaiveRanges:
    """What ``RangeSet`` promises, with a plain set of offsets."""

    def __init__(self) -> None:
        self.offsets: set[int] = set()

    def add(self, start: int, stop: int) -> int:
        new = set(range(start, stop)) - self.offsets
        self.offsets |= new
        return len(new)

    def remove(self, start: int, stop: int) -> int:
        gone = set(range(start, stop)) & self.offsets
        self.offsets -= gone
        return len(gone)

    def covers(self, start: int, stop: int) -> bool:
        return set(range(start, stop)) <= self.offsets

    def spans(self) -> list[tuple[int, int]]:
        return _spans(self.offsets)

    def within(self, start: int, stop: int) -> list[tuple[int, int]]:
        return _spans(set(range(start, stop)) & self.offsets)

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        return _spans(set(range(start, stop)) - self.offsets)

    def first(self, start: int, stop: int) -> tuple[int, int] | None:
        shared = set(range(start, stop)) & self.offsets
        if not shared:
            return None
        return next(span for span in self.spans() if span[0] <= min(shared) < span[1])


def _spans(offsets: set[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for offset in sorted(offsets):
        if spans and spans[-1][1] == offset:
            spans[-1] = (spans[-1][0], offset + 1)
        else:
            spans.append((offset, offset + 1))
    return spans
