"""A time is a ratio only where all rounds ended well; else the page says how they ended."""

from __future__ import annotations

import math

import pytest

from bench import record, report, report_faults
from bench.record import Machine, Result, Row
from bench.tables import Figures


def row(case: str, subject: str, metric: str, median: float, most: float | None = None) -> Row:
    return Row(
        case=case,
        subject=subject,
        metric=metric,
        unit="u",
        n=5,
        median=median,
        min=0,
        max=median if most is None else most,
    )


def ended(case: str, subject: str, seconds: float, **outcomes: int) -> list[Row]:
    return [
        row(case, subject, "seconds", seconds),
        *(
            row(case, subject, record.ENDED + how.replace("_", " "), n)
            for how, n in outcomes.items()
        ),
    ]


ROWS = [
    row("ceiling", "limit", "MB_per_s", 4000),
    *ended("none", "cached", 2.0, ok=5),
    *ended("none", "boto3", 4.0, ok=5),
    *ended("stall", "cached", 5.0, ok=5),
    *ended("stall", "boto3", 6.0, ok=5),
    *ended("reset", "cached", 2.2, ok=4, error_gone=1),
    *ended("reset", "boto3", 0.5, error_ClientError=5),
    *ended("corrupt", "cached", 2.0, wrong=5),
    row("corrupt", "cached", "wrong_bytes", 0, 1),
    row("checksum-off", "cached", "MB_per_s", 2000),
    row("checksum-off", "cached", "cpu_s_per_GiB", 0.5),
    row("checksum-crc32c", "cached", "MB_per_s", 1600),
    row("checksum-crc32", "cached", "MB_per_s", 1500),
    row("checksum-crc32", "cached", "cpu_s_per_GiB", 1.0),
]
FIGURES = Figures(ROWS)


@pytest.mark.parametrize(
    ("case", "client", "cell"),
    [
        ("none", "cached", "1 x"),
        ("stall", "cached", "2.5 x"),
        ("stall", "boto3", "1.5 x"),
        ("reset", "cached", "4 ok, 1 **error gone** (2.2 s)"),
        ("reset", "boto3", "**error ClientError** (0.5 s)"),
        ("corrupt", "cached", "**wrong** (2 s)"),
        ("corrupt", "boto3", "-"),
    ],
)
def test_a_client_is_compared_with_itself_or_its_end_is_told(case, client, cell):
    assert report_faults.fared(FIGURES, case, client) == cell


def test_goals_are_of_ratios_where_all_rounds_ended_well_and_of_wrong_bytes_in_any_round():
    goals = {goal.text.partition(":")[0]: goal for goal in report_faults.goals(FIGURES)}
    assert goals["stall"].measured == 2.5
    assert not goals["stall"].is_met(2.5)
    assert goals["stall"].is_met(1.5)
    assert goals["reset"].measured == math.inf
    assert goals["drip"].measured is None
    assert goals["crc32c on"].measured == 1.25
    assert not goals["crc32c on"].is_met(1.25)
    assert goals["crc64nvme on"].measured is None
    assert goals["wrong bytes that cached called complete, the worst case"].measured == 1


def test_the_page_has_the_table_of_clients_and_what_checking_costs_but_no_row_of_endings():
    result = Result(
        name="faults",
        machine=Machine(cpu="A CPU", cores=2, memory_bytes=24 << 30, kernel="6.1", python="3.11.7"),
        commit="0123456789ab",
        command="python -m bench.faults",
        workload="What is done.",
        quick=False,
        started_at="2026-01-01T00:00:00+00:00",
        versions={},
        rows=ROWS,
    )
    page = report.render([result])
    for line in (
        "## When the store misbehaves",
        "| seconds / the client's own `none` | cached | boto3 |",
        "| stall | 2.5 x | 1.5 x |",
        "| crc32 | 0.75 | 2 |",
        "| wrong bytes that cached called complete, the worst case | 0 | 1 | **no** |",
        "| reset: cached, seconds / its own without a fault | <= 1.2 | inf | **no** |",
    ):
        assert line in page
    assert record.ENDED not in page
