"""Who is connected, and which requests wait for an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cached.core import wire
from cached.core.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cached.core.errors import CachedError
    from cached.core.loads import Load
    from cached.core.objects import FileRef, PeerId, Range

    Answer = tuple[dict[str, object], tuple[FileRef, ...]]
    Ask = Callable[[], Answer | None]
    Wants = Sequence[tuple[int, Range]]


class Waiter(NamedTuple):
    """A request that is not answered yet.

    Attributes:
        answer: returns the reply, or None to wait on; raises an error that is the reply, unless
            it is one that is kept (``refusal``).
        wants: what the planner of the lease's load holds for it until it is answered.
    """

    peer: PeerId
    request_id: int
    op: str
    answer: Ask
    wants: Wants = ()


class Peer:
    """One connection.

    Attributes:
        lease: the load it holds; None before ``open``.
        is_opening: an ``open`` is not answered yet.
        ranges: how many it waits for, in all its requests.
    """

    __slots__ = ("has_greeted", "is_opening", "lease", "ranges", "uid")

    def __init__(self, uid: int, *, has_greeted: bool = False) -> None:
        self.uid = uid
        self.has_greeted = has_greeted
        self.lease: Load | None = None
        self.is_opening = False
        self.ranges = 0

    def want(self, load: Load, wants: Wants) -> None:
        """Have ranges of the leased load fetched before all that nobody waits for.

        Raises:
            BadRequest: there are no such bytes, or the peer waits for too much. Nothing changed.
        """
        load.check_ranges(wants)
        if self.ranges + len(wants) > wire.MAX_RANGES_WAITING:
            message = (
                f"this connection waits for {self.ranges} ranges already: "
                f"at most {wire.MAX_RANGES_WAITING} are allowed"
            )
            raise BadRequest(message, hint="wait for the answers to earlier requests")
        for index, span in wants:
            load.planner.want(index, span.start, span.stop)
        self.ranges += len(wants)

    def ended(self, waiter: Waiter) -> None:
        """Take back what a request of this peer that waits no more had asked for."""
        if waiter.op == "open":
            self.is_opening = False
        if self.lease is not None:
            for index, span in waiter.wants:
                self.lease.planner.give_up(index, span.start, span.stop)
        self.ranges -= len(waiter.wants)


def refusal(error: CachedError) -> Answer:
    """Return an error as an answer.

    One that is kept is not raised for that: it would gain a traceback each time, and keep all
    that its frames hold.
    """
    return wire.error_body(error), ()
