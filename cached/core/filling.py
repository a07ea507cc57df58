"""Filling a load: which GET next, what its end means, headers, when it is whole."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Final

from cached.core.backoff import delay_s
from cached.core.effects import (
    Adopted,
    CancelParts,
    Describe,
    FetchPart,
    Hedged,
    Publish,
    ReadHeader,
    Retried,
)
from cached.core.errors import LoadFailed
from cached.core.hedging import Hedging
from cached.core.loads import VOID, Flight
from cached.core.objects import FileRef, Part
from cached.core.parts import PartSize
from cached.core.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cached.core import events
    from cached.core.checking import Checking
    from cached.core.errors import CachedError
    from cached.core.leaving import Leaving
    from cached.core.loads import Limits, Load
    from cached.core.shelf import Shelf

WIDE_PART_BYTES: Final = 32 << 20  # without a bucket key every GET costs a call of KMS


class Filling:
    """The GETs of all loads that are being filled.

    Args:
        shelf: models, loads and the ledger.
        limits: what the operator allows.
        checking: told what came.
        leaving: told what of a retired load has ended.
        failed: called when a load cannot go on, with the reason and the time.
    """

    def __init__(
        self,
        shelf: Shelf,
        limits: Limits,
        checking: Checking,
        leaving: Leaving,
        failed: Callable[[Load, CachedError, float], None],
    ) -> None:
        self._shelf = shelf
        self._limits = limits
        self._checking = checking
        self._leaving = leaving
        self._failed = failed
        self._part_size = PartSize(limits.fetch_slots)
        self._window = Window(limits.fetch_slots)
        self._hedging = Hedging()
        self._hedges: dict[tuple[FileRef, int], tuple[Flight, float]] = {}
        self._straggler_at_s: float | None = None
        self._next_part_id = 0
        self._in_flight = 0

    def gets(self) -> dict[str, object]:
        """Return how many GETs are under way, and how many may be; for the status."""
        return {"in_flight": self._in_flight, "window": self._window.gets}

    def segments_ready(self, event: events.SegmentsReady) -> None:
        """The files are there: fill them."""
        load = self._shelf.coming(event.of)
        if load is None:
            return
        load.is_mappable = True
        for index, span in event.there:
            load.planner.done(index, span.start, span.stop)
            if index not in load.shared:
                self._shelf.commit(FileRef(load.of, index), span.start, span.stop)
        for index, stored in enumerate(load.manifest.objects):
            if stored.is_safetensors and stored.size_bytes == 0:
                self._shelf.effects.append(ReadHeader(FileRef(load.of, index), 0))
            self._came(load, index)
        if load.is_adopted:
            there_bytes = sum(span.stop - span.start for _, span in event.there)
            self._shelf.effects.append(Adopted(load.of, there_bytes))
        self._advance(load)

    def verified(self, load: Load, index: int) -> None:
        """Do what bytes of a file that were found right make possible."""
        self._read_header(load, index)
        self._advance(load)

    def _came(self, load: Load, index: int) -> None:
        """Do what more bytes of a file make possible."""
        self._checking.came(load, index)
        self._read_header(load, index)

    def _with_header(self, file: FileRef) -> Load | None:
        """Return the load whose header was read; None if what was read is of no use."""
        load = self._shelf.coming(file.of)
        if load is None or load.header_asked.get(file.index) != VOID:
            return load
        del load.header_asked[file.index]
        self._read_header(load, file.index)
        return None

    def header_read(self, event: events.HeaderRead) -> None:
        """One more header is known."""
        load = self._with_header(event.file)
        if load is not None:
            load.headers[event.file.index] = event.header
            load.planner.header_known(event.file.index, event.header.header_bytes)
            self._advance(load)

    def header_sized(self, event: events.HeaderSized) -> None:
        """Fetch the rest of a long header before anything else of that file."""
        load = self._with_header(event.file)
        if load is not None:
            index = event.file.index
            load.planner.header_known(index, event.header_bytes)
            load.planner.want(index, 0, event.header_bytes)
            load.header_asked[index] = event.header_bytes
            self._read_header(load, index)
            self._advance(load)

    def header_refused(self, event: events.HeaderRefused, now_s: float) -> None:
        """A file that is not what its name says makes the model unusable, the second time."""
        load = self._with_header(event.file)
        if load is None:
            return
        if self._checking.heals_header(load, event.file.index):
            self._advance(load)
            return
        path = load.manifest.objects[event.file.index].path
        where = f"{path} of {load.manifest.uri}"
        message = f"cannot load {load.of.name}: {where}: {event.error.message}"
        self._failed(load, LoadFailed(message, hint=event.error.hint), now_s)

    def part_fetched(self, event: events.PartFetched, now_s: float) -> None:
        """Some more bytes are there."""
        part = event.part
        self._window.landed(part.stop - part.start, now_s)
        if event.first_byte_s is not None:
            self._hedging.answered(event.first_byte_s)
        found = self._landed(part, part.stop)
        if found is None:
            return
        load, flight = found
        if flight.attempts:
            self._shelf.effects.append(CancelParts(load.of, part.part_id))
        if not flight.is_hedged:
            self._part_size.observe(part.stop - part.start, event.seconds)
            self._hedging.ended(event.seconds)
        load.failures.pop((part.file.index, part.start), None)
        if self._checking.passed(load, event, now_s):
            self._came(load, part.file.index)
            self._advance(load)

    def part_failed(self, event: events.PartFailed, now_s: float) -> None:
        """Go on from the byte that was reached, or give the load up."""
        part = event.part
        sent_s = self._sent_s(part)
        found = self._landed(part, event.watermark)
        if found is None:
            return
        load, flight = found
        index = part.file.index
        if flight.is_whole:  # it failed after the last byte
            if flight.attempts:
                self._shelf.effects.append(CancelParts(load.of, part.part_id))
            self._came(load, index)
            self._advance(load)
            return
        if flight.attempts and event.error.transient:
            return  # the other attempt goes on
        self._window.refused(sent_s, now_s)
        if self._may_retry(load, (index, event.watermark), event.error, now_s):
            self._put_off(load, (index, event.watermark), event, now_s)
            self._came(load, index)
            self._advance(load)

    def _sent_s(self, part: Part) -> float:
        load = self._shelf.find(part.file.of)
        flight = load.in_flight.get(part.part_id) if load is not None else None
        return flight.began_s if flight is not None else 0.0

    def _may_retry(
        self, load: Load, where: tuple[int, int], error: CachedError, now_s: float
    ) -> bool:
        """Count a failure at one place; return False if the load was given up for it."""
        load.failures[where] = load.failures.get(where, 0) + 1
        if error.transient and load.failures[where] < self._limits.part_attempts:
            return True
        self._failed(load, error, now_s)
        return False

    def _put_off(
        self,
        load: Load,
        where: tuple[int, int],
        event: events.PartFailed | events.DescribeFailed,
        now_s: float,
    ) -> None:
        """Have a load wait before its next request: not after the first failure at one place.

        Then the smaller window is answer enough.
        """
        asked_s = getattr(event.error, "retry_after_s", None)
        failures = load.failures[where]
        is_first = failures == 1 and asked_s is None
        wait_s = 0.0 if is_first else delay_s(failures, event.jitter_ratio, asked_s)
        load.resume_at_s = max(load.resume_at_s, now_s + wait_s)
        retried = Retried(load.of.name, event.error.code, wait_s, str(event.error))
        self._shelf.effects.append(retried)

    def part_stalled(self, event: events.PartStalled) -> None:
        """Send a second GET for a part that is slower than its peers, once a slot is free."""
        part = event.part
        load = self._shelf.coming(part.file.of)
        flight = load.in_flight.get(part.part_id) if load is not None else None
        if load is None or flight is None or flight.attempts != 1 or flight.is_hedged:
            return
        if self._hedging.may(event.idle_s):
            self._hedges[part.file, part.part_id] = (flight, event.idle_s)

    def described(self, event: events.Described) -> None:
        """The store told about an object."""
        self._in_flight -= 1
        load = self._shelf.coming(event.file.of)
        if load is not None:
            self._checking.described(load, event.file, event.facts)
            facts = event.facts
            if (facts.encryption or "").startswith("aws:kms") and not facts.has_bucket_key:
                load.wide_parts = True
            self._came(load, event.file.index)
            self._advance(load)

    def describe_failed(self, event: events.DescribeFailed, now_s: float) -> None:
        """Ask again later, or give the load up."""
        self._in_flight -= 1
        load = self._shelf.coming(event.file.of)
        where = (event.file.index, -1)
        if load is not None and self._may_retry(load, where, event.error, now_s):
            load.undescribed[event.file.index] = None
            self._put_off(load, where, event, now_s)

    def _landed(self, part: Part, watermark: int) -> tuple[Load, Flight] | None:
        """Account for an attempt that ended.

        Returns:
            Its load; None if that is retired, or if another attempt had brought all before: those
            bytes may have been found wrong meanwhile.
        """
        self._in_flight -= 1
        load = self._shelf.find(part.file.of)
        if load is None:
            return None
        flight = load.in_flight[part.part_id]
        flight.attempts -= 1
        index = part.file.index
        was_whole = flight.is_whole
        flight.is_whole = was_whole or watermark >= part.stop
        if watermark > part.start and not was_whole:
            load.planner.done(index, part.start, watermark)
            self._shelf.commit(part.file, part.start, watermark)
        if not flight.attempts:
            del load.in_flight[part.part_id]
            self._hedges.pop((part.file, part.part_id), None)
            if not flight.is_whole:
                load.planner.failed(index, max(part.start, watermark), part.stop)
        if load.of in self._shelf.retired:
            self._leaving.gets_ended(load)
            return None
        return None if was_whole else (load, flight)

    def _read_header(self, load: Load, index: int) -> None:
        stored = load.manifest.objects[index]
        if not stored.is_safetensors or index in load.headers:
            return
        there = next(iter(load.integrity.released(index)), None)
        there_bytes = there.stop if there is not None and there.start == 0 else 0
        asked = load.header_asked.get(index, 1)
        if 0 < asked <= there_bytes:
            load.header_asked[index] = 0  # one is under way
            self._shelf.effects.append(ReadHeader(FileRef(load.of, index), there_bytes))

    def _advance(self, load: Load) -> None:
        """Do what the load can do next, and let waiters look."""
        self._shelf.changed[load.of.name] = None
        model = self._shelf.models[load.of.name]
        if model.coming is load and model.state == "loading" and load.is_filled:
            model.advance("filled")
            checked_by = load.integrity.checked_by
            publish = Publish(load.of, not load.is_aside, model.passed_over, checked_by)
            self._shelf.effects.append(publish)

    def plan(self, now_s: float) -> None:
        """Fill the free slots with GETs: hedges, what workers wait for, what is pinned, others."""
        self._straggler_at_s = None
        if self._in_flight >= self._window.gets or self._shelf.is_stopped:
            return
        self._send_hedges()
        filling = [
            model.coming
            for model in self._shelf.models.values()
            if model.state == "loading" and model.coming is not None and model.coming.is_mappable
        ]
        filling.sort(key=self._rank)
        for load in filling:
            self._plan_load(load, now_s)
        if self._in_flight < self._window.gets:
            self._window.rest()
            self._hedge_stragglers(filling, now_s)

    def _hedge_stragglers(self, filling: Sequence[Load], now_s: float) -> None:
        """Send a second GET for what is late though it brings bytes: nothing else is to do."""
        ages = [
            (flight.began_s + self._hedging.straggler_s, part_id, flight)
            for load in filling
            if load.resume_at_s <= now_s
            for part_id, flight in load.in_flight.items()
            if flight.attempts == 1 and not flight.is_hedged
        ]
        for due_s, part_id, flight in sorted(ages, key=itemgetter(0, 1)):
            if due_s > now_s:
                self._straggler_at_s = due_s
                return
            self._hedges[flight.part.file, part_id] = (flight, now_s - flight.began_s)
        self._send_hedges()

    def wake_at_s(self) -> float | None:
        """Return when a GET will be late; None if none is, or others are to be sent."""
        return self._straggler_at_s

    def _rank(self, load: Load) -> tuple[bool, bool, bool, float]:
        model = self._shelf.models[load.of.name]
        is_idle = not load.planner.has_wants
        return is_idle, not model.is_asked, not model.ref.pinned, load.began_s

    def _send_hedges(self) -> None:
        for key, (flight, idle_s) in tuple(self._hedges.items()):
            if self._in_flight >= self._window.gets:
                return
            del self._hedges[key]
            if flight.attempts == 1 and self._hedging.has_tokens:
                self._hedging.spend()
                flight.attempts += 1
                flight.is_hedged = True
                part = flight.part._replace(hedge=1)
                self._in_flight += 1
                self._shelf.effects += (Hedged(part, idle_s), FetchPart(part))

    def _plan_load(self, load: Load, now_s: float) -> None:
        while self._in_flight < self._window.gets and load.resume_at_s <= now_s:
            if load.undescribed:
                self._look(load, next(iter(load.undescribed)))
                continue
            part_bytes = self._part_size.size_bytes
            planned = load.planner.next(WIDE_PART_BYTES if load.wide_parts else part_bytes)
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
                algorithm=load.integrity.passing(index),
            )
            self._next_part_id += 1
            self._in_flight += 1
            self._hedging.sent()
            load.in_flight[part.part_id] = Flight(part, now_s)
            self._shelf.effects.append(FetchPart(part))

    def _look(self, load: Load, index: int) -> None:
        del load.undescribed[index]
        self._in_flight += 1
        stored = load.manifest.objects[index]
        self._shelf.effects.append(Describe(FileRef(load.of, index), load.manifest.uri, stored))
