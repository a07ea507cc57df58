"""What the kernel says of a daemon: pages of its models, descriptors, threads."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from cached.cli.asking import Asking

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.served import Served

Inode = tuple[int, int]
BLOCK_BYTES = 512  # of st_blocks: stat(2)
POLL_S = 0.02


def pages(served: Served) -> dict[Inode, int]:
    """Return the bytes on pages of every segment: those in the root, and those it has open.

    A file that was unlinked counts as long as the daemon has it open, and that is until nobody
    maps it any more.
    """
    found: dict[Inode, int] = {}
    for path in (*_opened(served), *_in_root(served)):
        with contextlib.suppress(FileNotFoundError):  # closed, or unlinked, since it was listed
            facts = os.stat(path)
            if stat.S_ISREG(facts.st_mode):
                found[facts.st_dev, facts.st_ino] = facts.st_blocks * BLOCK_BYTES
    return found


def _opened(served: Served) -> Iterator[str]:
    mine = (f"{served.root}/models/", f"{served.root}/filling/", "/memfd:cached:")
    for path, target in _descriptors(served.pid):
        if target.startswith(mine):
            yield path


def _in_root(served: Served) -> Iterator[str]:
    for name in ("models", "filling"):
        for directory, _, files in os.walk(served.root / name):
            yield from (f"{directory}/{file}" for file in files)


def _descriptors(pid: int) -> Iterator[tuple[str, str]]:
    for number in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{number}"
        with contextlib.suppress(FileNotFoundError):
            yield path, os.readlink(path)


def used_bytes(served: Served) -> int:
    """Return how many bytes all segments had on pages at one moment, or less.

    What was there before and after that moment was there then, and pages of a segment only become
    more: so the sum is never too large, however slowly it is taken.
    """
    before = pages(served)
    after = pages(served)
    return sum(size_bytes for inode, size_bytes in before.items() if inode in after)


def descriptors(pid: int) -> Counter[str]:
    """Return how many descriptors of each kind a process has."""
    return Counter(_kind(target) for _, target in _descriptors(pid))


def _kind(target: str) -> str:
    if target.startswith("/memfd:"):
        return "memfd"
    return target if target.startswith("/") else target.partition(":")[0]


def threads(pid: int) -> Counter[str]:
    """Return how many threads of each name a process has."""
    found: Counter[str] = Counter()
    for number in os.listdir(f"/proc/{pid}/task"):
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"/proc/{pid}/task/{number}/comm", encoding="utf-8") as file,
        ):
            found[file.read().strip()] += 1
    return found


class Sample(NamedTuple):
    """The daemon's memory, in bytes: what it says of it, and what the kernel says."""

    budget_bytes: int
    used_bytes: int
    kernel_bytes: int


class Watch:
    """Compares a daemon's memory with its budget again and again while its ``with`` block runs.

    Attributes:
        over: samples that were over it; must stay empty.
        most: the largest of all samples.
        count: how many there were.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")
        self.over: list[Sample] = []
        self.most = Sample(0, 0, 0)
        self.count = 0
        self.error: BaseException | None = None

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join(60)

    def _run(self) -> None:
        try:
            with Asking(str(self._served.socket)) as daemon:
                while not self._is_over.wait(POLL_S):
                    self._look(daemon)
        except BaseException as error:  # noqa: BLE001 - told by who started it
            self.error = error

    def _look(self, daemon: Asking) -> None:
        kernel_bytes = used_bytes(self._served)
        told = daemon.ask("status")["memory"]
        used = told["reserved_bytes"] + told["committed_bytes"]
        sample = Sample(told["budget_bytes"], used, kernel_bytes)
        self.count += 1
        self.most = Sample(*(max(pair) for pair in zip(sample, self.most, strict=True)))
        if max(used, kernel_bytes) > sample.budget_bytes:
            self.over.append(sample)
