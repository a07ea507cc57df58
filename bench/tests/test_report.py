"""The page says the ratios first, names where the figures are from, and takes no quick run."""

from __future__ import annotations

import pytest

from bench import record, report, tables
from bench.record import Machine, Result, Row


def row(case: str, subject: str, metric: str, median: float) -> Row:
    return Row(
        case=case, subject=subject, metric=metric, unit="u", n=5, median=median, min=1, max=9
    )


def result(name: str, rows: list[Row], *, quick: bool = False) -> Result:
    return Result(
        name=name,
        machine=Machine(cpu="A CPU", cores=2, memory_bytes=24 << 30, kernel="6.1", python="3.11.7"),
        commit="0123456789ab",
        command=f"python -m bench.{name}",
        workload="What is done.",
        quick=quick,
        started_at="2026-01-01T00:00:00+00:00",
        versions={"numpy": "2.4"},
        rows=rows,
    )


FETCH = [
    row("plain-512MiB-8", "cached", "MB_per_s", 1500),
    row("plain-512MiB-8", "cached", "cpu_s_per_GiB", 0.8),
    row("plain-512MiB-8", "limit", "MB_per_s", 3000),
    row("plain-512MiB-8", "limit", "cpu_s_per_GiB", 0.1),
    row("plain-512MiB-8", "s5cmd", "MB_per_s", 1000),
    row("plain-512MiB-8", "s5cmd", "cpu_s_per_GiB", 1.6),
    row("plain-512MiB-8", "obstore", "MB_per_s", 500),
    row("plain-512MiB-8", "obstore", "cpu_s_per_GiB", 1.0),
]


def test_cached_is_compared_with_the_best_peer_of_each_kind_and_the_limit_is_none():
    each = report.compare(tables.Figures(FETCH), "plain-512MiB-8")
    assert each == report.Comparison("plain-512MiB-8", 1.5, "s5cmd", 0.8, "obstore", 0.5)


def test_a_case_without_peers_has_no_ratio():
    each = report.compare(tables.Figures(FETCH[:2]), "plain-512MiB-8")
    assert (each.speed, each.cpu, each.of_limit) == (None, None, None)


def test_the_page_has_workload_machine_commit_command_ratios_and_spread_in_this_order():
    page = report.render([result("fetch", FETCH)])
    order = [
        "What is done.",
        "A CPU, 2 cores, 24 GiB",
        "0123456789ab",
        "`python -m bench.fetch`",
        "| plain-512MiB-8: MB/s / the best peer's | >= 1.3 | 1.5 | yes |",
        "| plain-512MiB-8: CPU / the lowest | <= 0.6 | 0.8 | **no** |",
        "| plain-512MiB-8 | 1.5 (s5cmd) | 0.8 (obstore) | 0.5 |",
        "| plain-512MiB-8 | s5cmd | 1,000 (1 - 9) | 1.6 (1 - 9) | 5 |",
    ]
    places = [page.index(text) for text in order]
    assert places == sorted(places)


def test_an_open_is_compared_with_safe_open_at_the_same_case():
    rows = [
        row("open-100MiB", "cached", "open_ms", 1.0),
        row("open-100MiB", "safe_open", "open_ms", 4.0),
        row("open-2GiB", "cached", "open_ms", 1.2),
        row("open-2GiB", "safe_open", "open_ms", 0.9),
    ]
    page = report.render([result("attach", rows)])
    assert "| open-100MiB | 1 | 4 x | - |" in page
    assert "| 2 GiB / 100 MiB | <= 1.5 | 1.2 | yes |" in page
    assert "| cached / safe_open, the worst case | < 1 | 1.33 | **no** |" in page
    assert "| open, 3,000 tensors | <= 6 ms | - | not measured |" in page


@pytest.mark.parametrize(
    "partial",
    [
        result("fetch", FETCH, quick=True),
        result("fetch", FETCH) | {"command": "python -m bench.fetch --case plain-*"},
        result("fetch", FETCH) | {"command": "python -m bench.fetch --subjects=limit"},
        result("fetch", [FETCH[0] | {"n": 4}]),
    ],
    ids=["quick", "some cases", "some subjects", "few samples"],
)
def test_only_a_full_run_is_published(tmp_path, partial):
    record.write(result("attach", []), tmp_path)
    record.write(partial, tmp_path)
    with pytest.raises(report.ReportError, match="; run `make bench-fetch`"):
        report.results_in(tmp_path)


def test_a_metric_that_one_subject_lacks_is_left_open():
    rows = [
        row("import", "cached", "import_ratio", 1.2),
        row("import", "cached", "import_ms", 22),
        row("import", "socket+json+mmap", "import_ms", 18),
    ]
    page = report.render([result("share", rows)])
    assert "| case | subject | import_ratio, u | import_ms, u | n |" in page
    assert "| import | socket+json+mmap | - | 18 (1 - 9) | 5 |" in page


def test_memory_has_a_goal_for_growth_and_an_import_is_shown_with_all_that_an_open_needs():
    rows = [
        row("load-2GiB", "cached", "daemon_rss_growth_MiB", 25),
        row("import", "cached", "import_ratio", 0.5),
        row("import", "cached.open", "import_ratio", 1.6),
    ]
    page = report.render([result("share", rows)])
    wanted = "<= 20 MiB, 1 % of the model"
    assert f"its RSS from before such a load to the peak | {wanted} | 25 | **no** |" in page
    assert "import cached / import socket, json, mmap | <= 1.5 | 0.5 | yes |" in page
    assert "| `import cached; cached.open` | 1.6 |" in page


def test_no_result_is_no_page(tmp_path):
    with pytest.raises(report.ReportError, match="run `make bench`"):
        report.results_in(tmp_path)
