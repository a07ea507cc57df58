"""The page's section on a store that misbehaves."""

from __future__ import annotations

import math
import operator
from functools import partial
from typing import TYPE_CHECKING

from bench.tables import Goal, number, quotient, shown, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.tables import Figures

SLOWER = {  # how much slower than without a fault cached may be at most
    "stall": 1.5,
    "drip": 1.5,
    "reset": 1.2,
    "short": 1.2,
    "burst503": 1.5,
    "closed-idle": 1.2,
}
CHECKSUM_OFF = "checksum-off"
CHECKSUM_SLOWER = 1.1


def ratios(figures: Figures) -> Iterator[str]:
    """Yield how each client fared in each case, and what checking costs."""
    clients = [each for each in figures.subjects() if each != "limit"]
    cases = [case for case in figures.cases() if figures.ended(case, "cached")]
    yield from table(
        ("seconds / the client's own `none`", *clients),
        ((case, *(fared(figures, case, client) for client in clients)) for case in cases),
    )
    yield from table(
        ("checking the whole object", "MB/s / off", "CPU per GiB / off"),
        (
            (
                case.removeprefix("checksum-"),
                *(
                    shown(_of_off(figures, case, metric))
                    for metric in ("MB_per_s", "cpu_s_per_GiB")
                ),
            )
            for case in figures.cases()
            if case.startswith("checksum-") and case != CHECKSUM_OFF
        ),
    )


def fared(figures: Figures, case: str, client: str) -> str:
    """Return a client's time in a case as a multiple of its own without a fault.

    Where it did not end well, how it ended instead, with the number of rounds if that differed.
    """
    ended = figures.ended(case, client)
    if not ended:
        return "-"
    ratio = quotient(_seconds(figures, case, client), _seconds(figures, "none", client))
    if set(ended) == {"ok"}:
        return shown(ratio, " x")
    counts = ", ".join(
        f"**{how}**" if len(ended) == 1 else f"{times} {how if how == 'ok' else f'**{how}**'}"
        for how, times in ended.items()
    )
    return f"{counts} ({number(_seconds(figures, case, client) or 0)} s)"


def goals(figures: Figures) -> list[Goal]:
    """Return what `cached` should hold."""
    slower = [
        Goal(
            f"{case}: cached, seconds / its own without a fault",
            f"<= {most:g}",
            _ratio_if_right(figures, case),
            partial(operator.ge, most),
        )
        for case, most in SLOWER.items()
    ]
    wrong = [
        value
        for case in figures.cases()
        if (value := figures.highest(case, "cached", "wrong_bytes")) is not None
    ]
    return [
        *slower,
        *(
            Goal(
                f"{name} on: MB/s off / on",
                f"<= {CHECKSUM_SLOWER:g}",
                quotient(
                    figures.median(CHECKSUM_OFF, "cached", "MB_per_s"),
                    figures.median(f"checksum-{name}", "cached", "MB_per_s"),
                ),
                partial(operator.ge, CHECKSUM_SLOWER),
            )
            for name in ("crc64nvme", "crc32c")
        ),
        Goal(
            "wrong bytes that cached called complete, the worst case",
            "0",
            max(wrong, default=None),
            lambda value: value == 0,
        ),
    ]


def _ratio_if_right(figures: Figures, case: str) -> float | None:
    """Return infinity where it did not end well each time: a fast error is no speed."""
    ended = figures.ended(case, "cached")
    if ended and set(ended) != {"ok"}:
        return math.inf
    return quotient(_seconds(figures, case, "cached"), _seconds(figures, "none", "cached"))


def _seconds(figures: Figures, case: str, client: str) -> float | None:
    return figures.median(case, client, "seconds")


def _of_off(figures: Figures, case: str, metric: str) -> float | None:
    return quotient(
        figures.median(case, "cached", metric), figures.median(CHECKSUM_OFF, "cached", metric)
    )
