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

# Where a model stands. What was evicted or failed is *retired* (core/loads.py): its bytes count
# until the kernel has them back, but the model may be wanted again at once.
ABSENT: Final = "absent"
RESOLVING: Final = "resolving"  # the store is asked what there is
ADMITTING: Final = "admitting"  # waits for memory that is being freed, or for its turn
LOADING: Final = "loading"  # being filled; may be leased
PUBLISHING: Final = "publishing"  # every byte is there
RESIDENT: Final = "resident"  # complete and visible by path
FAILED: Final = "failed"  # the error is kept for those who ask

MODEL: Final[Table] = {
    ABSENT: {"want": RESOLVING},
    FAILED: {"want": RESOLVING, "evict": ABSENT},
    RESOLVING: {"resolved": ADMITTING, "fail": FAILED, "evict": ABSENT},
    ADMITTING: {"reserved": LOADING, "fail": FAILED, "evict": ABSENT},
    LOADING: {"filled": PUBLISHING, "fail": FAILED, "evict": ABSENT},
    PUBLISHING: {"published": RESIDENT, "fail": FAILED, "evict": ABSENT},
    RESIDENT: {"evict": ABSENT},
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
