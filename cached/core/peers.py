"""Who is connected, and which requests wait for an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from cached.core import wire
from cached.core.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cached.core.errors import CachedError
    from cached.core.loads import Load
    from cached.core.objects import FileRef, PeerId, Range
    from cached.core.shares import Shares

    Answer = tuple[dict[str, object], tuple[FileRef, ...]]
    Ask = Callable[[], Answer | None]
    Wants = Sequence[tuple[int, Range]]

MAX_WAITING: Final = 1 << 19  # ranges that are waited for, of all peers: 180 bytes each
COST: Final = 16  # of a request that waits, in ranges; those of its names come on top
CHARACTERS: Final = 45  # take as much memory as a range, at four bytes each


class Waiter(NamedTuple):
    """A request that is not answered yet.

    Attributes:
        answer: returns the reply, or None to wait on; raises an error that is the reply, unless
            it is one that is kept (``refusal``).
        names: of tensors, that it keeps.
        wants: what the planner of the lease's load holds for it until it is answered.
    """

    peer: PeerId
    request_id: int
    op: str
    answer: Ask
    wants: Wants = ()
    names: Sequence[str] = ()

    @property
    def cost(self) -> int:
        """What it takes of what may wait."""
        characters = sum(map(len, self.names))
        return COST + len(self.wants) + len(self.names) // 2 + characters // CHARACTERS


class Peer:
    """One connection.

    Args:
        process: uid and pid of it.
        waiting: what processes have of what may wait for an answer.

    Attributes:
        lease: the load it holds; None before ``open``.
        is_opening: an ``open`` is not answered yet.
    """

    __slots__ = ("_waiting", "has_greeted", "is_opening", "lease", "process")

    def __init__(
        self, process: tuple[int, int], waiting: Shares, *, has_greeted: bool = False
    ) -> None:
        self.process = process
        self._waiting = waiting
        self.has_greeted = has_greeted
        self.lease: Load | None = None
        self.is_opening = False

    @property
    def uid(self) -> int:
        """Of the process."""
        return self.process[0]

    def began(self, waiter: Waiter) -> None:
        """Have what a request wants fetched before all that nobody waits for; ``ended`` follows.

        Raises:
            BadRequest: there are no such bytes, or the process waits for too much. Nothing changed.
        """
        if self.lease is not None:
            self.lease.check_ranges(waiter.wants)
        if not self._waiting.take(self.process, waiter.cost):
            waits = self._waiting.of(self.process) + waiter.cost
            left = self._waiting.free - waiter.cost
            message = (
                f"process {self.process[1]} would wait for {waits} (each range counts 1, each "
                f"request {COST}): more than the {left} that would be left"
            )
            raise BadRequest(message, hint="wait for the answers to earlier requests")
        if waiter.op == "open":
            self.is_opening = True
        if self.lease is not None:
            for index, span in waiter.wants:
                self.lease.planner.want(index, span.start, span.stop)

    def ended(self, waiter: Waiter) -> None:
        """Take back what a request of this peer that waits no more had asked for."""
        self._waiting.give_back(self.process, waiter.cost)
        if waiter.op == "open":
            self.is_opening = False
        if self.lease is not None:
            for index, span in waiter.wants:
                self.lease.planner.give_up(index, span.start, span.stop)


def refusal(error: CachedError) -> Answer:
    """Return an error as an answer.

    One that is kept is not raised for that: it would gain a traceback each time, and keep all
    that its frames hold.
    """
    return wire.error_body(error), ()
