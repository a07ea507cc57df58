"""After a long time of everything at once the daemon is as it was, and all memory is back.

20 s of it, or as long as CACHED_TEST_SOAK_S says (``make soak``: 10 minutes). What happens follows
from a seed, which is printed; CACHED_TEST_SOAK_SEED repeats it, as far as processes allow.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from bench.process import rss_bytes
from tests.e2e.conftest import aws
from tests.e2e.editions import OWN, Edition, edition, put, uri_of, write_sums
from tests.e2e.kernel import Watch, descriptors, pages, threads
from tests.e2e.reader import Orders, Started
from tests.e2e.served import COMMAND, MIB, environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.conftest import Daemons, Stores
    from tests.e2e.served import Served
    from tests.fakes.store_server import StoreServer

# Taken out of the environment: cached refuses variables of its name that it does not know.
SOAK_S = float(os.environ.pop("CACHED_TEST_SOAK_S", "20"))
SEED = int(os.environ.pop("CACHED_TEST_SOAK_SEED", "0")) or random.SystemRandom().getrandbits(32)
END_S = 100.0  # for the start, and until all has ended
NAMES = ["a", "b", "c"]
BUDGET = f"--memory-budget={64 * MIB}"
FETCH_THREADS = 8
LISTENING = 2  # sockets: for workers, for HTTP
STORE_BYTES_PER_S = 150e6  # a load takes a while, so that much happens in the middle of it
EDITIONS = 3
READERS = 4  # at most
READER_THREADS = 3
READER_REST_S = 0.3
PROGRAMS = 3  # at most
PAUSE_S = 0.2  # between two actions, at most
REST_S = 20.0  # until what was under way has ended
MAX_GROWTH_BYTES = 16 * MIB
ANSWER_S = 60.0  # of a command

ALARMING = {"load refused", "retry planned"}  # what a log may tell that is not information

READ_BY_PATH = f'sha256sum < "$1/{OWN}"; sleep "$2"; sha256sum < "$1/{OWN}"'
REFUSALS = {  # of each command, what its error may say
    "refresh": (" needs ", "was replaced", "was evicted", "has no version", "no free"),
    "evict": ("leased by", "mapped by a process"),
    "prefetch": (" needs ", "was replaced", "was evicted"),
    "run": (" needs ", "was replaced"),
    "purge": (),
}


class State(NamedTuple):
    """What must not grow.

    Attributes:
        descriptors: of the daemon, by kind, but for connections to the store.
        connections: to the store; each may have a pipe.
        threads: of the daemon.
        rss_bytes: its resident memory.
    """

    descriptors: Counter[str]
    connections: int
    threads: int
    rss_bytes: int

    def has_more_than(self, first: State) -> Counter[str]:
        """Return the descriptors that were not there at first, and belong to no connection."""
        pipes = Counter(pipe=2 * (self.connections - first.connections))
        return self.descriptors - first.descriptors - pipes


def connections_to(port: int) -> int:
    """Return how many sockets of this machine, open and not closed, lead to a port of loopback."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = (line.split() for line in lines)
    return sum(each[2] == f"0100007F:{port:04X}" and each[9] != "0" for each in fields)


def state(served: Served, server: StoreServer) -> State:
    found = descriptors(served.pid)
    connections = connections_to(server.port)
    found["socket"] -= connections
    count = threads(served.pid).total()
    return State(found, connections, count, rss_bytes(served.pid))


class Soak:
    """Everything at once, by chance."""

    def __init__(self, served: Served, server: StoreServer, sums: str, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.opens: Counter[str] = Counter()
        self._served = served
        self._server = server
        self._editions: dict[str, list[Edition]] = {
            name: [edition(name, number) for number in range(EDITIONS)] for name in NAMES
        }
        self._own_sums = {
            hashlib.sha256(each.objects[f"{name}/{OWN}"].content_of(0, 1 << 40)).hexdigest()
            for name, some in self._editions.items()
            for each in some
        }
        self._sums = sums
        self._random = random.Random(seed)
        self._readers: list[Started] = []
        self._programs: list[subprocess.Popen[str]] = []
        write_sums(Path(sums), [each for some in self._editions.values() for each in some])
        for name in NAMES:
            self._replace(name)

    def warm_up(self) -> None:
        """Do once what makes the daemon as large as it is in use."""
        for name in NAMES * 2:
            for command in (("prefetch", name), ("refresh", name), ("purge",)):
                self._command(*command)

    def step(self) -> None:
        actions: list[tuple[int, Callable[[], None]]] = [
            (6, self._start_reader),
            (1, self._stop_reader),
            (2, self._kill_reader),
            (3, self._start_program),
            (2, self._kill_program),
            (4, self._refresh),
            (2, self._replace_in_mid_load),
            (2, self._go_back),
            (2, self._prefetch),
            (3, self._evict),
            (1, self._purge),
        ]
        weights = [weight for weight, _ in actions]
        (action,) = self._random.choices([each for _, each in actions], weights)
        action()
        time.sleep(self._random.uniform(0, PAUSE_S))

    def end(self) -> None:
        """End all workers and programs, and see what they have to say."""
        while self._readers:
            self._stop_reader()
        while self._programs:
            self._kill_program()

    def remove(self) -> None:
        """Kill what is left."""
        for each in self._readers:
            each.kill()
        for program in self._programs:
            program.kill()
            program.communicate()

    # --- workers

    def _start_reader(self) -> None:
        if len(self._readers) < READERS:
            seed = self._random.getrandbits(32)
            orders = Orders(NAMES, self._sums, READER_THREADS, seed, READER_REST_S, forks=True)
            self._readers.append(Started(self._served, orders))
            self.done["reader started"] += 1

    def _stop_reader(self) -> None:
        if self._readers:
            report = self._readers.pop().stop(ANSWER_S)
            assert report.wrong == []
            self.opens.update(report.opens)
            self.done.update(report.refused)
            self.done["reader stopped"] += 1

    def _kill_reader(self) -> None:
        if self._readers:
            assert self._readers.pop(0).kill() == []
            self.done["reader killed"] += 1

    def _start_program(self) -> None:
        self._reap()
        if len(self._programs) < PROGRAMS:
            seconds = f"{self._random.uniform(0, 3):.2f}"
            name = self._random.choice(NAMES)
            program = ("sh", "-c", READ_BY_PATH, "sh", "{}", seconds)  # seconds: of nothing open
            started = subprocess.Popen(
                [COMMAND, "run", name, "--timeout=30s", "--", *program],
                env=environment(self._served.worker_environment()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self._programs.append(started)
            self.done["program started"] += 1

    def _reap(self) -> None:
        """Look at the programs that have ended by themselves."""
        for program in [each for each in self._programs if each.poll() is not None]:
            self._programs.remove(program)
            self._ended(program)

    def _ended(self, program: subprocess.Popen[str]) -> None:
        """See what a program has read, and what it has started has ended too."""
        found, complaints = program.communicate(timeout=ANSWER_S)
        sums = set(found.split()) - {"-"}
        assert len(sums) <= 1, "what is at a path changed while a program ran"
        assert sums <= self._own_sums, "a program read by path what no version has"
        if program.returncode == -signal.SIGKILL and not complaints:
            self.done["program killed"] += 1
        else:  # it may have been killed when it had been refused
            assert sums or program.returncode
            self._judge("run", 1 if complaints else program.returncode, complaints)

    def _kill_program(self) -> None:
        self._reap()
        if self._programs:
            program = self._programs.pop()
            program.kill()
            self._ended(program)

    # --- the operator

    def _command(self, *arguments: str) -> None:
        done = self._served.run(*arguments, timeout_s=ANSWER_S)
        self._judge(arguments[0], done.returncode, done.stderr)

    def _judge(self, command: str, code: int, complaints: str) -> None:
        """Count how a command ended; it must be by an answer."""
        lines = [line for line in complaints.splitlines() if line.startswith("cached: ")]
        if code == 0:
            self.done[command] += 1
        elif code == 4:
            self.done[f"{command}: late"] += 1
        else:
            assert code == 1, (command, code, complaints)
            assert lines, (command, complaints)
            for line in lines:
                assert any(reason in line for reason in REFUSALS[command]), (command, line)
            self.done[f"{command}: refused"] += 1

    def _replace(self, name: str) -> None:
        put(self._server, self._random.choice(self._editions[name]))

    def _refresh(self) -> None:
        name = self._random.choice(NAMES)
        self._replace(name)
        self._command("refresh", name, "--timeout=3s")

    def _replace_in_mid_load(self) -> None:
        name = self._random.choice(NAMES)
        self._replace(name)
        self._command("refresh", name, "--no-wait")
        self._replace(name)

    def _go_back(self) -> None:
        name = self._random.choice(NAMES)
        versions = [each["version"] for each in self._served.model(name)["versions"]]
        if versions:
            self._command("refresh", name, f"--version={self._random.choice(versions)}")

    def _prefetch(self) -> None:
        self._command("prefetch", self._random.choice(NAMES), "--no-wait")

    def _evict(self) -> None:
        self._command("evict", self._random.choice(NAMES))

    def _purge(self) -> None:
        self._command("purge")


def wait_until(is_true: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + REST_S
    while not is_true():
        assert time.monotonic() < deadline_s, what()
        time.sleep(0.1)


def status(served: Served) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(served.run("status", "--json").stdout)
    return told


def is_at_rest(served: Served) -> bool:
    """Return whether nothing is under way, and nobody holds anything."""
    told = status(served)
    states = {model["state"] for model in told["models"]}
    is_refreshing = any(model["refreshing"] for model in told["models"])
    has_left = all(
        version["state"] != "leaving" for model in told["models"] for version in model["versions"]
    )
    is_idle = states <= {"absent", "resident", "failed"} and not is_refreshing and has_left
    return is_idle and not told["memory"]["leased_bytes"]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(SOAK_S + END_S)
@pytest.mark.parametrize("segments", ["tmpfs", "memfd"])
def test_after_a_long_time_of_everything_nothing_is_left(
    daemon: Daemons,
    store: Stores,
    tmp_path: Path,
    segments: str,
):
    print(f"{segments}: CACHED_TEST_SOAK_S={SOAK_S:.0f} CACHED_TEST_SOAK_SEED={SEED}")
    server = store({}, throttle_bytes_per_s=STORE_BYTES_PER_S)
    flags = (BUDGET, f"--segments={segments}", "--kept-versions=1")
    served = daemon({name: uri_of(name) for name in NAMES}, *flags, more=aws(server))
    soak = Soak(served, server, str(tmp_path / "sums"), SEED)
    served.get("/metrics")
    wait_until(
        lambda: descriptors(served.pid)["socket"] == LISTENING,
        lambda: descriptors(served.pid),
    )
    first = state(served, server)
    soak.warm_up()
    wait_until(lambda: is_at_rest(served), lambda: status(served))
    before = state(served, server)
    try:
        with Watch(served) as watch:
            stop_s = time.monotonic() + SOAK_S
            while time.monotonic() < stop_s:
                soak.step()
            soak.end()
    finally:
        soak.remove()
    print(f"{soak.done}, {soak.opens.total()} opens, {watch.count} samples, most {watch.most}")
    assert watch.error is None
    assert watch.over == []
    wait_until(lambda: is_at_rest(served), lambda: status(served))
    memory = status(served)["memory"]
    assert (memory["leased_bytes"], memory["reserved_bytes"]) == (0, 0)
    assert memory["committed_bytes"] == sum(pages(served).values())
    assert served.run("purge").returncode == 0
    assert pages(served) == {}
    assert status(served)["memory"]["committed_bytes"] == 0
    wait_until(
        lambda: not state(served, server).has_more_than(first),
        lambda: (first, state(served, server)),
    )
    after = state(served, server)
    print(f"first: {first}\nbefore: {before}\nafter: {after}")
    assert after.connections <= FETCH_THREADS
    assert after.threads <= before.threads
    assert after.rss_bytes - before.rss_bytes <= MAX_GROWTH_BYTES
    alarming = Counter(each["event"] for each in served.records() if each["level"] != "info")
    print(f"log: {alarming}")
    assert alarming.keys() <= ALARMING
