"""All decisions of the daemon: events in, effects out.

No I/O, clock, thread, randomness or log: the same engine runs under the mailbox thread,
under a virtual clock in tests, and in a simulation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from cached.core import events, lifecycle
from cached.core.adoption import adopt
from cached.core.checking import Checking
from cached.core.effects import DrainBegan, DrainCut, Drained, WakeAt
from cached.core.filling import Filling
from cached.core.leaving import Leaving
from cached.core.ledger import Ledger
from cached.core.listing import Listing
from cached.core.loading import Loading
from cached.core.operating import Operating
from cached.core.serving import Serving
from cached.core.shelf import Shelf

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cached.core.effects import Effect
    from cached.core.events import CheckEvent, Event, LoadEvent, OutsideEvent
    from cached.core.loads import Limits
    from cached.core.objects import Left, ModelRef
    from cached.core.reporting import About


LAST_REQUESTS_S = 0.3
"""After a drain has answered the last who waited: for what follows on an answer. The command
line asks every 0.1 s; a worker that reads one tensor after the other, at once."""


class Engine:
    """The daemon's mind. Not thread-safe: one consumer of the mailbox calls it.

    Args:
        refs: the configured models.
        budget_bytes: the most that all models together may hold.
        limits: what else the operator allows.
        about: what the daemon says of itself.
        drain_s: how long a stopping daemon waits for requests that are under way.
        left: what an earlier daemon left in memory.
    """

    def __init__(
        self,
        refs: tuple[ModelRef, ...],
        *,
        budget_bytes: int,
        limits: Limits,
        about: About,
        drain_s: float = 5.0,
        left: Sequence[Left] = (),
    ) -> None:
        last_load = max((each.of.load for each in left), default=0)
        self._shelf = shelf = Shelf(refs, Ledger(budget_bytes), last_load)
        self._limits = limits
        self._left = left
        self._leaving = Leaving(shelf, limits)
        self._loading = Loading(shelf, limits, self._leaving)
        self._listing = Listing(shelf, limits, self._loading)
        self._checking = Checking(shelf, self._loading.load_failed)
        failed = self._loading.load_failed
        self._filling = Filling(shelf, limits, self._checking, self._leaving, failed)
        operating = Operating(
            shelf, self._listing, self._loading, self._leaving, about, self._filling.gets
        )
        self._serving = Serving(shelf, self._listing, self._leaving, operating, about)
        self._state = lifecycle.STARTING
        self._drain_s = drain_s
        self._stop_at_s: float | None = None
        # Of a drain: when somebody waited last, and whether somebody did after the last event.
        self._last_waited_s = 0.0
        self._is_waited_for = False
        self._wake_at_s: float | None = None

    def start(self, now_s: float) -> list[Effect]:
        """Begin to serve; what is prefetched at start is asked for."""
        self._advance("start")
        for load in adopt(self._shelf, self._limits, self._left, now_s):
            self._loading.adopt(load)
        self._listing.start(now_s)
        return self._settled(now_s)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Return what is to be done now that this has happened.

        Args:
            event: the next of the mailbox.
            now_s: monotonic seconds; never less than in the call before (a clock that
                leaps back delays timers, nothing else).
        """
        if isinstance(event, events.OutsideEvent):
            self._serve(event, now_s)
        elif isinstance(event, events.CheckEvent):
            self._check(event, now_s)
        else:
            self._load(event, now_s)
        return self._settled(now_s)

    def _serve(self, event: OutsideEvent, now_s: float) -> None:
        match event:
            case events.Requested():
                self._serving.requested(event, now_s)
            case events.Connected():
                self._serving.connected(event)
            case events.Disconnected():
                self._serving.disconnected(event.peer, now_s)
            case events.Ticked():
                self._wake_at_s = None
                self._leaving.ticked(now_s)
                self._listing.ticked(now_s)
            case events.DrainRequested():
                self._drain(now_s)
            case _:
                assert_never(event)

    def _load(self, event: LoadEvent, now_s: float) -> None:  # noqa: C901, PLR0912 - one row an event
        match event:
            case events.PartFetched():
                self._filling.part_fetched(event, now_s)
            case events.PartFailed():
                self._filling.part_failed(event, now_s)
            case events.PartStalled():
                self._filling.part_stalled(event)
            case events.HeaderRead():
                self._filling.header_read(event)
            case events.HeaderSized():
                self._filling.header_sized(event)
            case events.HeaderRefused():
                self._filling.header_refused(event, now_s)
            case events.SegmentsReady():
                self._filling.segments_ready(event)
            case events.SegmentsFailed():
                self._loading.segments_failed(event, now_s)
            case events.Resolved():
                self._listing.resolved(event, now_s)
            case events.ResolveFailed():
                self._listing.resolve_failed(event, now_s)
            case events.Published():
                self._loading.published(event, now_s)
            case events.Freed():
                self._leaving.freed(event.of)
            case events.StillMapped() | events.FreeFailed():
                self._leaving.not_freed(event.of, now_s)
            case _:
                assert_never(event)

    def _check(self, event: CheckEvent, now_s: float) -> None:
        load = None
        match event:
            case events.Described():
                self._filling.described(event)
            case events.DescribeFailed():
                self._filling.describe_failed(event, now_s)
            case events.DigestsRead():
                load = self._checking.digests_read(event, now_s)
            case events.DigestsRefused():
                self._checking.digests_refused(event, now_s)
            case events.Checked():
                load = self._checking.checked(event, now_s)
            case events.CheckFailed():
                self._checking.check_failed(event, now_s)
            case _:
                assert_never(event)
        if load is not None:
            self._filling.verified(load, event.file.index)

    def _settled(self, now_s: float) -> list[Effect]:
        """Let waiters look, fill free slots, set the timer, and hand the effects out."""
        while self._shelf.changed or self._shelf.is_room_made:
            if self._shelf.is_room_made:
                self._shelf.is_room_made = False
                self._loading.admit_all(now_s)
            else:
                self._serving.settle(self._shelf.changed.popitem()[0])
        self._filling.plan(now_s)
        self._check_drained(now_s)
        self._set_timer(now_s)
        effects, self._shelf.effects = self._shelf.effects, []
        return effects

    def _set_timer(self, now_s: float) -> None:
        times = [
            self._listing.wake_at_s(now_s),
            self._leaving.wake_at_s(),
            self._filling.wake_at_s(),
            self._drained_at_s,
        ]
        wanted_s = min((time_s for time_s in times if time_s is not None), default=None)
        if wanted_s is not None and wanted_s != self._wake_at_s:
            self._wake_at_s = wanted_s
            self._shelf.effects.append(WakeAt(wanted_s))

    def _drain(self, now_s: float) -> None:
        if self._state == lifecycle.SERVING:
            self._advance("drain")
            self._stop_at_s = now_s + self._drain_s
            self._last_waited_s = now_s
            self._is_waited_for = self._serving.waiter_count > 0
            self._shelf.effects.append(DrainBegan(self._serving.waiter_count))
            self._shelf.is_draining = True
            self._shelf.changed.update(dict.fromkeys(self._shelf.models))  # some wait in vain now
        elif self._stop_at_s is not None:
            self._shelf.effects.append(DrainCut(self._serving.waiter_count))
            self._stop_at_s = now_s

    @property
    def _drained_at_s(self) -> float | None:
        """When the drain is over, if nothing happens; None if it has not begun or is over."""
        if self._stop_at_s is None or self._serving.waiter_count:
            return self._stop_at_s
        if not self._serving.has_peers:
            return self._last_waited_s
        return min(self._stop_at_s, self._last_waited_s + LAST_REQUESTS_S)

    def _check_drained(self, now_s: float) -> None:
        if self._stop_at_s is None:
            return
        was_waited_for, self._is_waited_for = self._is_waited_for, self._serving.waiter_count > 0
        if was_waited_for or self._is_waited_for:
            self._last_waited_s = now_s
        drained_at_s = self._drained_at_s
        if drained_at_s is None or now_s < drained_at_s:
            return
        self._stop_at_s = None
        self._serving.dismiss("the daemon is stopping")
        self._shelf.is_stopped = True  # the runner cuts what is in flight
        self._advance("stop")
        self._shelf.effects.append(Drained())

    def _advance(self, trigger: str) -> None:
        self._state = lifecycle.advance(lifecycle.DAEMON, self._state, trigger)
