"""Who holds how many bytes of the memory budget.

A version's bytes are first reserved (promised to a load), then committed range by range
(they are on pages), then released together. Both kinds count against the budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.errors import OverBudget
from cached.core.ranges import RangeSet
from cached.core.units import format_bytes

if TYPE_CHECKING:
    from cached.core.objects import FileRef, VersionRef

__all__ = ["Ledger", "RangeSet", "over_budget"]


def over_budget(
    needed_bytes: int, free_bytes: int, leased_bytes: int, budget_bytes: int, *, name: str = ""
) -> OverBudget:
    """Return the refusal of a load that does not fit, with the numbers and what to do.

    Args:
        needed_bytes: what the load takes.
        free_bytes: what it could have had; less than 0 counts as 0.
        leased_bytes: of the budget, in versions that somebody holds.
        budget_bytes: of all versions together.
        name: of the model; left out if empty.
    """
    message = (
        f"{name or 'the load'} needs {format_bytes(needed_bytes)}, "
        f"{format_bytes(max(0, free_bytes))} free (budget {format_bytes(budget_bytes)}, "
        f"{format_bytes(leased_bytes)} of it leased)"
    )
    if needed_bytes > budget_bytes:
        hint = f"give the daemon a memory budget of at least {format_bytes(needed_bytes)}"
    else:
        hint = "close a model that is open, evict one, or give the daemon more memory"
    return OverBudget(message, hint=hint)


class _Account:
    """One version: what was promised to it, and which bytes are on pages."""

    __slots__ = ("committed", "committed_bytes", "size_bytes")

    def __init__(self) -> None:
        self.size_bytes = 0
        self.committed_bytes = 0
        self.committed: dict[int, RangeSet] = {}


class Ledger:
    """Byte accounts of one daemon.

    Attributes:
        budget_bytes: the most that all versions together may hold. It may be set at any
            time; what is held already stays, and ``free_bytes`` may become negative.
        used_bytes: reserved and committed.
        committed_bytes: on pages.
    """

    __slots__ = ("_accounts", "_leases", "budget_bytes", "committed_bytes", "used_bytes")

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.committed_bytes = 0
        self._accounts: dict[VersionRef, _Account] = {}
        self._leases: dict[VersionRef, int] = {}

    @property
    def reserved_bytes(self) -> int:
        """Bytes promised and not yet on pages."""
        return self.used_bytes - self.committed_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that a reservation may still take; negative after the budget was lowered."""
        return self.budget_bytes - self.used_bytes

    @property
    def leased_bytes(self) -> int:
        """Bytes of the versions that somebody holds, reserved ones included."""
        return sum(self.size_of(of) for of in self._leases)

    def size_of(self, of: VersionRef) -> int:
        """Return the bytes of one version, reserved and committed; 0 if it has none."""
        account = self._accounts.get(of)
        return account.size_bytes if account else 0

    def committed_of(self, of: VersionRef) -> int:
        """Return the bytes of one version that are on pages."""
        account = self._accounts.get(of)
        return account.committed_bytes if account else 0

    def reserve(self, of: VersionRef, size_bytes: int) -> None:
        """Promise ``size_bytes`` more to a version.

        Raises:
            OverBudget: fewer bytes are free. Nothing changed.
        """
        if size_bytes > self.free_bytes:
            raise over_budget(
                size_bytes, self.free_bytes, self.leased_bytes, self.budget_bytes, name=of.name
            )
        self._accounts.setdefault(of, _Account()).size_bytes += size_bytes
        self.used_bytes += size_bytes

    def commit(self, file: FileRef, start: int, stop: int) -> int:
        """Note that bytes ``[start, stop)`` of a file are on pages now.

        Returns:
            How many of them were not before; 0 for a version that was released.

        Raises:
            ValueError: more than was reserved: a bug of the caller. Nothing changed.
        """
        account = self._accounts.get(file.of)
        if account is None:
            return 0
        ranges = account.committed.setdefault(file.index, RangeSet())
        new_bytes = sum(gap.stop - gap.start for gap in ranges.missing(start, stop))
        promised_bytes = account.size_bytes - account.committed_bytes
        if new_bytes > promised_bytes:
            message = f"cannot commit {new_bytes} bytes of {file.of}: {promised_bytes} are reserved"
            raise ValueError(message)
        ranges.add(start, stop)
        account.committed_bytes += new_bytes
        self.committed_bytes += new_bytes
        return new_bytes

    def release(self, of: VersionRef) -> int:
        """Give back all bytes of a version and return how many; 0 the second time.

        Its leases are counted on: they end when their holders go.
        """
        account = self._accounts.pop(of, None)
        if account is None:
            return 0
        self.used_bytes -= account.size_bytes
        self.committed_bytes -= account.committed_bytes
        return account.size_bytes

    def lease(self, of: VersionRef) -> None:
        """Count one more holder of a version."""
        self._leases[of] = self._leases.get(of, 0) + 1

    def unlease(self, of: VersionRef) -> None:
        """Count one holder less.

        Raises:
            ValueError: there is none: a bug of the caller.
        """
        count = self._leases.pop(of, 0) - 1
        if count < 0:
            message = f"nobody holds {of}"
            raise ValueError(message)
        if count:
            self._leases[of] = count

    def is_leased(self, of: VersionRef) -> bool:
        """Return whether somebody holds a version."""
        return of in self._leases
