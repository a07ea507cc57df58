"""What has happened, and the order in which it is handled: the daemon's own first, peers in turn.

What a process of workers asks waits in a lane of its own. Lanes take turns, so who asks a thousand
things at once waits for his own answers, and holds nobody else up.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.core.events import Event

    Handled = Callable[[float], None]

MANY: Final = 4  # events that wait in a lane: its origin asks faster than it is answered
# Before the next event of such a lane. Who waits for the interpreter's lock gets it when its holder
# sleeps, hardly when it makes a short system call: else a flood holds up the threads that accept
# and read, and with them everybody (docs/decisions/011).
PAUSE_S: Final = 50e-6


class Lane:
    """Events of one origin, handled in the order in which they were posted (``ports.Lane``).

    Args:
        mailbox: that it belongs to.
        handled: called in the consumer's thread when one was handled, with the seconds of processor
            time that it took.
    """

    __slots__ = ("_handled", "_mailbox", "events")

    def __init__(self, mailbox: Mailbox, handled: Handled | None) -> None:
        self._mailbox = mailbox
        self._handled = handled
        self.events: deque[Event] = deque()

    @property
    def count(self) -> int:
        """How many events wait; any thread."""
        return len(self.events)

    def post(self, event: Event) -> None:
        """Put an event behind the others of this lane; any thread, but no signal handler."""
        self._mailbox.put(self, event)

    def handled(self, cost_s: float) -> None:
        """Tell that an event was handled; only the mailbox calls it."""
        if self._handled is not None:
            self._handled(cost_s)


class Mailbox:
    """One consumer; any number of lanes beside the daemon's own events, which come first."""

    def __init__(self) -> None:
        self._tokens: SimpleQueue[None] = (
            SimpleQueue()
        )  # one for each event: only this is waited on
        self._own: deque[Event] = deque()
        self._lock = threading.Lock()  # of the lanes
        self._lanes: deque[Lane] = deque()  # those with events, whose turn is next first
        self._last: tuple[Lane, float] | None = None  # whose event is handled, and since when
        self.count: Callable[[], int] = self._tokens.qsize

    def post(self, event: Event) -> None:
        """Put an event behind the daemon's own; never blocks, from any thread or signal."""
        self._own.append(event)
        self._tokens.put(None)

    def lane(self, handled: Handled | None = None) -> Lane:
        """Return a new lane; see ``Lane``."""
        return Lane(self, handled)

    def put(self, lane: Lane, event: Event) -> None:
        """Put an event behind the others of a lane."""
        with self._lock:
            lane.events.append(event)
            if len(lane.events) == 1:
                self._lanes.append(lane)
        self._tokens.put(None)

    def take(self, timeout_s: float | None) -> Event | None:
        """Return the next event; None when ``timeout_s`` (None: never) passed without one.

        That it is called again says that the one before was handled.
        """
        if self._last is not None:
            lane, began_s = self._last
            self._last = None
            lane.handled(time.thread_time() - began_s)
        try:
            self._tokens.get(timeout=timeout_s)
        except Empty:
            return None
        if self._own:
            return self._own.popleft()
        with self._lock:
            lane = self._lanes.popleft()
            event = lane.events.popleft()
            if lane.events:
                self._lanes.append(lane)
        if lane.count >= MANY:
            time.sleep(PAUSE_S)
        self._last = lane, time.thread_time()
        return event
