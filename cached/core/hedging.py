"""When a GET that brings nothing is sent a second time: a pure choice.

After "The tail at scale" (Dean and Barroso, CACM 2013): a hedge is sent only once a request is
slower than nearly all others, and hedges stay a small share of all requests.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST_S: Final = 0.150  # below this a stall is not told from a busy machine
SLOWER: Final = 4.0  # times the median of its peers' time to the first byte
TOKENS_PER_GET: Final = 0.05
MOST_TOKENS: Final = 4.0  # so many at once after a long time without any
FIRST_TOKENS: Final = 2.0  # so that a load of few GETs may hedge too
PEERS: Final = 32  # the last of them
STRAGGLER_S: Final = 0.5  # a GET that is as old as this, at least, while nothing else is to do


class Hedging:
    """The budget of hedges, and what its peers say about a GET."""

    __slots__ = ("_first_bytes_s", "_tokens", "_whole_s")

    def __init__(self) -> None:
        self._tokens = FIRST_TOKENS
        self._first_bytes_s: deque[float] = deque(maxlen=PEERS)
        self._whole_s: deque[float] = deque(maxlen=PEERS)

    @property
    def patience_s(self) -> float:
        """Return how long a GET may bring nothing before a second one is sent."""
        return max(LEAST_S, SLOWER * _median(self._first_bytes_s))

    @property
    def straggler_s(self) -> float:
        """Return how old a GET may become, though it brings bytes, once all others have ended."""
        return max(STRAGGLER_S, SLOWER * _median(self._whole_s))

    def sent(self) -> None:
        """Take note of a GET that is not a hedge."""
        self._tokens = min(MOST_TOKENS, self._tokens + TOKENS_PER_GET)

    def answered(self, first_byte_s: float) -> None:
        """Take note of how long a reply took to begin."""
        self._first_bytes_s.append(first_byte_s)

    def ended(self, seconds: float) -> None:
        """Take note of how long a whole GET took."""
        self._whole_s.append(seconds)

    def may(self, idle_s: float) -> bool:
        """Return whether a GET that brought nothing for so long may be sent again."""
        return idle_s >= self.patience_s and self.has_tokens

    @property
    def has_tokens(self) -> bool:
        """Whether there may be one more hedge."""
        return self._tokens >= 1.0

    def spend(self) -> None:
        """Take note of a hedge."""
        self._tokens -= 1.0


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0
