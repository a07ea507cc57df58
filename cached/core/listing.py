"""What the store has: when it is asked, and what its answer changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.backoff import delay_s
from cached.core.digests import MANIFEST_NAME, has_list
from cached.core.effects import Resolve, Retried
from cached.core.errors import LoadFailed, StoreError
from cached.core.integrity import DIGEST
from cached.core.residency import touched

if TYPE_CHECKING:
    from cached.core import events
    from cached.core.loading import Loading
    from cached.core.loads import Limits, Model
    from cached.core.objects import Manifest
    from cached.core.shelf import Shelf

RESOLVE_ATTEMPTS = 6  # back-off from 0.1 s: openers hear of a dead store within 7 s
FREQUENCY_HALF_LIFE_S = 3600.0
LISTED_S = 1.0  # what the store told so short a time ago counts as what it has now


class Listing:
    """Models that are wanted, and the listings of them.

    Args:
        shelf: models, loads and the ledger.
        limits: what the operator allows.
        loading: goes on with what was listed.
    """

    def __init__(self, shelf: Shelf, limits: Limits, loading: Loading) -> None:
        self._shelf = shelf
        self._limits = limits
        self._loading = loading

    def start(self, now_s: float) -> None:
        """Begin what is prefetched at start and was not adopted."""
        for model in self._shelf.models.values():
            if model.ref.prefetch:
                self.want(model, now_s, is_asked=False)
        self._loading.latch_ready()

    def want(self, model: Model, now_s: float, *, is_asked: bool = True) -> None:
        """See to it that the model is resident or on its way.

        Args:
            model: any.
            now_s: monotonic.
            is_asked: a worker or the operator waits for it: others may be evicted for it.
        """
        if model.current is None:
            self.refresh(model, now_s, is_asked=is_asked)

    def refresh(self, model: Model, now_s: float, *, is_asked: bool = True) -> None:
        """Ask the store what there is, and have it in memory, beside what is there already.

        Args:
            model: any.
            now_s: monotonic.
            is_asked: others may be evicted for it.
        """
        if self._shelf.is_draining:
            return
        model.is_asked = model.is_asked or is_asked
        if model.state in {"idle", "failed"}:
            model.advance("want")
            model.attempts = 0
            self._list(model)
        elif model.state == "admitting":
            self._shelf.is_room_made = True  # may evict now, where a mere prefetch had to wait

    def look_for(self, model: Model, version: str, now_s: float) -> int:
        """See to it that the store is asked for a version that is not in memory.

        Not so if it told a moment ago what there is: workers shall not make it a busy store.

        Returns:
            The number of the listing that decides.
        """
        is_recent = model.listed_s is not None and now_s - model.listed_s < LISTED_S
        if model.having(version) is None and not model.is_under_way and not is_recent:
            self.refresh(model, now_s)
        return model.listing

    def hurry(self, model: Model, now_s: float) -> None:
        """Ask the store again now, if a model waits to do that, or for room."""
        if model.state == "resolving" and model.retry_at_s is not None:
            self._list(model)
        elif model.state == "admitting" and model.current is not None:
            model.advance("evict")
            model.advance("want")
            self._list(model)
        if model.coming is not None:
            model.coming.resume_at_s = min(model.coming.resume_at_s, now_s)

    def _list(self, model: Model) -> None:
        model.retry_at_s = None
        model.listing += 1
        self._shelf.effects.append(Resolve(model.ref, model.listing))

    def used(self, model: Model, now_s: float) -> None:
        """Count an open."""
        model.opens += 1
        model.frequency = touched(
            model.frequency, model.last_used_s, now_s, half_life_s=FREQUENCY_HALF_LIFE_S
        )
        model.last_used_s = now_s

    def resolved(self, event: events.Resolved, now_s: float) -> None:
        """Take the manifest and make room for it, unless it is there already."""
        model = self._shelf.models[event.name]
        if event.listing != model.listing:
            return  # the model was evicted in the meantime
        version = event.manifest.version
        model.listed_s = now_s
        model.prefetch_failures = 0
        self._shelf.changed[event.name] = None
        current = model.current
        is_passed_over = current is not None and version in model.passed_over
        if not is_passed_over:
            self._loading.end_rollback(model)
        if current is not None and (current.of.version == version or is_passed_over):
            model.is_confirmed = True
            model.is_asked = False
            model.error = None
            model.advance("same")
            self._loading.drop_left(model)
            self._shelf.is_room_made = True
            return
        if self._limits.verify == DIGEST and not has_list(event.manifest):
            self._loading.model_failed(model, _no_list(event.manifest), now_s)
            return
        model.advance("resolved")
        model.pending = event.manifest
        model.is_refusal_told = False
        model.capacity_bytes = event.available_bytes + self._shelf.ledger.committed_bytes
        self._shelf.is_room_made = True

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
            self._loading.model_failed(model, event.error, now_s)
        self._shelf.is_room_made = True

    def ticked(self, now_s: float) -> None:
        """Do what was put off until now."""
        if self._shelf.is_draining:
            return
        for model in self._shelf.models.values():
            if model.retry_at_s is not None and model.retry_at_s <= now_s:
                if model.state == "resolving":
                    self._list(model)
                else:
                    model.retry_at_s = None
                    self.refresh(model, now_s, is_asked=False)
            if model.look_at_s is not None and model.look_at_s <= now_s:
                interval_s = self._limits.refresh_interval_s
                model.look_at_s = now_s + interval_s if interval_s else None
                if model.current is not None and model.state in {"idle", "failed"}:
                    self.refresh(model, now_s, is_asked=False)

    def wake_at_s(self, now_s: float) -> float | None:
        """Return when there is something to do though nothing happens; None if never."""
        times: list[float | None] = []
        for model in self._shelf.models.values():
            if not self._shelf.is_draining:
                times += [model.retry_at_s, model.look_at_s]
            if model.coming is not None and model.coming.resume_at_s > now_s:
                times.append(model.coming.resume_at_s)
        return min((time_s for time_s in times if time_s is not None), default=None)


def _no_list(manifest: Manifest) -> LoadFailed:
    message = f"there is no {MANIFEST_NAME} at {manifest.uri}, and verify is {DIGEST}"
    is_object = len(manifest.objects) == 1 and manifest.uri.endswith(manifest.objects[0].key)
    if not is_object:  # a directory may be named without / at its end
        return LoadFailed(message, hint=f"write one: cached digest {manifest.uri}")
    return LoadFailed(message, hint="name the prefix that holds the object, and write one there")
