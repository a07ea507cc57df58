"""What all share and few may take: nobody has more of it than what is still free.

So one who takes all he can get leaves half, n of them leave one part of n + 1, and who comes next
finds as much as any of them has. The field calls it dynamic thresholds (Choudhury and Hahne, 1998,
for the memory of a packet switch).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable


class Shares:
    """Who has how much of something.

    Args:
        total: of which there is so much in all.
    """

    __slots__ = ("_free", "_taken")

    def __init__(self, total: int) -> None:
        self._free = total
        self._taken: dict[Hashable, int] = {}

    @property
    def free(self) -> int:
        """How much nobody has."""
        return self._free

    def of(self, who: Hashable) -> int:
        """Return how much somebody has."""
        return self._taken.get(who, 0)

    def take(self, who: Hashable, count: int) -> bool:
        """Give somebody so much more, if he then has no more than is left; return whether."""
        taken = self.of(who) + count
        if taken > self._free - count:
            return False
        self._free -= count
        self._taken[who] = taken
        return True

    def give_back(self, who: Hashable, count: int) -> None:
        """Take back what somebody had taken."""
        self._free += count
        self._taken[who] -= count
        if not self._taken[who]:
            del self._taken[who]
