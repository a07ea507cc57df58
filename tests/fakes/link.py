"""A link in virtual time that all GETs share, and a daemon that keeps it busy with parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.parts import PartSize

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.core.parts import Planned, Planner


class Flight:
    """One GET: waits for the first byte, then shares the link evenly with the others."""

    def __init__(self, part: Planned, began_s: float, latency_s: float) -> None:
        self.part = part
        self.began_s = began_s
        self.first_byte_s = began_s + latency_s
        self.left_bytes = float(part[2] - part[1])


class FakeLink:
    """``slots`` GETs at a time through a link of ``bytes_per_s``, planned by the real planner.

    Args:
        planner: of the version that is loaded.
        bytes_per_s: of the whole link.
        slots: GETs in flight.
        latency_s: from a request to its first byte; a function of the number of the GET.
    """

    def __init__(
        self,
        planner: Planner,
        bytes_per_s: float,
        *,
        slots: int = 8,
        latency_s: Callable[[int], float] = lambda number: 0.0,
    ) -> None:
        self.planner = planner
        self.size = PartSize(slots)
        self.now_s = 0.0
        self.gets = 0
        self._bytes_per_s = bytes_per_s
        self._slots = slots
        self._latency_s = latency_s
        self._flights: list[Flight] = []
        self._header_bytes: int | None = None
        self._read: set[int] = set()

    def know_headers(self, header_bytes: int) -> None:
        """Let every safetensors header be read as soon as it is there."""
        self._header_bytes = header_bytes

    def run(self, until: Callable[[], bool], *, at_s: float = float("inf")) -> float:
        """Go on until the condition holds or the time has come; return the time then."""
        while not until():
            self._plan()
            step_s = self._step_s()
            if self.now_s + step_s > at_s:
                self._pass(at_s - self.now_s)
                return self.now_s
            self._pass(step_s)
            self._land()
        return self.now_s

    def _plan(self) -> None:
        while len(self._flights) < self._slots:
            part = self.planner.next(self.size.size_bytes)
            if part is None:
                break
            self._flights.append(Flight(part, self.now_s, self._latency_s(self.gets)))
            self.gets += 1
        assert self._flights, "nothing is in flight and nothing is planned"

    def _step_s(self) -> float:
        receiving = [flight for flight in self._flights if flight.first_byte_s <= self.now_s]
        waits = [flight.first_byte_s - self.now_s for flight in self._flights]
        steps = [wait for wait in waits if wait > 0]
        if receiving:
            share = self._bytes_per_s / len(receiving)
            steps.append(min(flight.left_bytes for flight in receiving) / share)
        return min(steps)

    def _pass(self, seconds: float) -> None:
        receiving = [flight for flight in self._flights if flight.first_byte_s <= self.now_s]
        for flight in receiving:
            flight.left_bytes -= seconds * self._bytes_per_s / len(receiving)
        self.now_s += seconds

    def _land(self) -> None:
        for flight in [flight for flight in self._flights if flight.left_bytes < 0.5]:
            self._flights.remove(flight)
            file, start, stop = flight.part
            self.planner.done(file, start, stop)
            self.size.observe(stop - start, self.now_s - flight.began_s)
            if self._header_bytes is not None and self.planner.has(file, 0, self._header_bytes):
                self._read_header(file, self._header_bytes)

    def _read_header(self, file: int, header_bytes: int) -> None:
        if file not in self._read:
            self._read.add(file)
            self.planner.header_known(file, header_bytes)
