"""S3 into shared memory: MB/s, CPU and memory of `cached`, the peers, and the limit.

Every subject fetches the same object from the same server into a tmpfs, 8 MiB a GET, so many
GETs at a time. The subjects take turns, and memory is free again before the next one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import options, process, record, requirements, servers, workload
from bench.daemon import TMPFS, Daemon, Settings
from bench.peers.job import Job
from bench.record import Samples

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from bench.record import Row
    from bench.servers import Store
    from bench.workload import Workload

NAME = "fetch"
PART_BYTES = 8 << 20
PEER_TIMEOUT_S = 300
PEERS = ("s5cmd", "obstore", "awscrt", "boto3", "aiohttp")
QUICK_PEERS = ("s5cmd", "obstore")
SUBJECTS = ("cached", "limit", *PEERS)
QUICK_SUBJECTS = ("cached", "limit", *QUICK_PEERS)
ROUNDS = 5
MODEL = "model"
MEMORY_BUDGET = "4GiB"
CHECK_EVERY_BYTES = 1 << 20
CHECKED_BYTES = 4096
WORKLOAD = (
    "One safetensors file (300 bfloat16 tensors, seeded) is fetched over loopback HTTP into a "
    "tmpfs, in GETs of 8 MiB (cached chooses its own sizes up to that), so many at a time as the "
    "case's last number says. "
    "`plain`: nginx, 2 workers, sendfile, the object in the page cache. `seaweedfs`: SeaweedFS, "
    "one process, signed requests. Server and client share the machine's cores. The subjects "
    "take turns in every round. cached: the running daemon's time and CPU, from the prefetch "
    "request to ready. Python peers: from the call to the end, imports and start-up excluded. "
    "s5cmd: the whole process. limit: the same GETs from plain sockets, the bytes thrown away. "
    "Before each fetch so much memory is touched and given back, so that no subject pays for "
    "pages that the virtual machine's host had taken."
)


class Case(NamedTuple):
    """One server, size, and number of GETs at a time."""

    store: str
    size: str
    threads: int

    @property
    def name(self) -> str:
        """The case's name in the result."""
        return f"{self.store}-{self.size}-{self.threads}"


class Sample(NamedTuple):
    """One fetch."""

    wall_s: float
    cpu_s: float
    rss_bytes: int


QUICK_CASES = (Case("plain", "512MiB", 8),)
CASES = tuple(
    Case(store, size, threads)
    for store in ("plain", "seaweedfs")
    for size in ("512MiB", "2GiB")
    for threads in (4, 8)
)


def main(arguments: Sequence[str]) -> None:
    """Measure, print the rows, and write the result."""
    args = _parser().parse_args(arguments)
    cases = QUICK_CASES if args.quick else CASES
    names = options.chosen([case.name for case in cases], args.case)
    cases = tuple(case for case in cases if case.name in names)
    subjects = _subjects(args)
    requirements.insist(_needs(cases, subjects))
    run = record.Run(
        name=NAME,
        command=options.command(NAME, arguments),
        workload=WORKLOAD,
        quick=args.quick,
        versions=requirements.versions(_needs(cases, subjects)),
    )
    options.finish(run, _measure(cases, subjects, args), args.results)


def _parser() -> argparse.ArgumentParser:
    made = options.parser(NAME, "S3 into shared memory, beside other clients.")
    made.add_argument(
        "--subjects", metavar="A,B", help=f"only these of {','.join(SUBJECTS)}", default=""
    )
    return made


def _subjects(args: argparse.Namespace) -> tuple[str, ...]:
    if not args.subjects:
        return QUICK_SUBJECTS if args.quick else SUBJECTS
    chosen = tuple(args.subjects.split(","))
    if unknown := set(chosen) - set(SUBJECTS):
        raise SystemExit(f"bench: no subject {sorted(unknown)}; there are: {', '.join(SUBJECTS)}")
    return chosen


def _needs(cases: Sequence[Case], subjects: Sequence[str]) -> list[requirements.Need]:
    stores = {case.store for case in cases}
    return [
        requirements.NUMPY,
        *([requirements.NGINX] if "plain" in stores else []),
        *([requirements.SEAWEEDFS, requirements.PEERS["boto3"]] if "seaweedfs" in stores else []),
        *(requirements.PEERS[name] for name in subjects if name in requirements.PEERS),
    ]


def _measure(
    cases: Sequence[Case], subjects: Sequence[str], args: argparse.Namespace
) -> Iterator[Row]:
    sizes = dict.fromkeys(case.size for case in cases)
    objects = {size: _made(workload.sized(size), args.cache) for size in sizes}
    for kind in dict.fromkeys(case.store for case in cases):
        options.progress(f"{NAME}: starting {kind}")
        with _started(kind, list(objects.values())) as store:
            for case in cases:
                if case.store == kind:
                    yield from _run_case(
                        case, subjects, args.rounds or ROUNDS, _Source(store, objects[case.size])
                    )


def _made(work: Workload, cache: Path) -> Path:
    options.progress(f"{NAME}: workload {work.key}")
    return workload.make(work, cache)


def _started(kind: str, objects: list[Path]) -> AbstractContextManager[Store]:
    if kind == "plain":
        return servers.nginx(objects[0].parent)
    return servers.seaweedfs(objects)


class _Source(NamedTuple):
    """An object in a store, and the file that it was made of."""

    store: Store
    file: Path


def _run_case(case: Case, subjects: Sequence[str], rounds: int, source: _Source) -> Iterator[Row]:
    taken: dict[str, list[Sample]] = {subject: [] for subject in subjects}
    size_bytes = source.file.stat().st_size
    with ExitStack() as stack:
        fetch_by = {name: _fetcher(name, case, source, stack) for name in subjects}
        for turn in range(rounds):
            for name in order(subjects, turn):
                process.touch_memory(size_bytes * 5 // 4)
                sample = fetch_by[name]()
                taken[name].append(sample)
                options.progress(
                    f"{NAME}: {case.name} round {turn + 1}/{rounds} {name:<8}"
                    f" {size_bytes / sample.wall_s / 1e6:7,.0f} MB/s"
                )
    for name, samples in taken.items():
        yield from rows_of(case.name, name, samples, size_bytes)


def order(subjects: Sequence[str], turn: int) -> list[str]:
    """Return the subjects, another one first in each round."""
    first = turn % len(subjects)
    return [*subjects[first:], *subjects[:first]]


def rows_of(case: str, subject: str, samples: Sequence[Sample], size_bytes: int) -> list[Row]:
    """Return the three rows of a subject in a case."""
    figures = (
        ("MB_per_s", "MB/s", [size_bytes / s.wall_s / 1e6 for s in samples]),
        ("cpu_s_per_GiB", "s/GiB", [s.cpu_s / size_bytes * (1 << 30) for s in samples]),
        ("rss_MiB", "MiB", [s.rss_bytes / (1 << 20) for s in samples]),
    )
    return [record.row(Samples(case, subject, *figure)) for figure in figures]


def _fetcher(name: str, case: Case, source: _Source, stack: ExitStack) -> Callable[[], Sample]:
    """Return what fetches once; what it starts ends with ``stack``."""
    if name != "cached":
        return lambda: _fetch_by_peer(name, case, source)
    settings = Settings(
        models={MODEL: f"s3://{servers.BUCKET}/{source.file.name}"},
        memory_budget=MEMORY_BUDGET,
        fetch_threads=case.threads,
        environment=source.store.environment(),
    )
    daemon = stack.enter_context(Daemon(settings))
    return lambda: _fetch_by_daemon(daemon, source)


def _fetch_by_daemon(daemon: Daemon, source: _Source) -> Sample:
    load = daemon.load(MODEL)
    insist_same(source.file, Path(load.path) / source.file.name)
    daemon.evict(MODEL)
    return Sample(load.wall_s, load.cpu_s, load.peak_rss_bytes)


def _fetch_by_peer(name: str, case: Case, source: _Source) -> Sample:
    with tempfile.TemporaryDirectory(prefix="cached-bench-", dir=TMPFS) as directory:
        destination = Path(directory) / source.file.name
        job = Job(
            endpoint_url=source.store.endpoint_url,
            url=source.store.url(source.file.name),
            bucket=servers.BUCKET,
            key=source.file.name,
            path=str(destination),
            size_bytes=source.file.stat().st_size,
            threads=case.threads,
            part_bytes=PART_BYTES,
            access_key=source.store.access_key,
            secret_key=source.store.secret_key,
            region=source.store.region,
        )
        done = subprocess.run(
            [sys.executable, "-m", "bench.peers", name],
            cwd=record.ROOT,
            input=json.dumps(job._asdict()),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=PEER_TIMEOUT_S,
        )
        if name != "limit":
            insist_same(source.file, destination)
        return Sample(**json.loads(done.stdout))


def insist_same(source: Path, copy: Path) -> None:
    """Compare a page of every MiB: who is fast but wrong must not win.

    Raises:
        ValueError: they differ.
    """
    size_bytes = source.stat().st_size
    if copy.stat().st_size != size_bytes:
        raise ValueError(f"{copy} has {copy.stat().st_size} bytes, not {size_bytes}")
    with source.open("rb", buffering=0) as one, copy.open("rb", buffering=0) as other:
        for at in (*range(0, size_bytes, CHECK_EVERY_BYTES), max(0, size_bytes - CHECKED_BYTES)):
            one.seek(at)
            other.seek(at)
            if one.read(CHECKED_BYTES) != other.read(CHECKED_BYTES):
                raise ValueError(f"{copy} differs from {source} at byte {at}")


if __name__ == "__main__":
    main(sys.argv[1:])
