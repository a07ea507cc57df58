"""Who gets in, and who has to go for it: the ledger and the policy, asked together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.ledger import over_budget
from cached.core.loads import footprint_bytes
from cached.core.residency import Candidate, choose

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cached.core.errors import OverBudget
    from cached.core.ledger import Ledger
    from cached.core.loads import Model
    from cached.core.objects import VersionRef


def usable_bytes(available_bytes: int, ledger: Ledger, headroom_bytes: int) -> int:
    """Return what a new load may take: within the budget, and within what the machine has.

    Args:
        available_bytes: as probed; what is reserved but not yet on pages is still in it.
        ledger: of the budget.
        headroom_bytes: of available memory, never taken.
    """
    there_bytes = available_bytes - headroom_bytes - ledger.reserved_bytes
    return max(0, min(ledger.free_bytes, there_bytes))


def decide(
    model: Model,
    needed_bytes: int,
    models: Iterable[Model],
    ledger: Ledger,
    *,
    headroom_bytes: int,
    now_s: float,
) -> tuple[VersionRef, ...] | OverBudget:
    """Return the versions to evict so that the model fits, or why it does not.

    A prefetch that nobody waits for takes free memory only and evicts nobody.
    """
    free_bytes = usable_bytes(model.available_bytes, ledger, headroom_bytes)
    candidates = [_candidate(other) for other in models]
    victims = choose(
        [candidate for candidate in candidates if candidate is not None and model.is_asked],
        needed_bytes,
        free_bytes,
        now_s,
    )
    if victims is not None:
        return victims
    return over_budget(
        needed_bytes, free_bytes, ledger.leased_bytes, ledger.budget_bytes, name=model.ref.name
    )


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
