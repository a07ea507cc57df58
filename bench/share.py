"""Memory: 8 workers on one model, the daemon while it loads, and what ``import cached`` costs."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from threading import Event, Thread
from typing import TYPE_CHECKING, NamedTuple

from bench import options, process, record, requirements, servers, workload
from bench.daemon import Daemon, Settings
from bench.record import Samples
from bench.report import IMPORTED
from bench.worker import Worker

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from bench.record import Row

NAME = "share"
WORKERS = 8
MIB = 1 << 20
MEMORY_BUDGET = "4GiB"
MODEL = "model"
LOADED_SIZE = "2GiB"
LOOK_EVERY_S = 0.01
IMPORTS = {
    **IMPORTED,
    "socket+json+mmap": "import socket, json, mmap",
}
BASELINE = "socket+json+mmap"
WORKLOAD = (
    "workers-8: 8 processes open one model (a safetensors file, 300 bfloat16 tensors; 1 GiB, "
    "256 MiB in a quick run) and read every byte; pss_ratio is the sum of their PSS divided by "
    "the model's size plus the sum of their PSS before. cached: `cached.open`; safe_open: torch "
    "tensors mapped from the file in the page cache; safetensors: numpy's `load_file`, a copy for "
    "each. "
    "load-2GiB: the daemon's memory while it fetches 2 GiB from nginx, looked at every 10 ms; the "
    "highest of each load. "
    "import: wall time of `python -I -S -c 'import ...'`, a new process each, in turns. `import "
    "cached` imports the rest when it is first used: cached.open is with all that an open needs."
)
NEEDS = (
    requirements.NUMPY,
    requirements.SAFETENSORS,
    requirements.TORCH,
    requirements.NGINX,
)


class Plan(NamedTuple):
    """How much is measured.

    Attributes:
        shared_size: of the model that 8 workers open.
        subjects: who opens it.
        rounds: of workers-8.
        loads: of load-2GiB.
        imports: of import.
    """

    shared_size: str
    subjects: tuple[str, ...]
    rounds: int
    loads: int
    imports: int


FULL = Plan("1GiB", ("cached", "safe_open", "safetensors"), rounds=5, loads=5, imports=41)
QUICK = Plan("256MiB", ("cached", "safetensors"), rounds=2, loads=2, imports=11)
CASES = ("workers-8", "load-2GiB", "import")


def main(arguments: Sequence[str]) -> None:
    """Measure, print the rows, and write the result."""
    args = options.parser(NAME, "Memory that workers and the daemon take.").parse_args(arguments)
    cases = options.chosen(CASES, args.case)
    requirements.insist(NEEDS)
    run = record.Run(
        name=NAME,
        command=options.command(NAME, arguments),
        workload=WORKLOAD,
        quick=args.quick,
        versions=requirements.versions(NEEDS),
    )
    options.finish(run, _measure(cases, args), args.results)


def _measure(cases: Sequence[str], args: argparse.Namespace) -> Iterator[Row]:
    plan = QUICK if args.quick else FULL
    if args.rounds:
        plan = plan._replace(rounds=args.rounds, loads=args.rounds, imports=args.rounds)
    if "workers-8" in cases:
        yield from _share(plan, args.cache)
    if "load-2GiB" in cases:
        yield from _load(plan, args.cache)
    if "import" in cases:
        yield from _import(plan)


def _share(plan: Plan, cache: Path) -> Iterator[Row]:
    options.progress(f"{NAME}: workload {plan.shared_size}")
    file = workload.make(workload.sized(plan.shared_size), cache)
    taken: dict[str, list[Shared]] = {subject: [] for subject in plan.subjects}
    with Daemon(Settings({MODEL: file.as_uri()}, MEMORY_BUDGET)) as daemon:
        daemon.load(MODEL)
        for turn in range(plan.rounds):
            for subject in plan.subjects:
                options.progress(f"{NAME}: workers-8 round {turn + 1}/{plan.rounds} {subject}")
                place = MODEL if subject == "cached" else str(file)
                taken[subject].append(_share_once(subject, place, daemon.socket_path))
    size_bytes = file.stat().st_size
    for subject, samples in taken.items():
        for figure in (
            ("pss_ratio", "x", [shared_ratio(each, size_bytes) for each in samples]),
            ("pss_MiB", "MiB", [each.after_bytes / MIB for each in samples]),
            ("pss_before_MiB", "MiB", [each.before_bytes / MIB for each in samples]),
        ):
            yield record.row(Samples("workers-8", subject, *figure))


class Shared(NamedTuple):
    """The sum of the workers' PSS, before they opened the model and while they hold it."""

    before_bytes: int
    after_bytes: int


def shared_ratio(shared: Shared, model_bytes: int) -> float:
    """Return the memory taken, as a multiple of one model beside all the workers."""
    return shared.after_bytes / (model_bytes + shared.before_bytes)


def _share_once(subject: str, place: str, socket_path: Path) -> Shared:
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(subject, socket_path)) for _ in range(WORKERS)]
        for each in workers:
            each.receive()
        before_bytes = sum(process.pss_bytes(each.pid) for each in workers)
        for each in workers:
            each.send(op="hold", place=place)
        for each in workers:
            each.receive()
        return Shared(before_bytes, sum(process.pss_bytes(each.pid) for each in workers))


def _load(plan: Plan, cache: Path) -> Iterator[Row]:
    options.progress(f"{NAME}: workload {LOADED_SIZE}")
    file = workload.make(workload.sized(LOADED_SIZE), cache)
    private, peak, growth = [], [], []
    with servers.nginx(file.parent) as store:
        settings = Settings(
            {MODEL: f"s3://{servers.BUCKET}/{file.name}"},
            MEMORY_BUDGET,
            environment=store.environment(),
        )
        with Daemon(settings) as daemon:
            for turn in range(plan.loads):
                options.progress(f"{NAME}: load-2GiB load {turn + 1}/{plan.loads}")
                before_bytes = process.rss_bytes(daemon.pid)
                with Lookout(daemon.pid) as lookout:
                    load = daemon.load(MODEL)
                daemon.evict(MODEL)
                private.append(lookout.highest_bytes / MIB)
                peak.append(load.peak_rss_bytes / MIB)
                growth.append((load.peak_rss_bytes - before_bytes) / MIB)
    for metric, values in (
        ("daemon_private_MiB", private),
        ("daemon_rss_MiB", peak),
        ("daemon_rss_growth_MiB", growth),
    ):
        yield record.row(Samples("load-2GiB", "cached", metric, "MiB", values))


class Lookout:
    """Watches the private memory of a process for as long as a ``with`` block takes.

    Attributes:
        highest_bytes: that was seen.
    """

    def __init__(self, pid: int) -> None:
        self.highest_bytes = 0
        self._pid = pid
        self._stop = Event()
        self._thread = Thread(target=self._watch, name="lookout")

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            self.highest_bytes = max(self.highest_bytes, process.private_bytes(self._pid))

    def __enter__(self) -> Lookout:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def _import(plan: Plan) -> Iterator[Row]:
    taken: dict[str, list[float]] = {subject: [] for subject in IMPORTS}
    for statement in IMPORTS.values():
        _import_once(statement)  # writes the byte code
    options.progress(f"{NAME}: import, {plan.imports} rounds")
    for _ in range(plan.imports):
        for subject, statement in IMPORTS.items():
            taken[subject].append(_import_once(statement))
    for subject in (each for each in IMPORTS if each != BASELINE):
        ratios = [one / other for one, other in zip(taken[subject], taken[BASELINE], strict=True)]
        yield record.row(Samples("import", subject, "import_ratio", "x", ratios))
    for subject, values in taken.items():
        yield record.row(Samples("import", subject, "import_ms", "ms", values))


def _import_once(statement: str) -> float:
    """Return the wall time in ms of a process that imports something and ends."""
    program = f"import sys; sys.path.insert(0, {str(record.ROOT)!r}); {statement}"
    command = [sys.executable, "-I", "-S", "-c", program]
    began_s = time.perf_counter()
    pid = os.posix_spawn(sys.executable, command, os.environ)
    _, status = os.waitpid(pid, 0)
    taken_ms = (time.perf_counter() - began_s) * 1000
    if status:
        raise RuntimeError(f"`{statement}` failed")
    return taken_ms


if __name__ == "__main__":
    main(sys.argv[1:])
