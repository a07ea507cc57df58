"""Check what lies in memory: ways to read it back, and what the sums themselves cost."""

from __future__ import annotations

import hashlib
import importlib
import mmap
import os
import subprocess
import sys
import time
import zlib
from functools import partial
from typing import TYPE_CHECKING

from bench import options, record, requirements
from bench.record import Samples

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bench.record import Row

    Update = Callable[[memoryview | mmap.mmap, int], int]
    """Bytes and the sum of those before → the sum of both."""
    Way = Callable[[int, int, Update], int]
    """A descriptor, how long it is, what sums → the sum."""

NAME = "checksum"
MIB = 1 << 20
SIZE_BYTES = 256 * MIB
QUICK_BYTES = 64 * MIB
MAPPED_BYTES = 8 * MIB  # the longest part of a file that is checked at once
SUMMED_BYTES = 128 << 10
ROUNDS = 7
QUICK_ROUNDS = 3
MADV_POPULATE_READ = 22  # Linux 5.14; not in Python's mmap
MODULE = "awscrt.checksums"
WORKLOAD = (
    "read-back: CRC64NVME over 256 MiB (64 MiB in a quick run) of warm shared memory (a memfd, "
    "which is tmpfs) by one thread. pread-SIZE: read into one buffer of that size, again and "
    "again; mmap: mapped 8 MiB at a time; mmap-populate with MAP_POPULATE, mmap-madvise with "
    "MADV_POPULATE_READ. sum: each sum alone, over a buffer of 128 KiB that stays in the cache. "
    "import: wall time of importing awscrt's checksums in a new process. The subjects take turns."
)
NEEDS = (requirements.PEERS["awscrt"],)
CASES = ("read-back", "sum", "import")


def by_pread(buffer_bytes: int) -> Way:
    """Return the way through a buffer."""
    view = memoryview(bytearray(buffer_bytes))

    def summed(fd: int, size_bytes: int, update: Update) -> int:
        at = value = 0
        while at < size_bytes:
            got_bytes = os.preadv(fd, [view[: size_bytes - at]], at)
            value = update(view[:got_bytes], value)
            at += got_bytes
        return value

    return summed


def by_mmap(flags: int = 0, advice: int | None = None) -> Way:
    """Return the way through mappings, of MAPPED_BYTES each."""

    def summed(fd: int, size_bytes: int, update: Update) -> int:
        value = 0
        for at in range(0, size_bytes, MAPPED_BYTES):
            length = min(MAPPED_BYTES, size_bytes - at)
            all_flags = mmap.MAP_SHARED | flags
            with mmap.mmap(fd, length, all_flags, mmap.PROT_READ, offset=at) as mapping:
                if advice is not None:
                    mapping.madvise(advice)
                value = update(mapping, value)
        return value

    return summed


WAYS = {
    "pread-64KiB": by_pread(64 << 10),
    "pread-128KiB": by_pread(128 << 10),
    "pread-256KiB": by_pread(256 << 10),
    "pread-1MiB": by_pread(MIB),
    "mmap": by_mmap(),
    "mmap-populate": by_mmap(mmap.MAP_POPULATE),
    "mmap-madvise": by_mmap(advice=MADV_POPULATE_READ),
}


def main(arguments: Sequence[str]) -> None:
    """Measure, print the rows, and write the result."""
    args = options.parser(NAME, "Check what lies in memory.").parse_args(arguments)
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
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    size_bytes = QUICK_BYTES if args.quick else SIZE_BYTES
    if "read-back" in cases:
        yield from read_back(size_bytes, rounds, _of_awscrt("crc64nvme"))
    if "sum" in cases:
        yield from _sums(size_bytes, rounds)
    if "import" in cases:
        taken = [_import_ms() for _ in range(rounds + 1)]
        yield record.row(Samples("import", "awscrt", "import_ms", "ms", taken[1:]))


def read_back(size_bytes: int, rounds: int, update: Update) -> Iterator[Row]:
    """Sum the same bytes in every way.

    Raises:
        ValueError: two ways come to different sums.
    """
    fd = os.memfd_create(NAME)
    try:
        for _ in range(0, size_bytes, MIB):
            os.write(fd, os.urandom(MIB))
        sums: set[int] = set()

        def once(way: Way) -> None:
            sums.add(way(fd, size_bytes, update))

        works = {name: partial(once, way) for name, way in WAYS.items()}
        yield from _in_turns("read-back", works, size_bytes, rounds)
    finally:
        os.close(fd)
    if len(sums) != 1:
        raise ValueError(f"the ways come to different sums: {sums}")


def _sums(size_bytes: int, rounds: int) -> Iterator[Row]:
    block = memoryview(bytearray(os.urandom(SUMMED_BYTES)))

    def crc(update: Update) -> None:
        value = 0
        for _ in range(0, size_bytes, SUMMED_BYTES):
            value = update(block, value)

    def sha(name: str) -> None:
        digest = hashlib.new(name, usedforsecurity=False)
        for _ in range(0, size_bytes, SUMMED_BYTES):
            digest.update(block)

    works = {
        "crc64nvme": lambda: crc(_of_awscrt("crc64nvme")),
        "crc32c": lambda: crc(_of_awscrt("crc32c")),
        "crc32": lambda: crc(zlib.crc32),
        "sha1": lambda: sha("sha1"),
        "sha256": lambda: sha("sha256"),
    }
    yield from _in_turns("sum", works, size_bytes, rounds)


def _in_turns(
    case: str, works: Mapping[str, Callable[[], None]], size_bytes: int, rounds: int
) -> Iterator[Row]:
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):  # the first warms up
        for name, work in works.items():
            began_s = time.thread_time()
            work()
            if turn:
                taken[name].append((time.thread_time() - began_s) / size_bytes * (1 << 30))
    for name, values in taken.items():
        yield record.row(Samples(case, name, "cpu_s_per_GiB", "s/GiB", values))


def _of_awscrt(name: str) -> Update:
    update: Update = getattr(importlib.import_module(MODULE), name)
    return update


def _import_ms() -> float:
    program = (
        "import time; began_s = time.perf_counter(); "
        f"import {MODULE}; print((time.perf_counter() - began_s) * 1000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
