"""A store that misbehaves: what `cached` and the peers make of it, and how long they take.

All fetch the same object through the store of ``fault_proxy.py``, whose link is as fast for all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import fault_plan, fetch, options, process, record, requirements, servers, workload
from bench.daemon import TMPFS, Daemon, DaemonTimeout, Refused, Settings
from bench.fault_store import FaultStore
from bench.peers.job import Job
from bench.record import Row, Samples

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from bench.fault_plan import Fault
    from bench.fault_proxy import Counts

NAME = "faults"
CLIENTS = (
    "cached",
    "obstore",
    "awscrt",
    "boto3",
    "s5cmd",
    "runai-model-streamer",
    "s3torchconnector",
    "tensorizer",
)
QUICK_CLIENTS = ("cached", "obstore", "s5cmd")
QUICK_CASES = ("none", "stall", "reset", "burst503", "corrupt")
CHECKSUMS = ("crc64nvme", "crc32c", "crc32", "sha256")
CHECKSUM_CASES = ("checksum-off", *(f"checksum-{name}" for name in CHECKSUMS))
OFFERED = ("crc64nvme",)  # as S3 does for each object that is uploaded without a checksum
CEILING = "ceiling"
ROUNDS = 5
THREADS = 8
LINK_BYTES_PER_S = 400e6
TIME_LIMIT_S = 30.0
MIB = 1 << 20
BLOCK_BYTES = 8 * MIB
REPLACEMENT_SEED = 21
WORKLOAD = (
    f"One safetensors file (512 MiB, 300 bfloat16 tensors, seeded) is fetched into a tmpfs, "
    f"{THREADS} GETs of 8 MiB at a time (cached chooses its own sizes up to that; "
    "runai-model-streamer and s3torchconnector ask for more at a time whatever one says; "
    "tensorizer is one GET), from a store of our own on loopback that does what a plan says. All "
    f"connections share a link of {LINK_BYTES_PER_S / 1e6:.0f} MB/s, so that `none` takes 1.34 s "
    "at best. A fault meets the first GET of one byte, the same for all clients in a round, near "
    "the middle of a part of 8 MiB; another one in each round. "
    "`stall`: nothing for 3 s in the middle of the body. `drip`: 1 MB/s for 3 s. `reset`, `short`: "
    "the connection ends there, by RST or FIN. `burst503`: 5 % of all GETs in the first 2 s get "
    "503 SlowDown; `burst503-all`: all for 1 s. `latency`: each reply 50 ms later. `closed-idle`: "
    "each connection is closed after one reply. `wrong-range`: bytes from 1 MiB away, and "
    "Content-Range says so; `-untold`: it does not. `replaced`: another object, ETag and content, "
    "from there on. "
    "`corrupt`: one byte is turned over; the store offers the object's CRC64NVME, as S3 does. "
    "seconds: from the call to its end, however it ends; cached: from the prefetch request, by a "
    "daemon that has just started. ok: every byte is right (of one of the two versions in "
    "`replaced`). wrong: the client called it complete, and it is not; wrong_bytes says how many. "
    f"error: it said so. hang: cut after {TIME_LIMIT_S:.0f} s. "
    "`checksum-*`: a file of 2 GiB from the same store without the limit of the link; `--verify "
    "off`, and `--verify checksum` where the store offers that one. Each time by a new daemon, "
    "which also imports what computes the sum."
)


class Ending(NamedTuple):
    """How one fetch ended.

    Attributes:
        outcome: ``ok``, ``wrong``, ``hang``, or ``error`` and its name.
        wall_s: until then.
        wrong_bytes: of what was called complete.
    """

    outcome: str
    wall_s: float
    wrong_bytes: int = 0


class Sample(NamedTuple):
    """One fetch, and what the store saw of it."""

    ending: Ending
    counts: Counts


class Bench(NamedTuple):
    """What all fetches have in common.

    Attributes:
        store: running.
        file: the object's content.
        versions: that, and what replaces it.
    """

    store: FaultStore
    file: Path
    versions: tuple[Path, Path]

    @property
    def size_bytes(self) -> int:
        return self.file.stat().st_size


def main(arguments: Sequence[str]) -> None:
    """Measure, print the rows, and write the result."""
    args = _parser().parse_args(arguments)
    cases = [*(QUICK_CASES if args.quick else fault_plan.CASES), *CHECKSUM_CASES]
    cases = options.chosen(cases, args.case)
    clients = _clients(args)
    needs = [requirements.PEERS[name] for name in clients if name != "cached"]
    requirements.insist([requirements.NUMPY, requirements.PEERS["awscrt"]])
    run = record.Run(
        name=NAME,
        command=options.command(NAME, arguments),
        workload=WORKLOAD,
        quick=args.quick,
        versions=requirements.versions(needs),
    )
    options.finish(run, _measure(cases, clients, args), args.results)


def _parser() -> argparse.ArgumentParser:
    made = options.parser(NAME, "What clients of S3 do when the store misbehaves.")
    made.add_argument(
        "--subjects", metavar="A,B", help=f"only these of {','.join(CLIENTS)}", default=""
    )
    return made


def _clients(args: argparse.Namespace) -> list[str]:
    """Return whom to measure; says loudly who is not installed."""
    wanted = args.subjects.split(",") if args.subjects else [*CLIENTS]
    if args.quick and not args.subjects:
        wanted = [*QUICK_CLIENTS]
    if unknown := set(wanted) - set(CLIENTS):
        raise SystemExit(f"bench: no subject {sorted(unknown)}; there are: {', '.join(CLIENTS)}")
    absent = requirements.missing(requirements.PEERS[name] for name in wanted if name != "cached")
    for name in absent:
        options.progress(f"bench: MISSING: {name}: NOT MEASURED; run `make bench-setup`")
    return [name for name in wanted if name not in absent]


def _measure(
    cases: Sequence[str], clients: Sequence[str], args: argparse.Namespace
) -> Iterator[Row]:
    work = workload.sized("256MiB" if args.quick else "512MiB")
    options.progress(f"{NAME}: workload {work.key}, twice")
    file = workload.make(work, args.cache)
    other = workload.make(work._replace(seed=REPLACEMENT_SEED), args.cache / "replacement")
    rounds = args.rounds or (1 if args.quick else ROUNDS)
    with FaultStore(file, other, CHECKSUMS) as store:
        bench = Bench(store, file, (file, other))
        yield from _ceiling(bench, rounds)
        faulty = [case for case in cases if case in fault_plan.CASES]
        yield from _misbehave(bench, faulty, clients, rounds)
    checked = [case for case in cases if case in CHECKSUM_CASES]
    if checked:
        work = workload.sized("256MiB" if args.quick else "2GiB")
        file = workload.make(work, args.cache)
        with FaultStore(file, file, CHECKSUMS) as store:
            yield from _verify(Bench(store, file, (file, file)), checked, rounds)


def _ceiling(bench: Bench, rounds: int) -> Iterator[Row]:
    """Measure how fast the store is without its link: whether it is in the way."""
    speeds = []
    for _ in range(rounds):
        bench.store.follow()
        speeds.append(bench.size_bytes / _fetch_by_peer("limit", bench, ()).wall_s / 1e6)
    yield record.row(Samples(CEILING, "limit", "MB_per_s", "MB/s", speeds))


def _misbehave(
    bench: Bench, cases: Sequence[str], clients: Sequence[str], rounds: int
) -> Iterator[Row]:
    taken: dict[tuple[str, str], list[Sample]] = {}
    for turn in range(rounds):
        for case in cases:
            seed = turn + 1
            plan = fault_plan.plan_for(case, seed, bench.size_bytes)
            for client in fetch.order(clients, turn):
                process.touch_memory(bench.size_bytes * 5 // 4)
                sample = _fetch(client, bench, plan, seed)
                taken.setdefault((case, client), []).append(sample)
                options.progress(
                    f"{NAME}: round {turn + 1}/{rounds} {case:<18} {client:<20}"
                    f" {sample.ending.wall_s:6.2f} s {sample.counts.gets:4} GETs"
                    f"  {sample.ending.outcome}"
                )
    for (case, client), samples in taken.items():
        yield from rows_of(case, client, samples)


def rows_of(case: str, client: str, samples: Sequence[Sample]) -> list[Row]:
    """Return the rows of a client in a case: figures, then how often it ended in which way."""
    figures = (
        ("seconds", "s", [each.ending.wall_s for each in samples]),
        ("wrong_bytes", "B", [float(each.ending.wrong_bytes) for each in samples]),
        ("gets", "GETs", [float(each.counts.gets) for each in samples]),
        ("sent_MiB", "MiB", [each.counts.body_bytes / MIB for each in samples]),
        ("peak_in_flight", "GETs", [float(each.counts.peak_in_flight) for each in samples]),
        ("slow_downs", "GETs", [float(each.counts.slow_downs) for each in samples]),
    )
    endings = Counter(each.ending.outcome for each in samples)
    return [
        *(record.row(Samples(case, client, *figure)) for figure in figures),
        *(_ended(case, client, outcome, times, len(samples)) for outcome, times in endings.items()),
    ]


def _ended(case: str, client: str, outcome: str, times: int, n: int) -> Row:
    metric = f"{record.ENDED}{outcome}"
    return Row(
        case=case,
        subject=client,
        metric=metric,
        unit="rounds",
        n=n,
        median=times,
        min=times,
        max=times,
    )


def _fetch(client: str, bench: Bench, plan: Sequence[Fault], seed: int) -> Sample:
    versions = right_versions(bench.versions, plan)
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(_settings(bench))) if client == "cached" else None
        bench.store.follow(plan, seed=seed, link_bytes_per_s=LINK_BYTES_PER_S, checksums=OFFERED)
        if daemon is not None:
            ending = _fetch_by_daemon(daemon, bench, versions)
        else:
            ending = _fetch_by_peer(client, bench, versions)
        return Sample(ending, bench.store.follow())


def right_versions(versions: tuple[Path, Path], plan: Sequence[Fault]) -> tuple[Path, ...]:
    """Return the contents that are right, of the object's and its replacement's."""
    is_replaced = any(isinstance(fault, fault_plan.Replaced) for fault in plan)
    return versions if is_replaced else versions[:1]


def _settings(bench: Bench, flags: Sequence[str] = ()) -> Settings:
    return Settings(
        models={fetch.MODEL: f"s3://{servers.BUCKET}/{bench.file.name}"},
        memory_budget=fetch.MEMORY_BUDGET,
        fetch_threads=THREADS,
        environment=bench.store.store.environment(),
        flags=flags,
    )


def _fetch_by_daemon(daemon: Daemon, bench: Bench, versions: Sequence[Path]) -> Ending:
    began_s = time.perf_counter()
    try:
        load = daemon.load(fetch.MODEL, TIME_LIMIT_S)
    except DaemonTimeout:
        return Ending("hang", TIME_LIMIT_S)
    except Refused as error:
        return Ending(f"error {error.code}", time.perf_counter() - began_s)
    return judged(load.wall_s, Path(load.path) / bench.file.name, versions)


def _fetch_by_peer(client: str, bench: Bench, versions: Sequence[Path]) -> Ending:
    with tempfile.TemporaryDirectory(prefix="cached-bench-", dir=TMPFS) as directory:
        job = _job(bench, Path(directory) / bench.file.name)
        with subprocess.Popen(
            [sys.executable, "-m", "bench.peers", client],
            cwd=record.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as peer:
            try:
                out, err = peer.communicate(json.dumps(job._asdict()), TIME_LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(peer.pid, signal.SIGKILL)
                return Ending("hang", TIME_LIMIT_S)
        if not out:
            raise RuntimeError(f"{client} did not get as far as its call:\n{err}")
        wall_s = json.loads(out.splitlines()[-1])["wall_s"]
        if peer.returncode:
            return Ending(f"error {error_name(err)}", wall_s)
        return judged(wall_s, Path(job.path), versions)


def _job(bench: Bench, path: Path) -> Job:
    store = bench.store.store
    return Job(
        endpoint_url=store.endpoint_url,
        url=store.url(bench.file.name),
        bucket=servers.BUCKET,
        key=bench.file.name,
        path=str(path),
        size_bytes=bench.size_bytes,
        threads=THREADS,
        part_bytes=fetch.PART_BYTES,
        access_key=store.access_key,
        secret_key=store.secret_key,
        region=store.region,
    )


def error_name(stderr: str) -> str:
    """Return the class of the error that ended a Python process, without its module.

    It begins the first line that is not indented after the head of the last traceback.
    """
    _, _, last = stderr.rpartition("Traceback (most recent call last):\n")
    for line in last.splitlines():
        if not line.startswith(" "):
            return line.partition(":")[0].rpartition(".")[2]
    return "unknown"


def judged(wall_s: float, copy: Path, versions: Sequence[Path]) -> Ending:
    """Return how a fetch ended that was called complete: a mix of two versions is wrong.

    Args:
        wall_s: that it took.
        copy: what came of it.
        versions: it may be any of these; if there is none, nothing is compared.
    """
    wrong_bytes = min((differing_bytes(copy, each) for each in versions), default=0)
    return Ending("wrong" if wrong_bytes else "ok", wall_s, wrong_bytes)


def differing_bytes(one: Path, other: Path) -> int:
    """Return how many bytes of two files differ; of the longer one, what the other lacks, too."""
    import numpy as np

    count = abs(one.stat().st_size - other.stat().st_size)
    with one.open("rb") as left, other.open("rb") as right:
        while (a := left.read(BLOCK_BYTES)) and (b := right.read(BLOCK_BYTES)):
            if a != b:
                some = min(len(a), len(b))
                x, y = np.frombuffer(a, np.uint8, some), np.frombuffer(b, np.uint8, some)
                count += int(np.count_nonzero(x != y))
    return count


def _verify(bench: Bench, cases: Sequence[str], rounds: int) -> Iterator[Row]:
    """Measure what checking a whole object costs."""
    if "--verify" not in _serve_help():
        options.progress("bench: `cached serve` HAS NO --verify: checksum-* is NOT MEASURED")
        return
    taken: dict[str, list[fetch.Sample]] = {case: [] for case in cases}
    for turn in range(rounds):
        for case in fetch.order(cases, turn):
            offered = case.removeprefix("checksum-")
            is_off = offered == "off"
            flags = ["--verify", "off" if is_off else "checksum"]
            process.touch_memory(bench.size_bytes * 5 // 4)
            bench.store.follow(checksums=() if is_off else (offered,))
            with Daemon(_settings(bench, flags)) as daemon:
                load = daemon.load(fetch.MODEL)
                fetch.insist_same(bench.file, Path(load.path) / bench.file.name)
            taken[case].append(fetch.Sample(load.wall_s, load.cpu_s, load.peak_rss_bytes))
            options.progress(f"{NAME}: round {turn + 1}/{rounds} {case} {load.wall_s:.2f} s")
    for case, samples in taken.items():
        yield from fetch.rows_of(case, "cached", samples, bench.size_bytes)


def _serve_help() -> str:
    command = [sys.executable, "-m", "cached", "serve", "--help"]
    done = subprocess.run(command, cwd=record.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
