"""Who gets in, and who has to go for it: the ledger and the policy, asked together."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Final

from cached.core.errors import OverBudget
from cached.core.loads import file_bytes
from cached.core.objects import FileRef
from cached.core.residency import Candidate, choose
from cached.core.units import format_bytes, format_bytes_down, format_bytes_up

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from cached.core.ledger import Ledger
    from cached.core.loads import Load, Model
    from cached.core.objects import Manifest, VersionRef
    from cached.core.shelf import Shelf

USUAL_BYTES_PER_S: Final = 500e6  # of S3, where nothing was fetched yet; only ratios matter


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
    loads = {
        load.of: (other, load)
        for other in shelf.models.values()
        for load in other.loads()
        if load.is_complete and not load.frees and load is not other.coming
        if model.is_asked or other is model
    }
    usual = _seconds_a_byte(load for _, load in loads.values())
    candidates = [_candidate(other, load, usual) for other, load in loads.values()]
    leaving = shelf.leaving
    leaving_bytes = shelf.gives_back(leaving)

    def gives_back(some: Sequence[VersionRef]) -> int:
        return shelf.gives_back([*leaving, *(loads[of][1] for of in some)]) - leaving_bytes

    served = model.current.of if model.current is not None else None
    others = [candidate for candidate in candidates if candidate.of != served]
    for some in (others, candidates):  # what the model itself serves goes last
        victims = choose(
            some, needed_bytes, free_bytes + leaving_bytes, now_s, gives_back=gives_back
        )
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


def _candidate(model: Model, load: Load, usual: float) -> Candidate:
    """Return a complete version as something that could go.

    What is superseded is worth less than what it was superseded by: it is there to go back to.
    What the operator went back to stays: once it is gone, the store's version takes its place.
    """
    is_current = load is model.current
    size_bytes = needed_bytes(load.manifest, ())
    return Candidate(
        of=load.of,
        size_bytes=size_bytes,
        load_s=load.load_s if _is_fetched(load) else size_bytes * usual,
        last_used_s=model.last_used_s,
        frequency=model.frequency if is_current else 0.0,
        is_leased=load.is_held,
        is_pinned=is_current and (model.ref.pinned or bool(model.passed_over)),
        is_superseded=not is_current,
    )


def _is_fetched(load: Load) -> bool:
    """Return whether its ``load_s`` is what fetching all of it took."""
    return not load.is_adopted and not load.shared and needed_bytes(load.manifest, ()) > 0


def _seconds_a_byte(loads: Iterable[Load]) -> float:
    """Return what fetching took lately, for those of which nobody knows: the median."""
    known = [load.load_s / needed_bytes(load.manifest, ()) for load in loads if _is_fetched(load)]
    return median(known) if known else 1 / USUAL_BYTES_PER_S
