"""The system's clocks: the only place that reads them for the daemon."""

from __future__ import annotations

import time


class SystemClock:
    """Monotonic and wall-clock time; the ``Clock`` port."""

    __slots__ = ()

    def now_s(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Return seconds since 1970, UTC."""
        return time.time()
