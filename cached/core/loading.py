"""A model's way from "listed" to resident.

What there is comes from ``listing``, who gets in is decided in ``admission``, the GETs in
``filling``, the way out in ``leaving``; what is remembered of a model is in ``loads``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core import admission
from cached.core.effects import CreateSegments, MarkReady, Publish, Refused, Switched
from cached.core.errors import (
    DaemonUnavailable,
    LoadFailed,
    ObjectChanged,
    OutOfSpace,
    OverBudget,
    Stale,
    VersionUnknown,
)
from cached.core.integrity import DIGEST, Integrity
from cached.core.loads import Load
from cached.core.objects import VersionRef
from cached.core.parts import Planner

if TYPE_CHECKING:
    from cached.core import events
    from cached.core.errors import CachedError
    from cached.core.leaving import Leaving
    from cached.core.loads import Limits, Model
    from cached.core.objects import FileRef, Manifest
    from cached.core.shelf import Shelf

MOST_PASSED_OVER = 16  # versions, the last that the operator went back from
PREFETCH_AGAIN_S = 5.0  # doubled with each failure of a prefetch, up to …
PREFETCH_AGAIN_MAX_S = 300.0


class Loading:
    """Models into memory.

    Args:
        shelf: models, loads and the ledger.
        limits: what the operator allows.
        leaving: the way out.
    """

    def __init__(self, shelf: Shelf, limits: Limits, leaving: Leaving) -> None:
        self._shelf = shelf
        self._limits = limits
        self._leaving = leaving
        self.is_ready = False

    def adopt(self, load: Load) -> None:
        """Go on with what an earlier daemon left; its bytes are in the ledger.

        Of a model the one that shall be current comes first; the others wait for their turn.
        """
        model = self._shelf.models[load.of.name]
        if model.coming is not None:
            model.left.append(load)
            return
        model.is_confirmed = False
        self._open(model, load, "adopt")

    def _open(self, model: Model, load: Load, trigger: str) -> None:
        """Have the files of a version opened that an earlier daemon left."""
        model.advance(trigger)
        model.coming = load
        self._shelf.effects.append(CreateSegments(load.of, load.manifest, load.shared))

    def _open_next(self, model: Model, now_s: float) -> None:
        """Open the next complete version that was left; after the last, ask the store."""
        for load in model.left:
            if load.is_aside:
                model.left.remove(load)
                self._open(model, load, "adopt")
                return
        self._leaving.thin(model)
        self._shelf.is_room_made = True
        if not model.is_confirmed:
            model.look_at_s = now_s

    def drop_left(self, model: Model, reason: str = "left") -> bool:
        """Have what an earlier daemon left go, if it has not gone on; return whether any does."""
        left = tuple(model.left)
        for load in left:
            self._leaving.drop(load, reason)
        return bool(left)

    def go_back(self, model: Model, version: str) -> None:
        """Make a version current that is in memory; it stays so until the operator refreshes.

        Raises:
            VersionUnknown: it is not in memory, or on its way out.
            DaemonUnavailable: the daemon has just started, and does not know yet.
        """
        load = model.having(version)
        is_current = load is not None and load is model.current
        if is_current and (model.state in {"idle", "failed"} or model.is_taking_over):
            return
        if model.is_taking_over:
            message = f"what an earlier daemon left of {model.ref.name} is not all opened yet"
            raise DaemonUnavailable(message, hint="try again in a moment")
        if load is None or not load.is_complete or load.frees:
            raise unknown_version(model, version)
        newer = [each.of.version for each in (model.current, model.coming) if each is not None]
        if model.pending is not None:
            newer.append(model.pending.version)
        passed_over = [each for each in (*model.passed_over, *newer) if each != version]
        self.give_up(model, "asked")
        model.passed_over = tuple(dict.fromkeys(passed_over))[-MOST_PASSED_OVER:]
        if is_current:  # and another was on its way
            self._shelf.effects.append(Publish(load.of, passed_over=model.passed_over))
        else:
            self._return(model, load)

    def end_rollback(self, model: Model) -> None:
        """From now on the version that the store lists counts again."""
        was_told, model.passed_over = bool(model.passed_over), ()
        if was_told and model.current is not None:
            self._shelf.effects.append(Publish(model.current.of))  # which tells the next daemon

    def _return(self, model: Model, load: Load) -> None:
        """Publish a version again that is in memory, complete."""
        model.advance("return")
        model.kept.remove(load)
        model.coming = load
        model.pending = None
        model.error = None
        load.leaving = ""
        self._shelf.effects.append(Publish(load.of, passed_over=model.passed_over))

    def admit_all(self, now_s: float) -> None:
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
        twin = next((each for each in model.kept if each.of.version == manifest.version), None)
        if twin is not None:
            if not twin.frees:  # else what becomes of it is awaited
                self._return(model, twin)
            return
        half = next((each for each in model.left if each.of.version == manifest.version), None)
        if half is not None:
            model.left.remove(half)
            model.pending = None
            model.error = None
            self._open(model, half, "reserved")
            return
        self.drop_left(model)
        shared = admission.shared_files(model, manifest)
        needed_bytes = admission.needed_bytes(manifest, shared)
        headroom_bytes = self._limits.headroom_bytes
        verdict = admission.decide(
            model, needed_bytes, self._shelf, headroom_bytes=headroom_bytes, now_s=now_s
        )
        if verdict and self._may_find_room(model):
            return  # asked again when it has
        if isinstance(verdict, OverBudget):
            self._refuse(model, needed_bytes, verdict, now_s)
            return
        for victim in verdict:
            load = self._shelf.find(victim)
            if load is not None:
                self._leaving.evict(load, "budget")
        ledger = self._shelf.ledger
        if needed_bytes <= admission.usable_bytes(model.capacity_bytes, ledger, headroom_bytes):
            self._begin(model, manifest, shared, now_s)
        # else asked again with every load that was freed, or was not

    def _may_find_room(self, model: Model) -> bool:
        """Return whether what an earlier daemon left of other models may yet make room."""
        others = self._shelf.models.values()
        if any(other.is_taking_over for other in others):
            return True
        return model.is_asked and any(self.drop_left(other) for other in others)

    def _refuse(self, model: Model, needed_bytes: int, refusal: OverBudget, now_s: float) -> None:
        """Fail; or, where an older version serves on, wait until there is room for both."""
        if model.current is None or needed_bytes > self._shelf.ledger.budget_bytes:
            self.model_failed(model, refusal, now_s)
        elif not model.is_refusal_told:
            model.is_refusal_told = True
            model.error = refusal
            refused = Refused(model.ref.name, refusal.code, refusal.message, refusal.hint)
            self._shelf.effects.append(refused)

    def _begin(
        self, model: Model, manifest: Manifest, shared: dict[int, FileRef], now_s: float
    ) -> None:
        of = VersionRef(model.ref.name, manifest.version, self._shelf.next_load())
        self._shelf.ledger.reserve(of, admission.needed_bytes(manifest, shared))
        learnt = model.learnt[1] if model.learnt[0] == of.version else ()
        is_checked_first = self._limits.verify == DIGEST
        planner = Planner(manifest, learnt=learnt, is_checked_first=is_checked_first)
        integrity = Integrity(
            manifest,
            planner,
            verify=self._limits.verify,
            can=self._limits.can_check,
            checked=self._shelf.checked_by(shared),
        )
        model.coming = Load(of, manifest, planner, now_s, integrity=integrity, shared=shared)
        model.pending = None
        model.error = None
        model.advance("reserved")
        self._shelf.effects.append(CreateSegments(of, manifest, shared))

    def segments_failed(self, event: events.SegmentsFailed, now_s: float) -> None:
        """There was no room for them after all, or they cannot be shown."""
        load = self._shelf.coming(event.of)
        if load is None:
            return
        if load.is_complete:  # it was to become current again, and is as complete as before
            model = self._shelf.models[load.of.name]
            model.coming = None
            model.kept.append(load)
            load.leaving = "superseded"
            self.model_failed(model, event.error, now_s)
        else:
            self.load_failed(load, event.error, now_s)

    def published(self, event: events.Published, now_s: float) -> None:
        """The version is complete, read-only, visible and current."""
        load = self._shelf.coming(event.of)
        if load is None:
            return
        model = self._shelf.models[event.of.name]
        model.advance("published")
        model.coming = None
        if not load.is_complete:
            load.path = event.path
            load.load_s = now_s - load.began_s
        self._shelf.changed[model.ref.name] = None
        if load.is_aside:
            load.is_aside = False
            load.leaving = "superseded"
            model.kept.insert(0, load)
            self._open_next(model, now_s)
            return
        before, model.current = model.current, load
        model.is_asked = False
        model.was_resident = True
        model.prefetch_failures = 0
        model.learnt = (load.of.version, tuple(load.planner.touched))
        model.is_confirmed = model.listed_s is not None
        if before is not None:
            self._leaving.supersede(model, before)
        switched = Switched(load.of, before.of.version if before is not None else "")
        self._shelf.effects.append(switched)
        interval_s = self._limits.refresh_interval_s
        model.look_at_s = now_s + interval_s if interval_s else None
        self.latch_ready()
        if load.is_adopted:
            self._open_next(model, now_s)

    def latch_ready(self) -> None:
        """See whether all that is prefetched at start has been complete once."""
        wanted = [model for model in self._shelf.models.values() if model.ref.prefetch]
        if not self.is_ready and all(model.was_resident for model in wanted):
            self.is_ready = True
            self._shelf.effects.append(MarkReady())

    def load_failed(self, load: Load, error: CachedError, now_s: float) -> None:
        """Give a load up: everyone who waits for it hears why."""
        model = self._shelf.models[load.of.name]
        load.error = told = _told(error, load.of)
        reason = "stale" if isinstance(error, ObjectChanged) else "failed"
        if load.is_aside:
            model.advance("evict")
            self._leaving.drop(load, reason)
            self._shelf.effects.append(Refused(load.of.name, error.code, told.message, told.hint))
            self._open_next(model, now_s)
            return
        model.advance("fail")
        self._leaving.drop(load, reason)
        if load.is_adopted:
            self.drop_left(model)
        self._note_failure(model, error, now_s)

    def model_failed(self, model: Model, error: CachedError, now_s: float) -> None:
        """Give a model up that has no load yet."""
        model.pending = None
        model.advance("fail")
        self._note_failure(model, error, now_s)

    def _note_failure(self, model: Model, error: CachedError, now_s: float) -> None:
        model.error = told = _told(error, VersionRef(model.ref.name, ""))
        model.is_asked = False
        self._shelf.changed[model.ref.name] = None
        self._shelf.effects.append(Refused(model.ref.name, error.code, told.message, told.hint))
        is_wanted = model.ref.prefetch or not model.is_confirmed
        if is_wanted and (error.transient or isinstance(error, ObjectChanged)):
            wait_s = PREFETCH_AGAIN_S * 2 ** min(model.prefetch_failures, 10)
            model.retry_at_s = now_s + min(wait_s, PREFETCH_AGAIN_MAX_S)
            model.prefetch_failures += 1

    def give_up(self, model: Model, reason: str) -> None:
        """Give up what is on its way; workers that wait for the model want it anew.

        They get it from a listing of then.
        """
        if model.state != "idle":
            model.advance("evict")
        model.pending = None
        model.retry_at_s = None
        model.is_asked = False
        model.listing += 1  # what is under way counts no more
        self._shelf.changed[model.ref.name] = None
        self._shelf.is_room_made = True
        if model.coming is not None:
            coming, model.coming = model.coming, None
            if coming.is_complete:
                model.kept.append(coming)
                self._leaving.evict(coming, reason)
            else:
                self._leaving.drop(coming, reason)
        self.drop_left(model, reason)


def unknown_version(model: Model, version: str) -> VersionUnknown:
    """Return the refusal of a version that cannot be had, with those that can.

    One that the operator went back from is not loaded for whoever names it: that would bring it
    back behind his back.
    """
    offered = dict.fromkeys(load.of.version for load in model.offers() if not load.frees)
    name = model.ref.name
    there = f"there are {', '.join(offered)}" if offered else "nothing of it is there"
    message = f"{name} has no version {version[:64]!r} in memory: {there}"
    if version in model.passed_over:
        hint = f"the operator went back from it; to have it again: cached refresh {name}"
        return VersionUnknown(message, hint=hint)
    if not offered:
        hint = f"cached prefetch {name} loads the version that the store lists"
        return VersionUnknown(message, hint=hint)
    return VersionUnknown(message, hint=f"cached status {name} lists them")


def _told(error: CachedError, of: VersionRef) -> CachedError:
    """Return the error as a worker shall see it."""
    if isinstance(error, ObjectChanged):
        return Stale(error.message, hint="open the model again to get the new version")
    if isinstance(error, OverBudget | OutOfSpace | LoadFailed):
        return error
    return LoadFailed(f"cannot load {of.name}: {error.message}", hint=error.hint)
