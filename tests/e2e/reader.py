"""A worker that opens models again and again, looks at every byte, and tells what was wrong.

``python -m tests.e2e.reader`` with its ``Orders`` as JSON in the first line of the input; it ends
when the input does, and then prints its ``Report`` as JSON. Which model it favours goes round with
the time, so that others come to be held by nobody.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cached
from tests.e2e.editions import OWN, SAME, wrong_in
from tests.e2e.served import environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.e2e.served import Served

ROOT = Path(__file__).parents[2]

FAVOUR_S = 3.0  # then the next model has its turn
FAVOUR_RATIO = 0.97
NICE = 5  # readers are the load: what is asked of the daemon meanwhile shall not take minutes
HOLD_S = 0.05  # at most
AGAIN_RATIO = 0.25  # how often all is read once more before the model is closed
FORK_RATIO = 0.2
OPEN_TIMEOUT_S = 60.0


class Orders(NamedTuple):
    """What a reader does.

    Attributes:
        names: of the models.
        sums: file with the sums of every version (``editions.write_sums``).
        threads: that read.
        seed: of what is random.
        rest_s: between a model and the next, at most.
        forks: children of fork look at what they inherit, and outlive their parent for a while.
    """

    names: list[str]
    sums: str
    threads: int
    seed: int
    rest_s: float
    forks: bool = False


class Report(NamedTuple):
    """What a reader has seen.

    Attributes:
        opens: that were granted, by version.
        refused: by the name of the error: what a reader must live with.
        wrong: anything else.
    """

    opens: dict[str, int]
    refused: dict[str, int]
    wrong: list[str]


def favourite(names: Sequence[str]) -> str:
    """Return the model that all readers favour at this moment."""
    return names[int(time.monotonic() / FAVOUR_S) % len(names)]


class Started:
    """A reader in a process of its own; whoever starts it stops it, or kills it."""

    def __init__(self, served: Served, orders: Orders) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.reader"],
            cwd=ROOT,
            env=environment(served.worker_environment()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(orders) + "\n")
        self.process.stdin.flush()

    def tell_to_end(self) -> None:
        """Have it begin nothing more; for ``stop``, which waits for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None  # communicate() would flush it

    def stop(self, timeout_s: float) -> Report:
        """End it and return what it has seen; what it and its children complain of is wrong."""
        out, complaints = self.process.communicate(timeout=timeout_s)
        report = Report(*json.loads(out)) if out else Report({}, {}, ["it ended without a report"])
        return report._replace(wrong=[*report.wrong, *complaints.splitlines()])

    def kill(self) -> list[str]:
        """End it by SIGKILL; return what it and its children complained of until then."""
        self.process.kill()
        return self.process.communicate()[1].splitlines()


class _Reader:
    """One thread."""

    def __init__(self, orders: Orders, number: int, is_over: threading.Event) -> None:
        self.opens: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._orders = orders
        self._sums: dict[str, dict[str, int]] = json.loads(Path(orders.sums).read_text())
        self._random = random.Random(f"{orders.seed} {number}")
        self._is_over = is_over

    def run(self) -> None:
        while not (self._is_over.is_set() or self.wrong):
            try:
                self._read(self._chosen())
            except (cached.OverBudget, cached.Stale) as error:
                self.refused[type(error).__name__] += 1
            except BaseException as error:  # noqa: BLE001 - all that should not be is told
                self.wrong.append(f"{type(error).__name__}: {error}")
            self._is_over.wait(self._random.uniform(0, self._orders.rest_s))

    def _chosen(self) -> str:
        names = self._orders.names
        if self._random.random() < FAVOUR_RATIO:
            return favourite(names)
        return self._random.choice(names)

    def _read(self, name: str) -> None:
        with cached.open(name, timeout_s=OPEN_TIMEOUT_S) as model:
            self._note(model, "at first", wrong_in(model, self._sums))
            self.opens[model.version] += 1
            files = _inodes(model)
            if self._orders.forks and self._random.random() < FORK_RATIO:
                self._fork(model)
            self._is_over.wait(self._random.uniform(0, HOLD_S))
            if self._random.random() < AGAIN_RATIO:
                self._note(model, "after a while", wrong_in(model, self._sums))
            if _inodes(model) != files:
                self.wrong.append(f"{model!r}: its files went while it was leased")

    def _note(self, model: Any, when: str, wrong: list[str]) -> None:
        self.wrong += [f"{model!r} {when}: {each}" for each in wrong]

    def _fork(self, model: Any) -> None:
        """Have a child look at what it inherits, after a while; its exit code is not waited for."""
        wait_s = self._random.uniform(0, 0.5)
        pid = os.fork()
        if pid == 0:
            try:
                time.sleep(wait_s)
                wrong = wrong_in(model, self._sums)
                if wrong:
                    os.write(2, f"a child of fork saw {wrong} in {model!r}\n".encode())
            except BaseException as error:  # noqa: BLE001 - as above
                os.write(2, f"a child of fork failed: {error!r}\n".encode())
            finally:
                os._exit(0)


def _inodes(model: Any) -> list[tuple[int, int]]:
    """Return device and inode of a model's files by its path; what is unlinked has none."""
    facts = [os.stat(f"{model.path}/{path}") for path in (SAME, OWN)]
    return [(each.st_dev, each.st_ino) for each in facts]


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for children of fork
    os.nice(NICE)
    orders = Orders(*json.loads(sys.stdin.readline()))
    is_over = threading.Event()
    readers = [_Reader(orders, number, is_over) for number in range(orders.threads)]
    threads = [threading.Thread(target=each.run) for each in readers]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    is_over.set()
    for thread in threads:
        thread.join()
    report = Report(
        dict(sum((each.opens for each in readers), Counter())),
        dict(sum((each.refused for each in readers), Counter())),
        [line for each in readers for line in each.wrong],
    )
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
