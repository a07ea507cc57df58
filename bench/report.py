"""docs/benchmarks.md, made of the results of full runs.

``python -m bench.report`` prints the page, ``--write`` puts it into docs/, ``--check`` compares.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import record, report_faults
from bench.tables import Figures, Goal, number, quotient, shown, spread, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bench.record import Result, Row

PAGE = record.ROOT / "docs" / "benchmarks.md"
MIN_N = 5
IMPORTED = {
    "cached": "import cached",
    "cached.open": "import cached; cached.open",
}
FLAT_MIB = 2048 / 100  # of growth is flat: 1 % of the model that is loaded
INTRODUCTION = """\
# Benchmarks

Written by `python -m bench.report --write` from `bench/results/*.json`, which `make bench` writes;
only from full runs. Absolute figures move from machine to machine, and from run to run on a shared
one: read the ratios. A ratio is of two medians. Absolute figures are medians of `n` samples, with
the lowest and the highest in brackets.
"""


class ReportError(Exception):
    """There is nothing that may be published."""


def main(arguments: Sequence[str]) -> None:
    """Print, write or compare the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--check", action="store_true", help="end with status 1 if it is not so")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="DIR")
    args = parser.parse_args(arguments)
    try:
        page = render(results_in(args.results))
    except ReportError as error:
        raise SystemExit(f"bench: {error}") from error
    if args.check:
        raise SystemExit(0 if PAGE.exists() and PAGE.read_text() == page else f"{PAGE} is not so")
    if args.write:
        PAGE.write_text(page)
        print(f"wrote {PAGE}")
    else:
        print(page, end="")


def results_in(directory: Path) -> list[Result]:
    """Return the results of the benches, in the order of the page.

    Raises:
        ReportError: there is none, or one is not of a full run.
    """
    paths = [record.result_path(name, directory) for name in SECTIONS]
    results = [record.read(path) for path in paths if path.exists()]
    if not results:
        raise ReportError(f"there is no result in {directory}; run `make bench`")
    for result in results:
        if not is_full(result):
            name = result["name"]
            raise ReportError(
                f"only full runs are published, and that of {name} was `{result['command']}`; "
                f"run `make bench-{name}`"
            )
    return results


def is_full(result: Result) -> bool:
    """Return whether nothing was left out: no quick run, no chosen cases, no row of few samples."""
    chose = {"--case", "--subjects"} & {
        word.partition("=")[0] for word in result["command"].split()
    }
    return not result["quick"] and not chose and all(row["n"] >= MIN_N for row in result["rows"])


def render(results: Sequence[Result]) -> str:
    """Return the page."""
    lines = [INTRODUCTION]
    for result in results:
        lines += _section(result)
    return "\n".join(lines).rstrip() + "\n"


def _section(result: Result) -> Iterator[str]:
    title, ratios, goals = SECTIONS[result["name"]]
    figures = Figures(result["rows"])
    yield f"## {title}\n"
    yield result["workload"] + "\n"
    yield _provenance(result)
    yield from table(("", "wanted", "measured", ""), (_goal_cells(goal) for goal in goals(figures)))
    yield from ratios(figures)
    yield from _absolutes(
        [row for row in result["rows"] if not row["metric"].startswith(record.ENDED)]
    )


def _provenance(result: Result) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"Machine: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / (1 << 30):.0f} GiB, Linux {machine['kernel']}, "
        f"Python {machine['python']}. Commit {result['commit']}, {result['started_at']}.  \n"
        f"Command: `{result['command']}`.  \n"
        f"Versions: {versions}.\n"
    )


def _goal_cells(goal: Goal) -> tuple[str, ...]:
    if goal.measured is None:
        return (goal.text, goal.wanted, "-", "not measured")
    verdict = "yes" if goal.is_met(goal.measured) else "**no**"
    return (goal.text, goal.wanted, number(goal.measured), verdict)


def _absolutes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table for all the cases that have the same metrics."""
    metrics: dict[str, dict[str, str]] = {}
    for row in rows:
        metrics.setdefault(row["case"], {})[row["metric"]] = row["unit"]
    for columns in dict.fromkeys(tuple(each.items()) for each in metrics.values()):
        cases = [case for case, each in metrics.items() if tuple(each.items()) == columns]
        head = ("case", "subject", *(f"{metric}, {unit}" for metric, unit in columns), "n")
        yield from table(head, _absolute_cells(rows, cases, [metric for metric, _ in columns]))


def _absolute_cells(
    rows: Sequence[Row], cases: Sequence[str], metrics: Sequence[str]
) -> Iterator[Sequence[str]]:
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["case"] in cases:
            cells.setdefault((row["case"], row["subject"]), {})[row["metric"]] = row
    for (case, subject), found in cells.items():
        spreads = [spread(found[metric]) if metric in found else "-" for metric in metrics]
        yield (case, subject, *spreads, str(max(row["n"] for row in found.values())))


def _attach_ratios(figures: Figures) -> Iterator[str]:
    yield from table(
        ("opening takes", "cached, ms", "safe_open / cached", "safe_open-numpy / cached"),
        (
            (
                case,
                shown(figures.median(case, "cached", "open_ms")),
                *(
                    shown(quotient(figures.median(case, other, "open_ms"), ours), " x")
                    for other in ("safe_open", "safe_open-numpy")
                ),
            )
            for case in figures.cases()
            for ours in [figures.median(case, "cached", "open_ms")]
        ),
    )


def _attach_goals(figures: Figures) -> list[Goal]:
    def cached(case: str) -> float | None:
        return figures.median(case, "cached", "open_ms")

    slowest = max(
        (
            value
            for case in figures.cases()
            if (value := quotient(cached(case), figures.median(case, "safe_open", "open_ms")))
        ),
        default=None,
    )
    return [
        *(
            Goal(f"open, 300 tensors, {size}", "<= 2 ms", cached(f"open-{size}"), lambda v: v <= 2)
            for size in ("100MiB", "500MiB", "2GiB")
        ),
        Goal("open, 3,000 tensors", "<= 6 ms", cached("open-3000-tensors"), lambda v: v <= 6),
        Goal(
            "2 GiB / 100 MiB",
            "<= 1.5",
            quotient(cached("open-2GiB"), cached("open-100MiB")),
            lambda v: v <= 1.5,
        ),
        Goal("cached / safe_open, the worst case", "< 1", slowest, lambda v: v < 1),
    ]


def _share_ratios(figures: Figures) -> Iterator[str]:
    ratios = {
        subject: figures.median("workers-8", subject, "pss_ratio")
        for subject in ("cached", *figures.peers("workers-8", "pss_ratio"))
    }
    yield from table(
        ("8 workers on one model", "memory / (model + workers without it)"),
        ((subject, shown(ratio)) for subject, ratio in ratios.items()),
    )
    yield from table(
        ("a process that does no more than", "its wall time / import socket, json, mmap"),
        (
            (f"`{statement}`", shown(figures.median("import", subject, "import_ratio")))
            for subject, statement in IMPORTED.items()
        ),
    )


def _share_goals(figures: Figures) -> list[Goal]:
    return [
        Goal(
            "8 workers: memory / (model + workers without it)",
            "<= 1.1",
            figures.median("workers-8", "cached", "pss_ratio"),
            lambda v: v <= 1.1,
        ),
        Goal(
            "the daemon's private memory while it loads 2 GiB",
            "<= 60 MiB",
            figures.median("load-2GiB", "cached", "daemon_private_MiB"),
            lambda v: v <= 60,
        ),
        Goal(
            "the growth of its RSS from before such a load to the peak",
            f"<= {FLAT_MIB:.0f} MiB, 1 % of the model",
            figures.median("load-2GiB", "cached", "daemon_rss_growth_MiB"),
            lambda v: v <= FLAT_MIB,
        ),
        Goal(
            "wall time of a process: import cached / import socket, json, mmap",
            "<= 1.5",
            figures.median("import", "cached", "import_ratio"),
            lambda v: v <= 1.5,
        ),
    ]


class Comparison(NamedTuple):
    """`cached` beside the best peer of each kind, in one case; None where one is missing."""

    case: str
    speed: float | None
    fastest: str
    cpu: float | None
    thriftiest: str
    of_limit: float | None


def compare(figures: Figures, case: str) -> Comparison:
    """Return how `cached` stands in a case."""
    speeds = figures.peers(case, "MB_per_s")
    cpus = figures.peers(case, "cpu_s_per_GiB")
    fastest = max(speeds, key=speeds.__getitem__, default="")
    thriftiest = min(cpus, key=cpus.__getitem__, default="")
    ours = figures.median(case, "cached", "MB_per_s")
    return Comparison(
        case=case,
        speed=quotient(ours, speeds.get(fastest)),
        fastest=fastest,
        cpu=quotient(figures.median(case, "cached", "cpu_s_per_GiB"), cpus.get(thriftiest)),
        thriftiest=thriftiest,
        of_limit=quotient(ours, figures.median(case, "limit", "MB_per_s")),
    )


def _fetch_ratios(figures: Figures) -> Iterator[str]:
    yield from table(
        ("cached", "MB/s / the best peer's", "CPU per GiB / the lowest of a peer", "of the limit"),
        (
            (
                each.case,
                f"{shown(each.speed)} ({each.fastest})",
                f"{shown(each.cpu)} ({each.thriftiest})",
                shown(each.of_limit),
            )
            for each in (compare(figures, case) for case in figures.cases())
        ),
    )


def _fetch_goals(figures: Figures) -> list[Goal]:
    goals = []
    for case in figures.cases():
        if case.startswith("plain-"):
            each = compare(figures, case)
            goals += [
                Goal(f"{case}: MB/s / the best peer's", ">= 1.3", each.speed, lambda v: v >= 1.3),
                Goal(f"{case}: CPU / the lowest", "<= 0.6", each.cpu, lambda v: v <= 0.6),
            ]
    return goals


class Section(NamedTuple):
    """How a result is shown."""

    title: str
    ratios: Callable[[Figures], Iterator[str]]
    goals: Callable[[Figures], list[Goal]]


SECTIONS: Mapping[str, Section] = {
    "attach": Section("Opening a resident model", _attach_ratios, _attach_goals),
    "share": Section("Memory", _share_ratios, _share_goals),
    "fetch": Section("From S3 into shared memory", _fetch_ratios, _fetch_goals),
    "faults": Section("When the store misbehaves", report_faults.ratios, report_faults.goals),
}


if __name__ == "__main__":
    main(sys.argv[1:])
