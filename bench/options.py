"""The flags that all benches share."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench import record
from bench.workload import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bench.record import Row, Run


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser for ``python -m bench.NAME``."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    made.add_argument("--quick", action="store_true", help="a small run, within 45 s")
    made.add_argument("--case", default="*", metavar="GLOB", help="only cases of such names")
    made.add_argument("--rounds", type=_positive, metavar="N", help="how often each is measured")
    made.add_argument(
        "--cache", type=Path, default=CACHE, metavar="DIR", help="where workloads are kept"
    )
    made.add_argument(
        "--results",
        type=Path,
        default=record.RESULTS,
        metavar="DIR",
        help="where NAME.json is written",
    )
    return made


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, was {value}")
    return value


def chosen(names: Sequence[str], pattern: str) -> list[str]:
    """Return the names that a ``--case`` pattern takes.

    Raises:
        SystemExit: there is none; the message lists what there is.
    """
    some = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not some:
        raise SystemExit(f"bench: no case matches {pattern!r}; there are: {', '.join(names)}")
    return some


def finish(run: Run, rows: Iterable[Row], results: Path) -> None:
    """Measure, show each row as it comes, write the result, and say how long it took."""
    began_s = time.monotonic()

    def shown() -> Iterator[Row]:
        for one in rows:
            progress(record.describe(one))
            yield one

    path = record.keep(run, shown(), results)
    progress(f"{run.name}: wrote {path} after {time.monotonic() - began_s:.0f} s")


def command(name: str, arguments: Sequence[str]) -> str:
    """Return the command line for the result."""
    return " ".join(["python", "-m", f"bench.{name}", *arguments])


def progress(text: str) -> None:
    """Say on stderr what goes on."""
    print(text, file=sys.stderr, flush=True)
