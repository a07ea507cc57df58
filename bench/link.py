"""A link that all connections of a store share."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PIECE_BYTES = 256 << 10  # what one connection sends before the next has its turn
CREDIT_S = 0.01  # what may be sent late, because a thread woke up late


class Link:
    """So many bytes a second for all connections together, in turn; 0: as fast as they can.

    Args:
        bytes_per_s: of the link.
        monotonic_s: tells the time.
        sleep: waits so many seconds.
    """

    def __init__(
        self, bytes_per_s: float, monotonic_s: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self._monotonic_s = monotonic_s
        self._sleep = sleep
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self._lock = threading.Lock()
        self.piece_bytes = PIECE_BYTES if bytes_per_s else 1 << 30

    def take(self, size_bytes: int) -> None:
        """Return when so many bytes may go."""
        if not self._bytes_per_s:
            return
        with self._lock:
            now_s = self._monotonic_s()
            self._free_at_s = max(now_s - CREDIT_S, self._free_at_s)
            self._free_at_s += size_bytes / self._bytes_per_s
            wait_s = self._free_at_s - now_s
        if wait_s > 0:
            self._sleep(wait_s)
