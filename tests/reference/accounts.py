"""A ledger that knows every byte by its number."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cached.core.objects import VersionRef


class NaiveLedger:
    """What ``Ledger`` promises, with dicts and sets."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.sizes: dict[VersionRef, int] = {}
        self.on_pages: dict[VersionRef, set[tuple[int, int]]] = {}

    def used(self) -> int:
        return sum(self.sizes.values())

    def committed(self, of: VersionRef) -> int:
        return len(self.on_pages.get(of, ()))

    def new(self, of: VersionRef, index: int, start: int, stop: int) -> set[tuple[int, int]]:
        return {(index, at) for at in range(start, stop)} - self.on_pages.get(of, set())
