"""What goes wrong with the GETs of objects: plain data, and the decision for each GET.

A plan is a tuple of faults; it is the same again for the same case and seed. A fault begins with
the GET of the number ``get`` (the first is 0), or with the first GET that asks for ``byte`` of the
object, where that is given: so it meets every client once, however it cuts the object. Where it
happens in the body is that byte, or else the middle. Only what says so lasts; all the rest meets
one GET and is over.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

NEVER = -1
MIB = 1 << 20
PART_BYTES = 8 * MIB
STALL_S = 3.0


class Stall(NamedTuple):
    """Send nothing for so long in the middle of the body, then go on."""

    seconds: float
    get: int = NEVER
    byte: int = NEVER


class Drip(NamedTuple):
    """Send so slowly for so long in the middle of the body, then go on."""

    bytes_per_s: float
    seconds: float
    get: int = NEVER
    byte: int = NEVER


class Reset(NamedTuple):
    """End the connection by RST, in the middle of the body or before the head."""

    before_head: bool = False
    get: int = NEVER
    byte: int = NEVER


class Short(NamedTuple):
    """Close the connection in the middle of the body."""

    get: int = NEVER
    byte: int = NEVER


class WrongRange(NamedTuple):
    """Send bytes from elsewhere; Content-Range is of what comes, or of what was asked for."""

    is_told: bool
    get: int = NEVER
    byte: int = NEVER


class Corrupt(NamedTuple):
    """Turn all bits of one byte over."""

    get: int = NEVER
    byte: int = NEVER


class Replaced(NamedTuple):
    """Be another object from then on: another ETag, other content of the same length. Lasts."""

    get: int = NEVER
    byte: int = NEVER


class SlowDown(NamedTuple):
    """Answer a share of the GETs with 503 for so long. Lasts.

    Attributes:
        share: of the GETs, in [0, 1]; which ones follows from the seed.
        retry_after_s: told in the reply; negative: not told.
    """

    seconds: float
    share: float = 1.0
    retry_after_s: int = NEVER
    get: int = NEVER
    byte: int = NEVER


class Latency(NamedTuple):
    """Wait before the head of each reply. Lasts."""

    seconds: float
    get: int = 0
    byte: int = NEVER


class ClosedIdle(NamedTuple):
    """Close the connection after each reply, without a word in its head. Lasts."""

    get: int = 0
    byte: int = NEVER


PointFault = Stall | Drip | Reset | Short | WrongRange | Corrupt
LastingFault = Replaced | SlowDown | Latency | ClosedIdle
Fault = PointFault | LastingFault
KINDS: Mapping[str, type[Fault]] = {
    "stall": Stall,
    "drip": Drip,
    "reset": Reset,
    "short": Short,
    "wrong-range": WrongRange,
    "corrupt": Corrupt,
    "replaced": Replaced,
    "slow-down": SlowDown,
    "latency": Latency,
    "closed-idle": ClosedIdle,
}
_NAMES = {made: name for name, made in KINDS.items()}


def to_data(plan: Iterable[Fault]) -> list[dict[str, Any]]:
    """Return a plan as JSON takes it."""
    return [{"kind": _NAMES[type(fault)], **fault._asdict()} for fault in plan]


def from_data(data: Iterable[Mapping[str, Any]]) -> tuple[Fault, ...]:
    """Return the plan that ``to_data`` was given.

    Raises:
        KeyError: there is no such kind.
        TypeError: a kind has no such member.
    """
    return tuple(
        KINDS[each["kind"]](**{name: value for name, value in each.items() if name != "kind"})
        for each in data
    )


def plan_for(case: str, seed: int, size_bytes: int) -> tuple[Fault, ...]:
    """Return the plan of a case.

    Args:
        case: one of ``CASES``.
        seed: where in the object it happens: near the middle of a part of 8 MiB, between the
            first and the last quarter.
        size_bytes: of the object.
    """
    rng = random.Random(seed)
    parts = size_bytes // PART_BYTES
    part = rng.randrange(parts // 4, max(parts // 4 + 1, parts * 3 // 4))
    byte = min(part * PART_BYTES + PART_BYTES // 2 + rng.randrange(-MIB, MIB), size_bytes - 1)
    return tuple(fault._replace(byte=byte) if fault.get < 0 else fault for fault in CASES[case])


CASES: Mapping[str, tuple[Fault, ...]] = {
    "none": (),
    "stall": (Stall(STALL_S),),
    "reset": (Reset(),),
    "short": (Short(),),
    "burst503": (SlowDown(2.0, share=0.05, get=0),),
    "burst503-all": (SlowDown(1.0),),
    "drip": (Drip(1e6, STALL_S),),
    "latency": (Latency(0.05),),
    "closed-idle": (ClosedIdle(),),
    "wrong-range": (WrongRange(is_told=True),),
    "wrong-range-untold": (WrongRange(is_told=False),),
    "replaced": (Replaced(),),
    "corrupt": (Corrupt(),),
}


class Decision(NamedTuple):
    """What happens to one GET.

    Attributes:
        latency_s: to wait before the reply.
        slow_down: answer with this 503 instead.
        is_replaced: the object is the other one.
        closes: the connection after the reply.
        fault: of this reply alone; its ``byte`` is set.
    """

    latency_s: float = 0.0
    slow_down: SlowDown | None = None
    is_replaced: bool = False
    closes: bool = False
    fault: PointFault | None = None


class Script:
    """Decides, GET by GET, what a plan does; not for several threads at a time.

    Args:
        plan: of faults.
        seed: of the GETs that a ``SlowDown`` meets.
    """

    def __init__(self, plan: Sequence[Fault], seed: int) -> None:
        self._pending = list(plan)
        self._lasting: list[tuple[LastingFault, float]] = []
        self._rng = random.Random(seed)
        self._gets = 0

    @property
    def is_replaced(self) -> bool:
        """Whether the object is the other one by now."""
        return any(isinstance(fault, Replaced) for fault, _ in self._lasting)

    def decide(self, start: int, stop: int, now_s: float) -> Decision:
        """Return what happens to the next GET, of bytes ``[start, stop)``.

        A GET that is refused meets no other fault: that waits for the next one.
        """
        number, self._gets = self._gets, self._gets + 1
        chance = self._rng.random()  # of every GET, so that the k-th has the same in every run
        for fault in self._beginning(number, start, stop):
            if isinstance(fault, LastingFault):
                self._pending.remove(fault)
                self._lasting.append((fault, now_s))
        decision = self._lasting_decision(chance, now_s)
        if decision.slow_down is not None:
            return decision
        for fault in self._beginning(number, start, stop):
            if isinstance(fault, PointFault):
                self._pending.remove(fault)
                byte = fault.byte if fault.byte >= 0 else (start + stop) // 2
                return decision._replace(fault=fault._replace(byte=byte))
        return decision

    def _beginning(self, number: int, start: int, stop: int) -> list[Fault]:
        return [
            fault
            for fault in self._pending
            if (0 <= fault.get <= number if fault.byte < 0 else start <= fault.byte < stop)
        ]

    def _lasting_decision(self, chance: float, now_s: float) -> Decision:
        decision = Decision()
        for fault, began_s in self._lasting:
            match fault:
                case Replaced():
                    decision = decision._replace(is_replaced=True)
                case Latency():
                    decision = decision._replace(latency_s=fault.seconds)
                case ClosedIdle():
                    decision = decision._replace(closes=True)
                case SlowDown() if now_s < began_s + fault.seconds and chance < fault.share:
                    decision = decision._replace(slow_down=fault)
                case _:
                    pass
        return decision
