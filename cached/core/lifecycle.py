"""The states of a model and of the daemon, as tables.

Rule: whatever changes a state is a row here. Nothing else assigns one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cached.core.errors import InvalidTransition

if TYPE_CHECKING:
    from collections.abc import Mapping

    Table = Mapping[str, Mapping[str, str]]
    """state → trigger → next state."""

# What a model is about: the way of one version into memory. What is in memory already, the current
# version first of all, is beside it (core/loads.py), and so is what is on its way out.
IDLE: Final = "idle"  # nothing is on its way
RESOLVING: Final = "resolving"  # the store is asked what there is
ADMITTING: Final = "admitting"  # waits for memory that is being freed, or for its turn
LOADING: Final = "loading"  # being filled; may be leased
PUBLISHING: Final = "publishing"  # every byte is there
FAILED: Final = "failed"  # the error is kept for those who ask

MODEL: Final[Table] = {
    IDLE: {"want": RESOLVING, "adopt": LOADING, "return": PUBLISHING},
    FAILED: {"want": RESOLVING, "return": PUBLISHING, "evict": IDLE},
    RESOLVING: {"resolved": ADMITTING, "same": IDLE, "fail": FAILED, "evict": IDLE},
    ADMITTING: {"reserved": LOADING, "return": PUBLISHING, "fail": FAILED, "evict": IDLE},
    LOADING: {"filled": PUBLISHING, "fail": FAILED, "evict": IDLE},
    PUBLISHING: {"published": IDLE, "fail": FAILED, "evict": IDLE},
}

# Where the daemon stands.
STARTING: Final = "starting"
SERVING: Final = "serving"
DRAINING: Final = "draining"  # takes no new work
STOPPED: Final = "stopped"

DAEMON: Final[Table] = {
    STARTING: {"start": SERVING, "drain": DRAINING},
    SERVING: {"drain": DRAINING},
    DRAINING: {"stop": STOPPED},
    STOPPED: {},
}


def advance(table: Table, state: str, trigger: str) -> str:
    """Return the state after ``trigger``.

    Raises:
        InvalidTransition: the table has no such row: a bug of the caller.
    """
    try:
        return table[state][trigger]
    except KeyError:
        message = f"no transition for {trigger!r} in state {state!r}"
        raise InvalidTransition(message) from None
