"""A model's way from "wanted" to resident, and out of memory again.

Who gets in is decided in ``admission``, the GETs in ``filling``; what is remembered of a
model is in ``loads``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core import admission
from cached.core.effects import (
    CancelParts,
    CreateSegments,
    Evicted,
    MarkReady,
    Refused,
    Resolve,
    Retried,
)
from cached.core.errors import LoadFailed, ObjectChanged, OutOfSpace, OverBudget, Stale, StoreError
from cached.core.loads import Load, delay_s, footprint_bytes
from cached.core.objects import VersionRef
from cached.core.parts import Planner
from cached.core.residency import touched

if TYPE_CHECKING:
    from cached.core import events
    from cached.core.errors import CachedError
    from cached.core.loads import Limits, Model, Shelf

FREE_AGAIN_S = 1.0  # how often a version that is mapped by path alone is probed (3 us each)
RESOLVE_ATTEMPTS = 6  # back-off from 0.1 s: openers hear of a dead store within 7 s
PREFETCH_AGAIN_S = 5.0  # doubled with each failure of a prefetch, up to …
PREFETCH_AGAIN_MAX_S = 300.0
FREQUENCY_HALF_LIFE_S = 3600.0


class Loading:
    """Models in and out of memory.

    Args:
        shelf: models, loads and the ledger.
        limits: what the operator allows.
    """

    def __init__(self, shelf: Shelf, limits: Limits) -> None:
        self._shelf = shelf
        self._limits = limits
        self._free_again_s: float | None = None
        self.is_ready = False

    def start(self, now_s: float) -> None:
        """Begin what is prefetched at start."""
        for model in self._shelf.models.values():
            if model.ref.prefetch:
                self.want(model, now_s, is_asked=False)
        self._latch_ready()

    def want(self, model: Model, now_s: float, *, is_asked: bool = True) -> None:
        """See to it that the model is resident or on its way.

        Args:
            model: any.
            now_s: monotonic.
            is_asked: a worker or the operator waits for it: others may be evicted for it.
        """
        if self._shelf.is_draining:
            return
        model.is_asked = model.is_asked or is_asked
        if model.state in {"absent", "failed"}:
            model.advance("want")
            model.attempts = 0
            self._list(model)
        elif model.state == "admitting":
            self._admit(model, now_s)  # may evict now, where a mere prefetch had to wait

    def hurry(self, model: Model, now_s: float) -> None:
        """Ask the store again now, if a model waits to do that."""
        if model.state == "resolving" and model.retry_at_s is not None:
            self._list(model)
        if model.load is not None:
            model.load.resume_at_s = min(model.load.resume_at_s, now_s)

    def _list(self, model: Model) -> None:
        model.retry_at_s = None
        model.listing += 1
        self._shelf.effects.append(Resolve(model.ref, model.listing))

    def lease_ended(self, load: Load, now_s: float) -> None:
        """Free what nobody holds any more; others may get in in its place now."""
        if load.of in self._shelf.retired and not load.holders and not load.in_flight:
            self._shelf.free(load)
        self._admit_all(now_s)

    def used(self, model: Model, now_s: float) -> None:
        """Count an open."""
        model.opens += 1
        model.frequency = touched(
            model.frequency, model.last_used_s, now_s, half_life_s=FREQUENCY_HALF_LIFE_S
        )
        model.last_used_s = now_s

    def resolved(self, event: events.Resolved, now_s: float) -> None:
        """Take the manifest and make room for it."""
        model = self._shelf.models[event.name]
        if event.listing != model.listing:
            return  # the model was evicted in the meantime
        model.advance("resolved")
        model.pending = event.manifest
        model.capacity_bytes = event.available_bytes + self._shelf.ledger.committed_bytes
        self._admit_all(now_s)

    def resolve_failed(self, event: events.ResolveFailed, now_s: float) -> None:
        """Try again later, or tell those who wait."""
        model = self._shelf.models[event.name]
        if event.listing != model.listing:
            return
        model.attempts += 1
        model.error = event.error
        if event.error.transient and model.attempts < RESOLVE_ATTEMPTS:
            asked_s = event.error.retry_after_s if isinstance(event.error, StoreError) else None
            wait_s = delay_s(model.attempts, event.jitter_ratio, asked_s)
            model.retry_at_s = now_s + wait_s
            self._shelf.changed[event.name] = None  # nobody waits for that in a drain
            retried = Retried(event.name, event.error.code, wait_s, str(event.error))
            self._shelf.effects.append(retried)
        else:
            self._model_failed(model, event.error, now_s)
        self._admit_all(now_s)

    def _admit_all(self, now_s: float) -> None:
        """Let all who wait for room try again, in the order of the configuration."""
        for model in self._shelf.models.values():
            if model.state == "admitting":
                self._admit(model, now_s)

    def _has_turn(self, model: Model) -> bool:
        """Return whether no prefetch that comes first in the configuration is about to be listed.

        One whose listing had to be put off holds nobody up.
        """
        if model.is_asked:
            return True
        for other in self._shelf.models.values():
            if other is model:
                break
            if other.ref.prefetch and other.state == "resolving" and not other.attempts:
                return False
        return True

    def _admit(self, model: Model, now_s: float) -> None:
        manifest = model.pending
        if manifest is None or not self._has_turn(model):
            return
        needed_bytes = footprint_bytes(manifest)
        headroom_bytes = self._limits.headroom_bytes
        verdict = admission.decide(
            model, needed_bytes, self._shelf, headroom_bytes=headroom_bytes, now_s=now_s
        )
        if isinstance(verdict, OverBudget):
            self._model_failed(model, verdict, now_s)
            return
        for victim in verdict:
            self.retire(self._shelf.models[victim.name], "budget")
        ledger = self._shelf.ledger
        if needed_bytes > admission.usable_bytes(model.capacity_bytes, ledger, headroom_bytes):
            return  # asked again with every load that was freed, or was not
        of = VersionRef(model.ref.name, manifest.version, self._shelf.next_load())
        ledger.reserve(of, needed_bytes)
        learnt = model.learnt[1] if model.learnt[0] == of.version else ()
        model.load = Load(of, manifest, Planner(manifest, learnt=learnt), now_s)
        model.pending = None
        model.error = None
        model.advance("reserved")
        self._shelf.effects.append(CreateSegments(of, manifest))

    def segments_failed(self, event: events.SegmentsFailed, now_s: float) -> None:
        """There was no room for them after all."""
        load = self._shelf.current(event.of)
        if load is not None:
            self.load_failed(load, event.error, now_s)

    def published(self, event: events.Published, now_s: float) -> None:
        """The version is complete, read-only and visible."""
        load = self._shelf.current(event.of)
        if load is None:
            return
        model = self._shelf.models[event.of.name]
        model.advance("published")
        model.is_asked = False
        model.was_resident = True
        model.prefetch_failures = 0
        model.learnt = (load.of.version, tuple(load.planner.touched))
        load.path = event.path
        load.load_s = now_s - load.began_s
        self._shelf.changed[model.ref.name] = None
        self._latch_ready()

    def _latch_ready(self) -> None:
        wanted = [model for model in self._shelf.models.values() if model.ref.prefetch]
        if not self.is_ready and all(model.was_resident for model in wanted):
            self.is_ready = True
            self._shelf.effects.append(MarkReady())

    def load_failed(self, load: Load, error: CachedError, now_s: float) -> None:
        """Give a load up: everyone who waits for it hears why."""
        model = self._shelf.models[load.of.name]
        load.error = _told(error, load.of)
        self.retire(model, "stale" if isinstance(error, ObjectChanged) else "failed")
        self._note_failure(model, error, now_s)

    def _model_failed(self, model: Model, error: CachedError, now_s: float) -> None:
        model.pending = None
        model.advance("fail")
        self._note_failure(model, error, now_s)

    def _note_failure(self, model: Model, error: CachedError, now_s: float) -> None:
        model.error = _told(error, VersionRef(model.ref.name, ""))
        model.is_asked = False
        self._shelf.changed[model.ref.name] = None
        told = model.error
        self._shelf.effects.append(Refused(model.ref.name, error.code, told.message, told.hint))
        if model.ref.prefetch and (error.transient or isinstance(error, ObjectChanged)):
            wait_s = PREFETCH_AGAIN_S * 2 ** min(model.prefetch_failures, 10)
            model.retry_at_s = now_s + min(wait_s, PREFETCH_AGAIN_MAX_S)
            model.prefetch_failures += 1

    def evict(self, model: Model, now_s: float) -> int:
        """Do as the operator says: out of memory, or off the way there; return its bytes.

        Workers that wait for the model want it anew: from a listing of now.
        """
        if model.load is not None:
            return self.retire(model, "asked")
        if model.state in {"resolving", "admitting", "failed"}:
            model.advance("evict")
            model.pending = None
            model.retry_at_s = None
            model.is_asked = False
            model.listing += 1  # what is under way counts no more
            self._shelf.changed[model.ref.name] = None
            self._admit_all(now_s)
        return 0

    def retire(self, model: Model, reason: str) -> int:
        """Take the model's current load out of use; return its bytes.

        The memory is counted until ``Freed``. In-flight GETs are cut and waited for.
        """
        load = model.load
        if load is None:
            return 0
        model.is_asked = False
        model.advance("evict" if load.error is None else "fail")
        model.load = None
        self._shelf.retired[load.of] = load
        self._shelf.changed[load.of.name] = None
        size_bytes = footprint_bytes(load.manifest)
        self._shelf.effects.append(Evicted(load.of, reason, size_bytes))
        if load.in_flight:
            self._shelf.effects.append(CancelParts(load.of))
        else:
            self._shelf.free(load)
        return size_bytes

    def freed(self, event: events.Freed, now_s: float) -> None:
        """The memory is back: let those who wait for room try again."""
        load = self._shelf.retired.pop(event.of, None)
        if load is None:
            return
        self._shelf.ledger.release(event.of)
        self._shelf.changed[event.of.name] = None
        self._admit_all(now_s)

    def not_freed(self, of: VersionRef, now_s: float) -> None:
        """Somebody maps a retired version, or it cannot be unlinked: try again, look elsewhere."""
        load = self._shelf.retired.get(of)
        if load is None:
            return
        load.frees -= 1
        if self._free_again_s is None and not load.holders:  # the last holder's end is an event
            self._free_again_s = now_s + FREE_AGAIN_S
        self._admit_all(now_s)

    def ticked(self, now_s: float) -> None:
        """Do what was put off until now."""
        if self._free_again_s is not None and self._free_again_s <= now_s:
            self._free_again_s = None
            for load in self._shelf.retired.values():
                if not (load.holders or load.in_flight or load.frees):
                    self._shelf.free(load)
        for model in self._shelf.models.values():
            if model.retry_at_s is None or model.retry_at_s > now_s or self._shelf.is_draining:
                continue
            if model.state == "resolving":
                self._list(model)
            else:
                self.want(model, now_s, is_asked=False)

    def wake_at_s(self, now_s: float) -> float | None:
        """Return when there is something to do though nothing happens; None if never."""
        times = [self._free_again_s]
        for model in self._shelf.models.values():
            if not self._shelf.is_draining:
                times.append(model.retry_at_s)
            if model.load is not None and model.load.resume_at_s > now_s:
                times.append(model.load.resume_at_s)
        return min((time_s for time_s in times if time_s is not None), default=None)


def _told(error: CachedError, of: VersionRef) -> CachedError:
    """Return the error as a worker shall see it."""
    if isinstance(error, ObjectChanged):
        return Stale(error.message, hint="open the model again to get the new version")
    if isinstance(error, OverBudget | OutOfSpace | LoadFailed):
        return error
    return LoadFailed(f"cannot load {of.name}: {error.message}", hint=error.hint)
