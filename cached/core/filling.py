"""Filling a load: which GET next, what its end means, headers, when it is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.effects import FetchPart, Publish, ReadHeader, Retried
from cached.core.errors import LoadFailed
from cached.core.loads import delay_s
from cached.core.objects import FileRef, Part
from cached.core.parts import PartSize

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.core import events
    from cached.core.errors import CachedError
    from cached.core.loads import Limits, Load, Shelf


class Filling:
    """The GETs of all loads that are being filled.

    Args:
        shelf: models, loads and the ledger.
        limits: what the operator allows.
        failed: called when a load cannot go on, with the reason and the time.
    """

    def __init__(
        self, shelf: Shelf, limits: Limits, failed: Callable[[Load, CachedError, float], None]
    ) -> None:
        self._shelf = shelf
        self._limits = limits
        self._failed = failed
        self._part_size = PartSize(limits.fetch_slots)
        self._next_part_id = 0
        self._in_flight = 0

    def segments_ready(self, event: events.SegmentsReady, now_s: float) -> None:
        """The files are there: fill them."""
        load = self._shelf.current(event.of)
        if load is None:
            return
        load.is_mappable = True
        for index, stored in enumerate(load.manifest.objects):
            if stored.is_safetensors and stored.size_bytes == 0:
                self._shelf.effects.append(ReadHeader(FileRef(load.of, index), 0))
        self._advance(load, now_s)

    def header_read(self, event: events.HeaderRead, now_s: float) -> None:
        """One more header is known."""
        load = self._shelf.current(event.file.of)
        if load is not None:
            load.headers[event.file.index] = event.header
            load.planner.header_known(event.file.index, event.header.header_bytes)
            self._advance(load, now_s)

    def header_sized(self, event: events.HeaderSized, now_s: float) -> None:
        """Fetch the rest of a long header before anything else of that file."""
        load = self._shelf.current(event.file.of)
        if load is not None:
            index = event.file.index
            load.planner.header_known(index, event.header_bytes)
            load.planner.want(index, 0, event.header_bytes)
            load.header_asked[index] = event.header_bytes
            self._advance(load, now_s)

    def header_refused(self, event: events.HeaderRefused, now_s: float) -> None:
        """A file that is not what its name says makes the model unusable."""
        load = self._shelf.current(event.file.of)
        if load is not None:
            path = load.manifest.objects[event.file.index].path
            where = f"{path} of {load.manifest.uri}"
            message = f"cannot load {load.of.name}: {where}: {event.error.message}"
            self._failed(load, LoadFailed(message, hint=event.error.hint), now_s)

    def part_fetched(self, event: events.PartFetched, now_s: float) -> None:
        """Some more bytes are there."""
        part = event.part
        load = self._landed(part, part.stop, now_s)
        if load is not None:
            self._part_size.observe(part.stop - part.start, event.seconds)
            load.failures.pop((part.file.index, part.start), None)
            self._read_header(load, part.file.index)
            self._advance(load, now_s)

    def part_failed(self, event: events.PartFailed, now_s: float) -> None:
        """Go on from the byte that was reached, or give the load up."""
        part = event.part
        load = self._landed(part, event.watermark, now_s)
        if load is None:
            return
        where = (part.file.index, event.watermark)
        failures = load.failures.get(where, 0) + 1
        load.failures[where] = failures
        if not event.error.transient or failures >= self._limits.part_attempts:
            self._failed(load, event.error, now_s)
            return
        asked_s = getattr(event.error, "retry_after_s", None)
        has_moved = event.watermark > part.start and asked_s is None
        wait_s = 0.0 if has_moved else delay_s(failures, event.jitter_ratio, asked_s)
        load.resume_at_s = max(load.resume_at_s, now_s + wait_s)
        retried = Retried(load.of.name, event.error.code, wait_s, str(event.error))
        self._shelf.effects.append(retried)
        self._read_header(load, part.file.index)
        self._advance(load, now_s)

    def _landed(self, part: Part, watermark: int, now_s: float) -> Load | None:
        """Account for an attempt that ended; return its load if it is still current."""
        self._in_flight -= 1
        load = self._shelf.find(part.file.of)
        if load is None:
            return None
        del load.in_flight[part.part_id]
        index = part.file.index
        if watermark > part.start:
            load.planner.done(index, part.start, watermark)
            self._shelf.ledger.commit(part.file, part.start, watermark)
        if watermark < part.stop:
            load.planner.failed(index, watermark, part.stop)
        if part.file.of in self._shelf.retired:
            if not load.in_flight:
                self._shelf.free(load)
            return None
        return load

    def _read_header(self, load: Load, index: int) -> None:
        stored = load.manifest.objects[index]
        if not stored.is_safetensors or index in load.headers:
            return
        there = next(iter(load.planner.ranges(index)), None)
        there_bytes = there.stop if there is not None and there.start == 0 else 0
        asked = load.header_asked.get(index, 1)
        if 0 < asked <= there_bytes:
            load.header_asked[index] = 0  # one is under way
            self._shelf.effects.append(ReadHeader(FileRef(load.of, index), there_bytes))

    def _advance(self, load: Load, now_s: float) -> None:
        """Do what the load can do next, and let waiters look."""
        self._shelf.changed[load.of.name] = None
        model = self._shelf.models[load.of.name]
        if model.state == "loading" and load.has_headers and load.planner.is_complete:
            model.advance("filled")
            self._shelf.effects.append(Publish(load.of))

    def plan(self, now_s: float) -> None:
        """Fill the free slots with GETs; waiting workers' loads first."""
        if self._in_flight >= self._limits.fetch_slots or self._shelf.is_stopped:
            return
        filling = [
            model.load
            for model in self._shelf.models.values()
            if model.state == "loading" and model.load is not None and model.load.is_mappable
        ]
        filling.sort(key=lambda load: (not load.planner.has_wants, load.began_s))
        for load in filling:
            self._plan_load(load, now_s)

    def _plan_load(self, load: Load, now_s: float) -> None:
        while self._in_flight < self._limits.fetch_slots and load.resume_at_s <= now_s:
            planned = load.planner.next(self._part_size.size_bytes)
            if planned is None:
                return
            index, start, stop = planned
            part = Part(
                part_id=self._next_part_id,
                file=FileRef(load.of, index),
                uri=load.manifest.uri,
                stored=load.manifest.objects[index],
                start=start,
                stop=stop,
                attempt=load.failures.get((index, start), 0),
            )
            self._next_part_id += 1
            self._in_flight += 1
            load.in_flight[part.part_id] = part
            self._shelf.effects.append(FetchPart(part))
