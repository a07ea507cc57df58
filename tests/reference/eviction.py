"""The cheapest way to make room, by trying every set of versions."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def least_bytes(sizes: Sequence[int], short: int) -> int | None:
    """Return the fewest bytes whose eviction frees ``short``; None if all are not enough."""
    sums = [
        sum(some)
        for count in range(len(sizes) + 1)
        for some in combinations(sizes, count)
        if sum(some) >= short
    ]
    return min(sums, default=None)
