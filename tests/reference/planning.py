"""The order of GETs, decided anew each time from lists of units."""

from __future__ import annotations

from typing import NamedTuple

Where = tuple[int, int, int]


class NaiveFile(NamedTuple):
    """One file in units.

    Attributes:
        units: per unit ``pending``, ``flying`` or ``there``.
        gate: units before it may be planned; all of them once the header is known.
    """

    units: list[str]
    gate: list[int]


class NaivePlanner:
    """What ``Planner`` promises, for files of whole units.

    Args:
        sizes: of each file.
        gated: the safetensors files.
        first: units of a first part, and of a small file.
        learnt: ranges by which to go.
    """

    def __init__(self, sizes: list[int], gated: set[int], first: int, learnt: list[Where]) -> None:
        gates = [min(first, size) if at in gated else size for at, size in enumerate(sizes)]
        self.files = [
            NaiveFile(["pending"] * size, [gate]) for size, gate in zip(sizes, gates, strict=True)
        ]
        self.wanted_again: list[Where] = []
        self.wanted: list[Where] = []
        self.again: list[Where] = []
        self.headers = [(at, 0, gates[at]) for at in sorted(gated)]
        self.small = [(at, 0, n) for at, n in enumerate(sizes) if at not in gated and n <= first]
        self.learnt = list(learnt)
        self.rest = [(at, 0, size) for at, size in enumerate(sizes)]
        self.flying: dict[Where, bool] = {}

    def pending(self, ranges: list[Where]) -> list[tuple[int, int]]:
        """Return file and number of every unit of the ranges that may be planned, in order."""
        return [
            (at, unit)
            for at, start, stop in ranges
            for unit in range(start, min(stop, self.files[at].gate[0]))
            if self.files[at].units[unit] == "pending"
        ]

    def has_wants(self) -> bool:
        return bool(self.pending(self.wanted_again + self.wanted))

    def choices(self, size: int) -> list[Where | None]:
        """Return the parts that may be next: one, but for what failed, where any may be."""
        others = self.headers + self.small + self.learnt + self.rest
        for ranges in (self.wanted_again, self.wanted, self.again, others):
            units = self.pending(ranges)
            if units:
                is_ordered = ranges is not self.again and ranges is not self.wanted_again
                return [
                    self.part(at, unit, size) for at, unit in units[: 1 if is_ordered else None]
                ]
        return [None]

    def part(self, at: int, unit: int, size: int) -> Where:
        """Return the part around a pending unit: as far as pending goes in its grid cell."""
        units, gate = self.files[at]
        line = unit // size * size
        start, stop = unit, unit
        while start > line and units[start - 1] == "pending":
            start -= 1
        while stop < min(line + size, gate[0], len(units)) and units[stop] == "pending":
            stop += 1
        return at, start, stop

    def take(self, part: Where) -> None:
        self.flying[part] = self.has_wants()
        self.mark(*part, "flying")

    def mark(self, at: int, start: int, stop: int, state: str) -> None:
        self.files[at].units[start:stop] = [state] * (stop - start)

    def end(self, part: Where, reached: int) -> None:
        """End a part in flight: what is before ``reached`` is there."""
        at, start, stop = part
        is_wanted = self.flying.pop(part)
        self.mark(at, start, reached, "there")
        self.mark(at, reached, stop, "pending")
        (self.wanted_again if is_wanted else self.again).append((at, reached, stop))

    def want(self, at: int, start: int, stop: int) -> None:
        for part in self.flying:
            if start < stop and part[0] == at and part[1] < stop and start < part[2]:
                self.flying[part] = True
        self.wanted.append((at, start, stop))

    def give_up(self, where: Where) -> None:
        """Take the last of its wants out: the place of the first stays."""
        del self.wanted[len(self.wanted) - 1 - self.wanted[::-1].index(where)]

    def header_known(self, at: int, header: int) -> None:
        size = len(self.files[at].units)
        self.files[at].gate[0] = size
        self.headers.append((at, 0, min(header, size)))

    def count(self, state: str) -> int:
        return sum(file.units.count(state) for file in self.files)
