"""What a bench leaves behind: rows of statistics, and the machine they come from.

A result is one file, ``bench/results/NAME.json``; ``bench.report`` makes the page of them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# What a bench itself writes does not make the measured tree another one.
WRITTEN_BY_BENCHES = (":!bench/results", ":!docs/benchmarks.md")
# A metric that counts rounds begins so; the rest of its name says how they ended.
ENDED = "ended "


class Row(TypedDict):
    """One figure.

    Attributes:
        case: what was done, for example ``plain-512MiB-8``.
        subject: who did it: ``cached``, a peer by its package's name, or ``limit``.
        metric: what was measured, unit included.
        unit: of the three figures.
        n: number of samples.
    """

    case: str
    subject: str
    metric: str
    unit: str
    n: int
    median: float
    min: float
    max: float


class Machine(TypedDict):
    """Where a bench ran."""

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str


class Result(TypedDict):
    """One run of one bench; what a file in ``bench/results`` holds."""

    name: str
    machine: Machine
    commit: str
    command: str
    workload: str
    quick: bool
    started_at: str
    versions: dict[str, str]
    rows: list[Row]


class Run(NamedTuple):
    """What a bench knows of itself before it begins.

    Attributes:
        name: of the bench.
        command: how it was started.
        workload: what it measures, in words.
        quick: whether it is a small run, of which nothing is published.
        versions: of what it compares with.
    """

    name: str
    command: str
    workload: str
    quick: bool
    versions: dict[str, str]


class Samples(NamedTuple):
    """The figures of one subject in one case, before statistics."""

    case: str
    subject: str
    metric: str
    unit: str
    values: Sequence[float]


def row(samples: Samples) -> Row:
    """Return the statistics of ``samples``, rounded to five significant digits.

    Raises:
        ValueError: there is no sample.
    """
    if not samples.values:
        raise ValueError(f"no samples of {samples.metric} for {samples.subject} in {samples.case}")
    return Row(
        case=samples.case,
        subject=samples.subject,
        metric=samples.metric,
        unit=samples.unit,
        n=len(samples.values),
        median=_rounded(statistics.median(samples.values)),
        min=_rounded(min(samples.values)),
        max=_rounded(max(samples.values)),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def describe(one: Row) -> str:
    """Return a row as a line for the terminal."""
    return (
        f"  {one['case']:<22} {one['subject']:<14} {one['metric']:<20} "
        f"{one['median']:>10,.4g} {one['unit']:<8} "
        f"({one['min']:,.4g} - {one['max']:,.4g}, n={one['n']})"
    )


def machine() -> Machine:
    """Return what this machine is, from /proc."""
    return Machine(
        cpu=_cpu_model(Path("/proc/cpuinfo").read_text()),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        python=platform.python_version(),
    )


def _cpu_model(cpuinfo: str) -> str:
    for line in cpuinfo.splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    """Return the commit of the tree that is measured; ``-dirty`` marks changes beside it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changed = _git("status", "--porcelain", "--", ".", *WRITTEN_BY_BENCHES)
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def result_path(name: str, directory: Path = RESULTS) -> Path:
    """Return where the result of a bench lies."""
    return directory / f"{name}.json"


def write(result: Result, directory: Path = RESULTS) -> Path:
    """Write a result in place of the one before, and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = result_path(result["name"], directory)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
    return path


def keep(run: Run, rows: Iterable[Row], directory: Path = RESULTS) -> Path:
    """Measure (by taking ``rows`` one by one), write the result, and return its path."""
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    head = commit()
    result = Result(
        name=run.name,
        machine=machine(),
        commit=head,
        command=run.command,
        workload=run.workload,
        quick=run.quick,
        started_at=started_at,
        versions=run.versions,
        rows=list(rows),
    )
    return write(result, directory)


def read(path: Path) -> Result:
    """Return the result in a file that ``write`` made."""
    result: Result = json.loads(path.read_text())
    return result
