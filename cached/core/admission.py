"""Who gets in, and who has to go for it: the ledger and the policy, asked together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.errors import OverBudget
from cached.core.loads import file_bytes
from cached.core.objects import FileRef
from cached.core.residency import Candidate, choose
from cached.core.units import format_bytes, format_bytes_down, format_bytes_up

if TYPE_CHECKING:
    from collections.abc import Container

    from cached.core.ledger import Ledger
    from cached.core.loads import Load, Model
    from cached.core.objects import Manifest, VersionRef
    from cached.core.shelf import Shelf


def shared_files(model: Model, manifest: Manifest) -> dict[int, FileRef]:
    """Return which files of a version another complete one of the model has in memory.

    Equal are those with the same path, length, ETag and place in the store.
    """
    shared: dict[int, FileRef] = {}
    for load in model.loads():
        if not load.is_complete or load.frees or load.manifest.uri != manifest.uri:
            continue
        homes = {
            (stored.key, stored.path, stored.size_bytes, stored.etag): index
            for index, stored in enumerate(load.manifest.objects)
        }
        for index, stored in enumerate(manifest.objects):
            found = homes.get((stored.key, stored.path, stored.size_bytes, stored.etag))
            if found is not None and stored.size_bytes and index not in shared:
                shared[index] = load.shared.get(found) or FileRef(load.of, found)
    return shared


def needed_bytes(manifest: Manifest, shared: Container[int]) -> int:
    """Return what a version takes in memory beside the files that it shares."""
    return sum(
        file_bytes(stored.size_bytes)
        for index, stored in enumerate(manifest.objects)
        if index not in shared
    )


def usable_bytes(capacity_bytes: int, ledger: Ledger, headroom_bytes: int) -> int:
    """Return what a new load may take: within the budget, and within what the machine has.

    Args:
        capacity_bytes: what the machine could give to all models together: what was available
            and what they had on pages at that moment.
        ledger: of the budget.
        headroom_bytes: of that memory, never taken.

    Returns:
        Less than 0 if the models have more than that already.
    """
    return min(ledger.budget_bytes, capacity_bytes - headroom_bytes) - ledger.used_bytes


def decide(
    model: Model, needed_bytes: int, shelf: Shelf, *, headroom_bytes: int, now_s: float
) -> tuple[VersionRef, ...] | OverBudget:
    """Return the versions to evict so that the model will fit, or why it cannot.

    What retired loads are about to give back counts as free: it is worth waiting for, and
    nobody is evicted in its place. For a prefetch that nobody waits for no other model goes.
    """
    ledger = shelf.ledger
    free_bytes = usable_bytes(model.capacity_bytes, ledger, headroom_bytes)
    candidates = [
        _candidate(other, load, shelf)
        for other in shelf.models.values()
        for load in other.loads()
        if load.is_complete and not load.frees and load is not other.coming
        if model.is_asked or other is model
    ]
    served = model.current.of if model.current is not None else None
    others = [candidate for candidate in candidates if candidate.of != served]
    for some in (others, candidates):  # what the model itself serves goes last
        victims = choose(some, needed_bytes, free_bytes + shelf.leaving_bytes, now_s)
        if victims is not None:
            return victims
    return over_budget(
        model.ref.name, needed_bytes, free_bytes, shelf.leased_bytes, ledger.budget_bytes
    )


def over_budget(
    name: str, needed_bytes: int, free_bytes: int, leased_bytes: int, budget_bytes: int
) -> OverBudget:
    """Return the refusal of a load that does not fit, with the numbers and what to do.

    Args:
        name: of the model.
        needed_bytes: what the load takes.
        free_bytes: what it could have had; less than 0 counts as 0.
        leased_bytes: of the budget, in versions that somebody holds.
        budget_bytes: of all versions together.
    """
    message = (
        f"{name} needs {format_bytes_up(needed_bytes)}, "
        f"{format_bytes_down(max(0, free_bytes))} free (budget {format_bytes_down(budget_bytes)}, "
        f"{format_bytes(leased_bytes)} of it leased)"
    )
    if needed_bytes > budget_bytes:
        hint = f"give the daemon a memory budget of at least {format_bytes_up(needed_bytes)}"
    else:
        hint = "close a model that is open, evict one, or give the daemon more memory"
    return OverBudget(message, hint=hint)


def _candidate(model: Model, load: Load, shelf: Shelf) -> Candidate:
    """Return a complete version as something that could go.

    What is superseded is worth less than what it was superseded by: it is there to go back to.
    """
    is_current = load is model.current
    return Candidate(
        of=load.of,
        size_bytes=shelf.gives_back(load),
        load_s=load.load_s,
        last_used_s=model.last_used_s,
        frequency=model.frequency if is_current else 0.0,
        is_leased=load.is_held,
        is_pinned=model.ref.pinned and is_current,
    )
