"""Who gets in, and who has to go for it: the ledger and the policy, asked together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.errors import OverBudget
from cached.core.loads import footprint_bytes
from cached.core.residency import Candidate, choose
from cached.core.units import format_bytes, format_bytes_down, format_bytes_up

if TYPE_CHECKING:
    from cached.core.ledger import Ledger
    from cached.core.loads import Model, Shelf
    from cached.core.objects import VersionRef


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
    nobody is evicted in its place. A prefetch that nobody waits for evicts nobody at all.
    """
    ledger = shelf.ledger
    free_bytes = usable_bytes(model.capacity_bytes, ledger, headroom_bytes)
    candidates = [_candidate(other) for other in shelf.models.values()]
    victims = choose(
        [candidate for candidate in candidates if candidate is not None and model.is_asked],
        needed_bytes,
        free_bytes + shelf.leaving_bytes,
        now_s,
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


def _candidate(model: Model) -> Candidate | None:
    """Return a model's current load as something that could go; None if it is not whole.

    What is being filled is promised to somebody and not a candidate.
    """
    load = model.load
    if load is None or not load.is_complete:
        return None
    return Candidate(
        of=load.of,
        size_bytes=footprint_bytes(load.manifest),
        load_s=load.load_s,
        last_used_s=model.last_used_s,
        frequency=model.frequency,
        is_leased=bool(load.holders),
        is_pinned=model.ref.pinned,
    )
