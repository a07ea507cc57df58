"""How much of a caller's time is left; the client reads the clock here and nowhere else."""

from __future__ import annotations

import time

LONGEST_S = 86_400.0  # of one wait in the kernel; whoever waits looks again


class Deadline:
    """A moment in the future.

    Args:
        timeout_s: from now; ``None``: never.

    Attributes:
        timeout_s: as it was given, for messages.

    Raises:
        ValueError: it is no number.
    """

    __slots__ = ("_at_s", "timeout_s")

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        try:
            self._at_s = None if timeout_s is None else time.monotonic() + timeout_s
        except TypeError:
            message = f"timeout_s must be a number of seconds, or None, was {timeout_s!r:.200}"
            raise ValueError(message) from None

    @property
    def left_s(self) -> float | None:
        """Seconds that are left, at most a day; 0 when it has passed; ``None``: for ever."""
        if self._at_s is None:
            return None
        return min(max(0.0, self._at_s - time.monotonic()), LONGEST_S)

    @property
    def left_ms(self) -> int | None:
        """The same in whole milliseconds, rounded up: for poll."""
        left_s = self.left_s
        return None if left_s is None else int(left_s * 1000) + (left_s > 0)

    @property
    def has_passed(self) -> bool:
        """Whether no time is left."""
        return self.left_s == 0.0

    def sleep(self, longest_s: float) -> None:
        """Sleep, but not beyond the moment."""
        left_s = self.left_s
        time.sleep(longest_s if left_s is None else min(longest_s, left_s))
