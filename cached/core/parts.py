"""Which bytes to ask for next, and how many at once.

A version is filled by ranged GETs, the *parts*. ``Planner`` decides their order, ``PartSize``
their length. Two aims pull in opposite directions: few GETs, and little in flight before
what somebody waits for. The length settles it: on a link of 75 MB/s the parts in flight are
worth 0.11 s of it; from 0.3 GB/s on they are as long as they get.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final

from cached.core.ranges import RangeSet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cached.core.objects import Manifest, Range

MIN_PART_BYTES: Final = 1 << 20  # costs 20 % of a fast link's speed against 8 MiB
MAX_PART_BYTES: Final = 8 << 20  # longer ones are no faster; what s5cmd and awscrt take
FAST_S: Final = 0.050
TENSOR_BYTES: Final = 16 << 20  # as large as most that a worker waits for
# A worker's wait for such a tensor shall stay below 0.5 s. The two are apart, so that what
# was doubled for being below the one (at most 0.36 s then) is not halved for the other.
SLOW_WAIT_S: Final = 0.43
FAST_WAIT_S: Final = 0.36
MAX_TOUCHED: Final = 10_000  # about 1 MiB of memory
MAX_GONE: Final = 1_000  # wants that were given up, in a queue: taken out by the thousand

# Whose turn it is: the lower first.
_WANTED_AGAIN: Final = 0  # failed, and a worker waits
_WANTED: Final = 1  # first come, first served
_AGAIN: Final = 2  # failed: so that files become whole
_HEADER: Final = 3
_SMALL: Final = 4
_CHECKED_HEADER: Final = 5  # after the list of digests, which is small
_LEARNT: Final = 6
_FILE: Final = 7

Planned = tuple[int, int, int]
"""Index of the file, first byte, one past the last byte."""

_Entry = tuple[int, int, Planned]
"""Whose turn, number within it, where. An entry stays queued until all its bytes are out."""


class PartSize:
    """How long parts shall be: as long as a worker's wait for a tensor allows.

    If all slots are busy with parts of one length that take t seconds, a tensor of 16 MiB takes
    t (what is in flight comes first) plus its own bytes at the rate of slots * length / t.
    That is predicted here from the parts that come in. Doubled is at once what takes less than
    ``FAST_S``, and what would be quick enough at twice the length; halved is what is too slow.

    Only parts of the present length count: those that were planned before the last change
    tell nothing about it, and those at the end of a file are too short. So the length
    doubles once for each set of parts in flight.

    Attributes:
        size_bytes: a power of two, ``MIN_PART_BYTES`` to ``MAX_PART_BYTES``.

    Args:
        slots: GETs in flight.
    """

    __slots__ = ("_count", "_last_s", "_slots", "_sum_s", "size_bytes")

    def __init__(self, slots: int = 8) -> None:
        self.size_bytes = MIN_PART_BYTES
        self._slots = slots
        self._last_s = 0.0
        self._sum_s = 0.0
        self._count = 0

    def observe(self, part_bytes: int, seconds: float) -> None:
        """Take note of a part that came in whole.

        Args:
            part_bytes: its length.
            seconds: from the request to its last byte.
        """
        if part_bytes != self.size_bytes:
            return
        # one slow part alone may be the server's whim; on a slow link all are
        slow_s = min(seconds, self._last_s)
        self._last_s = seconds
        self._sum_s += seconds
        self._count += 1
        doubled_s = self._wait_s(2 * self.size_bytes, 2 * seconds)
        if seconds < FAST_S and doubled_s <= SLOW_WAIT_S:
            self._change(self.size_bytes * 2)
        elif self._wait_s(self.size_bytes, slow_s) > SLOW_WAIT_S:
            self._change(self._fitting_bytes(slow_s))
        elif self._count >= self._slots:
            mean_s = self._sum_s / self._count
            self._sum_s = 0.0
            self._count = 0
            if self._wait_s(2 * self.size_bytes, 2 * mean_s) < FAST_WAIT_S:
                self._change(self.size_bytes * 2)

    def _wait_s(self, size_bytes: int, seconds: float) -> float:
        """Return what a tensor of 16 MiB takes while all parts of that length take so long."""
        return seconds * (1 + TENSOR_BYTES / (self._slots * size_bytes))

    def _fitting_bytes(self, seconds: float) -> int:
        """Return the longest length that is not too slow on a link where this one takes so long."""
        size_bytes = self.size_bytes
        while size_bytes > MIN_PART_BYTES and self._wait_s(size_bytes, seconds) > SLOW_WAIT_S:
            size_bytes //= 2
            seconds /= 2
        return size_bytes

    def _change(self, size_bytes: int) -> None:
        self.size_bytes = min(max(size_bytes, MIN_PART_BYTES), MAX_PART_BYTES)
        self._last_s = 0.0
        self._sum_s = 0.0
        self._count = 0


class _File:
    """The bytes of one file: every one is pending, in flight, or done.

    Attributes:
        pending: not asked for.
        flying: the parts in flight, what is still out of each; True if somebody waits for it.
        done: in the segment.
        gate: nothing from here on is planned before the header is known.
    """

    __slots__ = ("done", "flying", "gate", "pending", "size_bytes")

    def __init__(self, size_bytes: int, gate: int) -> None:
        self.size_bytes = size_bytes
        self.gate = gate
        self.pending = RangeSet()
        self.pending.add(0, size_bytes)
        self.flying: dict[tuple[int, int], bool] = {}
        self.done = RangeSet()

    def part(self, span: Range, start: int, size_bytes: int) -> tuple[int, int]:
        """Return the part of a pending span that brings the bytes from ``start`` on.

        Its ends lie on the grid of ``size_bytes``, so that wants all over a file take about
        as many GETs as the file read from its start.
        """
        line = max(start, span.start) // size_bytes * size_bytes
        return max(span.start, line), min(span.stop, line + size_bytes, self.gate)

    def land(self, start: int, stop: int) -> bool:
        """Take ``[start, stop)`` out of what is in flight; return whether somebody waits for it."""
        is_wanted = False
        for part in [part for part in self.flying if part[0] < stop and start < part[1]]:
            waited = self.flying.pop(part)
            is_wanted = is_wanted or waited
            for rest in ((part[0], start), (stop, part[1])):
                if rest[0] < rest[1]:
                    self.flying[rest] = waited
        return is_wanted

    def want(self, start: int, stop: int) -> None:
        """Remember that somebody waits for the parts in flight that hold these bytes."""
        for part in self.flying:
            if part[0] < stop and start < part[1]:
                self.flying[part] = True


class Planner:
    """The parts of one version: which is next, which are out, what is there.

    Order: what a worker waits for; what failed; headers; other files up to 1 MiB; the ranges
    that workers waited for when this version was loaded before; the rest, file by file.
    Until the header of a safetensors file is known, only its first part is planned.

    Args:
        manifest: of the version.
        learnt: ``touched`` of an earlier planner of the same version.
        is_checked_first: a header is read only after it was checked together with what follows
            it: then nothing waits for headers, but what may be checked with them goes before
            the rest.
    """

    __slots__ = (
        *("_files", "_gone", "_missing_bytes", "_next_seq", "_parked"),
        *("_queue", "_queued", "_touched", "_wants"),
    )

    def __init__(
        self,
        manifest: Manifest,
        *,
        learnt: Sequence[Planned] = (),
        is_checked_first: bool = False,
    ) -> None:
        self._files: list[_File] = []
        self._queue: list[_Entry] = []
        self._parked: dict[int, list[_Entry]] = {}  # behind a gate, by file
        self._wants: dict[Planned, int] = {}  # how many wait for each
        self._queued: dict[Planned, int] = {}  # those of them in the queue or parked: number
        self._gone = 0  # entries of wants that were given up
        self._touched: dict[Planned, None] = {}
        self._next_seq = 0
        self._missing_bytes = manifest.size_bytes
        for index, stored in enumerate(manifest.objects):
            size_bytes = stored.size_bytes
            is_gated = stored.is_safetensors and not is_checked_first
            gate = min(size_bytes, MIN_PART_BYTES) if is_gated else size_bytes
            self._files.append(_File(size_bytes, gate))
            if is_gated:
                self._push(_HEADER, (index, 0, gate))
            elif stored.is_safetensors:
                self._push(_CHECKED_HEADER, (index, 0, min(size_bytes, MAX_PART_BYTES)))
            elif size_bytes <= MIN_PART_BYTES:
                self._push(_SMALL, (index, 0, size_bytes))
            self._push(_FILE, (index, 0, size_bytes))
        for where in learnt:
            if where[0] < len(self._files):
                self._push(_LEARNT, where)

    def _push(self, turn: int, where: Planned) -> None:
        heappush(self._queue, (turn, self._next_seq, where))
        self._next_seq += 1

    @property
    def is_complete(self) -> bool:
        """Whether every byte is there."""
        return not self._missing_bytes

    @property
    def has_wants(self) -> bool:
        """Whether the next part is one that a worker waits for."""
        found = self._first()
        return found is not None and found[0] <= _WANTED

    @property
    def touched(self) -> list[Planned]:
        """Ranges in the order in which they were first wanted; ``MAX_TOUCHED`` at most."""
        return list(self._touched)

    def ranges(self, file: int) -> RangeSet:
        """Return what of a file is there; only to be looked at."""
        return self._files[file].done

    def has(self, file: int, start: int, stop: int) -> bool:
        """Return whether all of a range is there."""
        return self._files[file].done.covers(start, stop)

    def next(self, size_bytes: int) -> Planned | None:
        """Plan the next part: it is in flight from now on, until ``done`` or ``failed``.

        Args:
            size_bytes: ``PartSize.size_bytes``; the part may be shorter.

        Returns:
            ``None`` if there is nothing to plan, or nothing before a header is known.
        """
        found = self._first()
        if found is None:
            return None
        turn, index, start, span = found
        file = self._files[index]
        part = file.part(span, start, size_bytes)
        file.pending.remove(*part)
        file.flying[part] = turn <= _WANTED
        return (index, *part)

    def _first(self) -> tuple[int, int, int, Range] | None:
        """Return the first entry with something to plan: its turn, file, start and what is pending.

        Entries before it go: forgotten if their bytes are out, parked if they are behind a gate.
        """
        while self._queue:
            turn, _, where = entry = self._queue[0]
            index, start, stop = where
            file = self._files[index]
            is_due = self._is_due(entry)
            span = file.pending.first(start, min(stop, file.gate)) if is_due else None
            if span is not None:
                return turn, index, start, span
            heappop(self._queue)
            if not is_due:
                self._gone -= 1
            elif file.pending.first(start, stop) is not None:
                self._parked.setdefault(index, []).append(entry)
            elif turn == _WANTED:
                del self._queued[where]
        return None

    def _is_due(self, entry: _Entry) -> bool:
        """Return whether somebody still waits for it, if it is a want."""
        return entry[0] != _WANTED or self._queued.get(entry[2]) == entry[1]

    def done(self, file: int, start: int, stop: int) -> None:
        """Note that bytes are there, in flight or not; again does no harm."""
        state = self._files[file]
        state.land(start, stop)
        state.pending.remove(start, stop)
        self._missing_bytes -= state.done.add(start, stop)

    def failed(self, file: int, start: int, stop: int) -> None:
        """Note that bytes in flight will not come: what is not there is planned again, soon."""
        state = self._files[file]
        turn = _WANTED_AGAIN if state.land(start, stop) else _AGAIN
        for gap in state.done.missing(start, stop):
            state.pending.add(gap.start, gap.stop)
            self._push(turn, (file, gap.start, gap.stop))

    def forget(self, file: int, start: int, stop: int) -> None:
        """Note that bytes which came are wrong: they are planned once more, soon.

        What of the range is in flight stays so: it comes anew already.
        """
        state = self._files[file]
        for span in state.done.within(start, stop):
            state.pending.add(span.start, span.stop)
        self._missing_bytes += state.done.remove(start, stop)
        self._push(_AGAIN, (file, start, stop))

    def want(self, file: int, start: int, stop: int) -> None:
        """Note that a worker waits for a range: what is missing of it goes before all else."""
        if start >= stop:
            return
        where = (file, start, stop)
        if len(self._touched) < MAX_TOUCHED:
            self._touched.setdefault(where)
        state = self._files[file]
        state.want(start, stop)
        self._wants[where] = self._wants.get(where, 0) + 1
        if where not in self._queued and state.pending.first(start, stop) is not None:
            self._queued[where] = self._next_seq
            self._push(_WANTED, where)

    def give_up(self, file: int, start: int, stop: int) -> None:
        """Take one ``want`` of exactly this range back: nobody may wait for it any more."""
        where = (file, start, stop)
        count = self._wants.get(where, 0)
        if count > 1:
            self._wants[where] = count - 1
        elif count:
            del self._wants[where]
            self._gone += self._queued.pop(where, None) is not None
            if self._gone > max(MAX_GONE, len(self._wants)):
                self._forget_gone()

    def _forget_gone(self) -> None:
        """Take out the wants that nobody waits for; else they stay until it would be their turn."""
        self._queue = [entry for entry in self._queue if self._is_due(entry)]
        heapify(self._queue)
        for index, entries in self._parked.items():
            self._parked[index] = [entry for entry in entries if self._is_due(entry)]
        self._gone = 0

    def header_known(self, file: int, header_bytes: int) -> None:
        """Open a safetensors file: plan the rest of its header, if any, then all of it.

        Args:
            file: index in the manifest.
            header_bytes: 8 + the length of the header.
        """
        state = self._files[file]
        state.gate = state.size_bytes
        self._push(_HEADER, (file, 0, header_bytes))
        for entry in self._parked.pop(file, ()):
            heappush(self._queue, entry)
