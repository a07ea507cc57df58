"""Whether a call is still wanted: the ``Cancellation`` port, for whoever calls a store."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable


class Token:
    """Of one call; cancelled once, for ever, from any thread.

    Attributes:
        is_cancelled: nobody wants the call's result any more.
    """

    __slots__ = ("_cut", "_lock", "is_cancelled")

    def __init__(self) -> None:
        self.is_cancelled = False
        self._cut: Callable[[], None] | None = None
        self._lock = threading.Lock()  # held while a cut runs: after detach none does

    def cancel(self) -> None:
        """Have the call end soon; again: nothing."""
        with self._lock:
            self.is_cancelled = True
            cut, self._cut = self._cut, None
            if cut is not None:
                cut()

    def attach(self, cut: Callable[[], None]) -> None:
        """Have ``cut`` called once when it is cancelled; at once if it already was."""
        with self._lock:
            if self.is_cancelled:
                cut()
            else:
                self._cut = cut

    def detach(self) -> None:
        """Forget ``cut``: when this returns, it neither runs nor will."""
        with self._lock:
            self._cut = None


class Never:
    """Of calls that nobody cancels."""

    __slots__ = ()

    is_cancelled: Final = False

    def attach(self, cut: Callable[[], None]) -> None:
        """Forget it at once."""

    def detach(self) -> None:
        """Do nothing."""


NEVER: Final = Never()
