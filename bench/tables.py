"""What the page is made of: the figures of a result, goals, and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bench.record import ENDED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from bench.record import Row

NOT_PEERS = ("cached", "limit")


class Figures:
    """The rows of one result, by what they measure."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {(row["case"], row["subject"], row["metric"]): row for row in rows}

    def median(self, case: str, subject: str, metric: str) -> float | None:
        """Return a median, or None if that was not measured."""
        found = self._rows.get((case, subject, metric))
        return None if found is None else found["median"]

    def highest(self, case: str, subject: str, metric: str) -> float | None:
        """Return the highest sample, or None if that was not measured."""
        found = self._rows.get((case, subject, metric))
        return None if found is None else found["max"]

    def ended(self, case: str, subject: str) -> dict[str, int]:
        """Return how often a subject ended in which way, in a case where that was counted."""
        return {
            metric.removeprefix(ENDED): int(row["median"])
            for (its_case, its_subject, metric), row in self._rows.items()
            if (its_case, its_subject) == (case, subject) and metric.startswith(ENDED)
        }

    def subjects(self) -> list[str]:
        """Return the subjects in the order in which they were measured."""
        return list(dict.fromkeys(subject for _, subject, _ in self._rows))

    def cases(self) -> list[str]:
        """Return the cases in the order in which they were measured."""
        return list(dict.fromkeys(case for case, _, _ in self._rows))

    def peers(self, case: str, metric: str) -> dict[str, float]:
        """Return the medians of all peers in a case."""
        return {
            subject: row["median"]
            for (its_case, subject, its_metric), row in self._rows.items()
            if its_case == case and its_metric == metric and subject not in NOT_PEERS
        }


class Goal(NamedTuple):
    """A figure that the project wants to hold.

    Attributes:
        text: what is measured.
        wanted: the bound.
        measured: None where it was not measured.
        is_met: whether a value keeps the bound.
    """

    text: str
    wanted: str
    measured: float | None
    is_met: Callable[[float], bool]


def spread(row: Row) -> str:
    """Return a row's median, and in brackets its ends."""
    return f"{number(row['median'])} ({number(row['min'])} - {number(row['max'])})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table and an empty one; nothing if it has no rows."""
    body = list(rows)
    if not body:
        return
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for cells in body:
        yield "| " + " | ".join(cells) + " |"
    yield ""


def number(value: float) -> str:
    """Return a value with three significant digits, thousands separated."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def quotient(above: float | None, below: float | None) -> float | None:
    """Return ``above / below``, or None where one is missing."""
    return None if above is None or not below else above / below


def shown(value: float | None, suffix: str = "") -> str:
    """Return a value for a table; a dash where there is none."""
    return "-" if value is None else number(value) + suffix
