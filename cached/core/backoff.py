"""How long to wait before a request is sent again."""

from __future__ import annotations

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 20.0  # AWS SDKs' cap for back-off


def delay_s(failures: int, jitter_ratio: float, asked_s: float | None) -> float:
    """Return the back-off after so many failures in a row: doubling, half of it random.

    ``asked_s`` is the store's Retry-After: never less than that.
    """
    longest: float = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(failures - 1, 10))
    return max(asked_s or 0.0, float(longest) * (0.5 + jitter_ratio / 2))
