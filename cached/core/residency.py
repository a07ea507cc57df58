"""Who has to go when a model wants in: a pure choice.

A version is worth keeping for the time that it would take to load it again, as often as it
is used, per byte that it takes: GreedyDual-Size-Frequency (Cherkasova, "Improving WWW
proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs, 1998), with a
half-life in place of its inflation term.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cached.core.objects import VersionRef

    GivesBack = Callable[[Sequence[VersionRef]], int]

HALF_LIFE_S = 3600.0  # a model used hourly keeps about two uses on its account


class Candidate(NamedTuple):
    """A version in memory.

    Attributes:
        of: the version.
        size_bytes: what it has in memory, with what it shares with others.
        load_s: how long loading it took.
        last_used_s: monotonic.
        frequency: count of uses, decayed as of ``last_used_s`` (``touched``).
        is_leased: somebody holds it.
        is_pinned: the operator keeps it, or it is promised to somebody.
        is_superseded: it is there to go back to; of two that are worth the same it goes first.
    """

    of: VersionRef
    size_bytes: int
    load_s: float
    last_used_s: float
    frequency: float
    is_leased: bool = False
    is_pinned: bool = False
    is_superseded: bool = False


def decayed(
    frequency: float, last_s: float, now_s: float, *, half_life_s: float = HALF_LIFE_S
) -> float:
    """Return a count of uses as it weighs now: halved for every half-life since ``last_s``."""
    return float(frequency * 2.0 ** (-max(0.0, now_s - last_s) / half_life_s))


def touched(
    frequency: float, last_s: float, now_s: float, *, half_life_s: float = HALF_LIFE_S
) -> float:
    """Return the decayed count of uses after one more at ``now_s``."""
    return decayed(frequency, last_s, now_s, half_life_s=half_life_s) + 1.0


def worth(candidate: Candidate, now_s: float, *, half_life_s: float = HALF_LIFE_S) -> float:
    """Return what keeping a version saves: seconds of loading per byte, times its uses."""
    uses = decayed(candidate.frequency, candidate.last_used_s, now_s, half_life_s=half_life_s)
    return uses * candidate.load_s / candidate.size_bytes


def choose(
    candidates: Iterable[Candidate],
    needed_bytes: int,
    free_bytes: int,
    now_s: float,
    *,
    gives_back: GivesBack | None = None,
    half_life_s: float = HALF_LIFE_S,
) -> tuple[VersionRef, ...] | None:
    """Return which versions to evict so that ``needed_bytes`` are free.

    The least worth go first. What turned out unnecessary then stays, the largest first.
    More free bytes never evict more bytes, and the order of the candidates does not matter.

    Args:
        candidates: everything in memory; what is leased or pinned is never chosen.
        needed_bytes: what wants in.
        free_bytes: what is free already; may be negative.
        now_s: monotonic.
        gives_back: what evicting several together frees, where they share files; else all that
            they have.
        half_life_s: of the count of uses.

    Returns:
        Nothing to evict is ``()``; ``None`` if it does not fit even so.
    """
    short_bytes = needed_bytes - free_bytes
    evictable = [
        candidate
        for candidate in candidates
        if not candidate.is_leased and not candidate.is_pinned and candidate.size_bytes > 0
    ]
    evictable.sort(
        key=lambda candidate: (
            worth(candidate, now_s, half_life_s=half_life_s),
            not candidate.is_superseded,
            candidate.last_used_s,
            candidate.of,
        )
    )

    def freed_bytes(some: Sequence[Candidate]) -> int:
        if gives_back is None:
            return sum(candidate.size_bytes for candidate in some)
        return gives_back([candidate.of for candidate in some])

    chosen: list[Candidate] = []
    while freed_bytes(chosen) < short_bytes:
        if len(chosen) == len(evictable):
            return None
        chosen.append(evictable[len(chosen)])
    for candidate in sorted(chosen, key=lambda one: (-one.size_bytes, one.of)):
        others = [one for one in chosen if one is not candidate]
        if freed_bytes(others) >= short_bytes:
            chosen = others
    return tuple(candidate.of for candidate in chosen)
