"""How many GETs at a time: as many as make it faster, and fewer once the store complains.

Additive increase, multiplicative decrease (Chiu and Jain, "Analysis of the increase and decrease
algorithms for congestion avoidance in computer networks", 1989), with throughput in place of loss
as the reason to stop: a store does not drop what is too much for the link, it only gets slower.
"""

from __future__ import annotations

from typing import Final

FIRST_GETS: Final = 8  # what fills 10 Gbit/s from S3 at about 100 MB/s a connection, nearly
GAIN_RATIO: Final = 1.05  # so much faster a larger window has to be
EPOCH_S: Final = 0.1  # the shortest time in which a rate says something
HOLD_S: Final = 5.0  # after a larger window was of no use
RECOVER_S: Final = 1.0  # after the store complained


class Window:
    """The number of GETs in flight that is allowed at the moment.

    Args:
        most: never more.

    Attributes:
        gets: 1 to ``most``.
    """

    __slots__ = (
        *("_before", "_bytes", "_count", "_epoch_s", "_grow_from_s", "_is_settling"),
        *("_last_rate", "_shrunk_s", "gets", "most"),
    )

    def __init__(self, most: int) -> None:
        self.most = most
        self.gets = min(FIRST_GETS, most)
        self._before = self.gets  # the size before the last growth, while that is on trial
        self._last_rate = 0.0  # bytes a second, of the epoch before
        self._bytes = 0
        self._count = 0
        self._is_settling = False  # the GETs that end now were sent before the last change
        self._epoch_s: float | None = None
        self._grow_from_s = 0.0
        self._shrunk_s = float("-inf")

    def rest(self) -> None:
        """Take note that not every slot is in use: the rate says nothing about the window."""
        self._epoch_s = None

    def landed(self, size_bytes: int, now_s: float) -> None:
        """Take note of a GET that came in whole, while all slots were in use.

        Args:
            size_bytes: of its body.
            now_s: monotonic.
        """
        if self._epoch_s is None:
            self._begin(now_s)
            return
        self._bytes += size_bytes
        self._count += 1
        seconds = now_s - self._epoch_s
        if self._count < self.gets or seconds < EPOCH_S:
            return
        if self._is_settling:
            self._is_settling = False
        else:
            gets = self.gets
            self._judge(self._bytes / seconds, now_s)
            self._is_settling = self.gets != gets
        self._begin(now_s)

    def refused(self, sent_s: float, now_s: float) -> None:
        """Halve it: the store is asked too much, or broke a connection.

        Args:
            sent_s: when the GET was sent: those from before the last halving tell nothing new.
            now_s: monotonic.
        """
        if sent_s <= self._shrunk_s:
            return
        self.gets = self._before = max(1, self.gets // 2)
        self._shrunk_s = now_s
        self._grow_from_s = now_s + RECOVER_S
        self._last_rate = 0.0
        self._epoch_s = None

    def _begin(self, now_s: float) -> None:
        self._epoch_s = now_s
        self._bytes = 0
        self._count = 0

    def _judge(self, rate: float, now_s: float) -> None:
        was_useless = rate < GAIN_RATIO * self._last_rate
        if self.gets > self._before and was_useless:
            self.gets = self._before
            self._grow_from_s = now_s + HOLD_S
        elif now_s >= self._grow_from_s and self.gets < self.most:
            self._before = self.gets
            self.gets = min(self.most, self.gets + max(1, self.gets // 4))
        else:
            self._before = self.gets
        self._last_rate = rate
