"""Who holds how many bytes of the memory budget.

A version's bytes are first reserved (promised to a load), then committed range by range
(they are on pages), then released together. Both kinds count against the budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.ranges import RangeSet

if TYPE_CHECKING:
    from cached.core.objects import FileRef, VersionRef


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

    __slots__ = ("_accounts", "budget_bytes", "committed_bytes", "used_bytes")

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.committed_bytes = 0
        self._accounts: dict[VersionRef, _Account] = {}

    @property
    def reserved_bytes(self) -> int:
        """Bytes promised and not yet on pages."""
        return self.used_bytes - self.committed_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that a reservation may still take; negative after the budget was lowered."""
        return self.budget_bytes - self.used_bytes

    def size_of(self, of: VersionRef) -> int:
        """Return the bytes of one version, reserved and committed; 0 if it has none."""
        account = self._accounts.get(of)
        return account.size_bytes if account else 0

    def committed_of(self, of: VersionRef) -> int:
        """Return the bytes of one version that are on pages."""
        account = self._accounts.get(of)
        return account.committed_bytes if account else 0

    def committed_in(self, file: FileRef) -> int:
        """Return the bytes of one file that are on pages; 0 if its version has none."""
        account = self._accounts.get(file.of)
        spans = account.committed.get(file.index, ()) if account else ()
        return sum(span.stop - span.start for span in spans)

    def reserve(self, of: VersionRef, size_bytes: int) -> None:
        """Promise ``size_bytes`` more to a version.

        Raises:
            ValueError: fewer bytes are free: a bug of the caller. Nothing changed.
        """
        if size_bytes > self.free_bytes:
            message = f"cannot reserve {size_bytes} bytes for {of}: {self.free_bytes} are free"
            raise ValueError(message)
        self._accounts.setdefault(of, _Account()).size_bytes += size_bytes
        self.used_bytes += size_bytes

    def take_over(self, of: VersionRef, size_bytes: int) -> None:
        """Count what is on pages already, whether the budget allows it or not."""
        account = self._accounts.setdefault(of, _Account())
        account.size_bytes += size_bytes
        account.committed_bytes += size_bytes
        self.used_bytes += size_bytes
        self.committed_bytes += size_bytes

    def hand_over(self, giver: FileRef, taker: FileRef, size_bytes: int) -> None:
        """Charge another version for a file that both have, before the one is released.

        Args:
            giver: the file, as the version has it that is charged now.
            taker: the same file, as the other one has it.
            size_bytes: what it takes in memory; all of it is on pages.
        """
        account = self._accounts[giver.of]
        committed_bytes = self.committed_in(giver)
        account.committed.pop(giver.index, None)
        account.size_bytes -= size_bytes
        account.committed_bytes -= committed_bytes
        other = self._accounts.setdefault(taker.of, _Account())
        other.size_bytes += size_bytes
        other.committed_bytes += committed_bytes
        ranges = other.committed.setdefault(taker.index, RangeSet())
        ranges.add(0, committed_bytes)

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
        """Give back all bytes of a version and return how many; 0 the second time."""
        account = self._accounts.pop(of, None)
        if account is None:
            return 0
        self.used_bytes -= account.size_bytes
        self.committed_bytes -= account.committed_bytes
        return account.size_bytes
