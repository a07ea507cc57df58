"""A version's way out of memory.

A complete one goes gently: the files stay where they are as long as anybody has them open or
mapped, also programs that know only the path. One that failed goes at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.effects import CancelParts, Evicted

if TYPE_CHECKING:
    from cached.core.loads import Limits, Load, Model
    from cached.core.objects import VersionRef
    from cached.core.shelf import Shelf

FREE_AGAIN_S = 0.5  # how often a version that is mapped by path alone is probed (3 us each)


class Leaving:
    """Versions on their way out.

    Args:
        shelf: models, loads and the ledger.
        limits: what the operator allows.
    """

    def __init__(self, shelf: Shelf, limits: Limits) -> None:
        self._shelf = shelf
        self._limits = limits
        self._again_s: float | None = None

    def drop(self, load: Load, reason: str) -> None:
        """Take a load that is coming, or was left, out of use; its model's state is up to others.

        GETs in flight are cut and waited for.
        """
        model = self._shelf.models[load.of.name]
        if load in model.left:
            model.left.remove(load)
        else:
            model.coming = None
        load.leaving = reason
        self._shelf.retired[load.of] = load
        self._shelf.changed[load.of.name] = None
        evicted = Evicted(load.of, reason, self._shelf.ledger.size_of(load.of))
        self._shelf.effects.append(evicted)
        if load.in_flight:
            self._shelf.effects.append(CancelParts(load.of))
        else:
            self._shelf.free(load)

    def evict(self, load: Load, reason: str) -> None:
        """Take a complete version out of memory, unless somebody turns out to have it."""
        model = self._shelf.models[load.of.name]
        if model.current is load:
            model.current = None
            model.kept.append(load)
        load.leaving = reason
        self._shelf.changed[load.of.name] = None
        if not load.frees:
            self._shelf.free(load, if_unused=True)

    def supersede(self, model: Model, load: Load) -> None:
        """Have a version leave that another one has replaced, once nobody has it."""
        load.leaving = "superseded"
        model.kept.append(load)
        self.thin(model)

    def thin(self, model: Model) -> None:
        """Free what is superseded, unless somebody has it or it is kept to go back to."""
        count = len(model.kept)
        for at, load in enumerate(model.kept):
            is_retained = load.leaving == "superseded" and count - at <= self._limits.kept_versions
            if not (is_retained or load.is_held or load.frees):
                self._shelf.free(load, if_unused=True)

    def lease_ended(self, load: Load) -> None:
        """Free what nobody has any more."""
        if not load.holders:
            if load.of in self._shelf.retired:
                self.gets_ended(load)
            else:
                self.thin(self._shelf.models[load.of.name])
        self._shelf.is_room_made = True

    def gets_ended(self, load: Load) -> None:
        """Free a retired load that no GET writes into any more."""
        if not load.in_flight and not load.frees:
            self._shelf.free(load)

    def freed(self, of: VersionRef) -> None:
        """The memory is back."""
        load = self._shelf.find(of)
        if load is not None:
            self._shelf.forget(load)

    def not_freed(self, of: VersionRef, now_s: float) -> None:
        """Somebody has it, or it cannot be unlinked: try again later, look elsewhere."""
        load = self._shelf.find(of)
        if load is None:
            return
        load.frees -= 1
        self._shelf.is_room_made = True
        self._shelf.changed[of.name] = None
        if of not in self._shelf.retired:
            load.is_mapped = True
            self._reinstate(self._shelf.models[of.name], load)
        elif load.holders:
            return  # the last holder's end is an event
        if self._again_s is None:
            self._again_s = now_s + FREE_AGAIN_S

    @staticmethod
    def _reinstate(model: Model, load: Load) -> None:
        """Offer again what was to be evicted, if nothing has taken its place."""
        is_idle = model.state in {"idle", "failed"}
        if load.leaving != "superseded" and model.current is None and is_idle:
            model.kept.remove(load)
            model.current = load
            load.leaving = ""

    def ticked(self, now_s: float) -> None:
        """Look again at what somebody had a while ago."""
        if self._again_s is None or self._again_s > now_s:
            return
        self._again_s = None
        self._shelf.is_room_made = True
        for load in self._shelf.retired.values():
            if not (load.holders or load.in_flight or load.frees):
                self._shelf.free(load)
        for model in self._shelf.models.values():
            for load in model.loads():
                load.is_mapped = False
            self.thin(model)

    def wake_at_s(self) -> float | None:
        """Return when to look again; None if there is nothing to look at."""
        return self._again_s
