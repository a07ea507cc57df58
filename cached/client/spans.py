"""Byte ranges of the files of a model: joined, counted, compared with what is there."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cached.core.header import Tensor

    Range = tuple[int, int, int]
    """File, start, stop."""

    Spans = dict[int, list[tuple[int, int]]]
    """Start and stop by file, sorted."""


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Return the same bytes in as few ranges as there can be."""
    found: list[Range] = []
    for index, start, stop in sorted(ranges):
        if found and found[-1][0] == index and start <= found[-1][2]:
            found[-1] = (index, found[-1][1], max(stop, found[-1][2]))
        else:
            found.append((index, start, stop))
    return found


def by_file(ranges: Iterable[Range]) -> Spans:
    """Return ranges by file."""
    spans: Spans = {}
    for index, start, stop in sorted(ranges):
        spans.setdefault(index, []).append((start, stop))
    return spans


def covers(spans: Spans, index: int, tensor: Tensor) -> bool:
    """Return whether one of a file's spans holds all of a tensor."""
    if tensor.start == tensor.stop:
        return True
    found = spans.get(index, [])
    at = bisect_right(found, tensor.start, key=lambda span: span[0]) - 1
    return at >= 0 and tensor.stop <= found[at][1]


def common_bytes(ranges: Iterable[Range], spans: Spans) -> int:
    """Return how many bytes of the ranges lie in the spans."""
    return sum(
        max(0, min(stop, span_stop) - max(start, span_start))
        for index, start, stop in ranges
        for span_start, span_stop in spans.get(index, [])
    )
