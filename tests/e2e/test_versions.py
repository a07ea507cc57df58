"""Versions switch and models are evicted while workers read: nobody sees a wrong byte.

And the memory stays within the budget the whole time, by the kernel's own figures.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

import cached
from tests.e2e.conftest import aws
from tests.e2e.editions import OWN, SAME, Edition, edition, put, uri_of, write_sums, wrong_in
from tests.e2e.kernel import Watch, pages
from tests.e2e.reader import Orders, Report, Started, favourite
from tests.e2e.served import MIB, environment
from tests.fakes.store_faults import Stall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.e2e.conftest import Daemons, Stores
    from tests.e2e.served import Served
    from tests.fakes.store_server import StoreServer

BUDGET_BYTES = 64 * MIB  # two versions of one model, which share half, or a model and a half
BUDGET = f"--memory-budget={BUDGET_BYTES}"
NAMES = ["a", "b", "c"]
EDITIONS = 3  # of each model; the store goes round
PROCESSES = 10
THREADS = 10
LOAD_S = 30.0
MOST_LOAD_S = 60.0  # on a busy machine, until enough has happened
REFRESHED, EVICTED, MADE_ROOM = 5, 3, 2  # times, at least
REST_S = 2.0  # of a reader, at most: a hundred that never rest are more than two CPUs bear
BACK_S = 1.0  # until memory is back whose last mapping is gone
SEGMENTS = pytest.mark.parametrize("segments", ["tmpfs", "memfd"])

HOLDER = """
import sys, cached
model = cached.open("a", timeout_s=30, until="ready")
views = dict(model.items())
print(model.version, flush=True)
sys.stdin.read()
"""


def start(daemon: Daemons, server: StoreServer, segments: str, *flags: str) -> Served:
    """Start a daemon of the three models."""
    models = {name: uri_of(name) for name in NAMES}
    return daemon(models, BUDGET, f"--segments={segments}", *flags, more=aws(server))


def refresh(served: Served, name: str, *arguments: str) -> str:
    """Have the daemon look for another version and switch; return the one that is current."""
    done = served.run("refresh", name, "--json", "--timeout=30s", *arguments)
    assert done.returncode == 0, done.stderr
    version: str = json.loads(done.stdout)["version"]
    return version


# --- under load


class Operator:
    """Switches versions and evicts models, by turns, as long as it is asked to."""

    def __init__(
        self, served: Served, server: StoreServer, editions: dict[str, list[Edition]], seed: int
    ) -> None:
        self.done: Counter[str] = Counter()
        self._served = served
        self._server = server
        self._editions = editions
        self._random = random.Random(seed)
        self._puts: Counter[str] = Counter()

    def has_more_to_do(self, run_s: float) -> bool:
        """Return whether to go on after so long."""
        return run_s < (LOAD_S if self.is_enough else MOST_LOAD_S)

    @property
    def is_enough(self) -> bool:
        """Return whether so much has happened that the test says something."""
        return (
            self.done["refreshed"] >= REFRESHED
            and self.done["evicted"] >= EVICTED
            and self._served.metric("cached_evictions_total", reason="budget") >= MADE_ROOM
        )

    def step(self) -> None:
        if self._random.random() < 0.6:
            self._refresh(favourite(NAMES))
        else:
            self._evict(self._random.choice(NAMES))

    def _refresh(self, name: str) -> None:
        self._puts[name] += 1
        put(self._server, self._editions[name][self._puts[name] % EDITIONS])
        done = self._served.run("refresh", name, "--timeout=5s", timeout_s=30)
        if done.returncode == 0:
            self.done["refreshed"] += 1
        elif done.returncode == 4:  # readers hold both versions before it: no room for a third
            self.done["refresh was late"] += 1
        else:
            assert done.returncode == 1, done.stderr
            reasons = (" needs ", "was replaced", "was evicted meanwhile")
            assert any(reason in done.stderr for reason in reasons), done.stderr
            self.done["refresh was refused"] += 1

    def _evict(self, name: str) -> None:
        done = self._served.run("evict", name, timeout_s=30)
        if done.returncode == 0:
            self.done["evicted"] += 1
        else:
            assert done.returncode == 1, done.stderr
            reasons = ("leased by", "mapped by a process")
            assert any(reason in done.stderr for reason in reasons), done.stderr
            self.done["not evicted: it was held"] += 1


def together(reports: Sequence[Report]) -> Report:
    """Return the sums of all reports."""
    opens: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for report in reports:
        opens.update(report.opens)
        refused.update(report.refused)
    return Report(dict(opens), dict(refused), [line for each in reports for line in each.wrong])


@pytest.mark.slow
@SEGMENTS
def test_a_hundred_readers_see_right_bytes_while_versions_switch_and_models_go(
    daemon: Daemons, store: Stores, tmp_path: Path, segments: str
):
    editions = {name: [edition(name, number) for number in range(EDITIONS)] for name in NAMES}
    sums = tmp_path / "sums"
    write_sums(sums, [each for some in editions.values() for each in some])
    server = store({})
    for some in editions.values():
        put(server, some[0])
    served = start(daemon, server, segments)
    operator = Operator(served, server, editions, seed=1)
    readers: list[Started] = []
    try:
        with Watch(served) as watch:
            readers.extend(
                Started(served, Orders(NAMES, str(sums), THREADS, seed, REST_S))
                for seed in range(PROCESSES)
            )
            began_s = time.monotonic()
            while operator.has_more_to_do(time.monotonic() - began_s):
                operator.step()
            for each in readers:
                each.tell_to_end()
            report = together([each.stop(timeout_s=60) for each in readers])
    finally:
        for each in readers:
            each.kill()
    told = f"{segments}: {report}, {operator.done}, {watch.count} samples, most {watch.most}"
    print(told)
    assert report.wrong == []
    assert watch.error is None
    assert watch.over == []
    # that it happened at all
    assert watch.count > 100, told
    assert watch.most.kernel_bytes > editions["a"][0].size_bytes, told
    assert operator.is_enough, told
    assert sum(report.opens.values()) > 2 * PROCESSES * THREADS, told
    assert len(report.opens) > 2, told
    assert set(report.refused) <= {"OverBudget", "Stale"}
    memory = json.loads(served.run("status", "--json").stdout)["memory"]
    assert memory["leased_bytes"] == 0
    assert memory["committed_bytes"] == sum(pages(served).values())


# --- one at a time


def seconds_until(is_true: Callable[[], bool]) -> float:
    """Return how long it takes until something is so; at most 10 s."""
    began_s = time.monotonic()
    while not is_true():
        assert time.monotonic() < began_s + 10, "it does not become so within 10 s"
        time.sleep(0.005)
    return time.monotonic() - began_s


def by_views(served: Served) -> Callable[[], None]:
    """Hold the model by a view alone; return what lets go of it."""
    held = []
    with cached.open("a", timeout_s=30, until="ready") as model:
        held.append(model["own.0"])
    return held.clear


def by_path(served: Served) -> Callable[[], None]:
    """Hold the model by a mapping of what is at its path, without any lease."""
    path = served.run("path", "a").stdout.strip()
    with open(f"{path}/{OWN}", "rb") as file:
        return mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ).close


def by_a_process_that_is_killed(served: Served) -> Callable[[], None]:
    """Hold the model in a process that ends by SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env=environment(served.worker_environment()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()

    def kill() -> None:
        process.send_signal(signal.SIGKILL)
        process.communicate()

    return kill


@pytest.mark.slow
@SEGMENTS
@pytest.mark.parametrize("hold", [by_views, by_path, by_a_process_that_is_killed])
def test_the_memory_of_an_old_version_is_back_a_second_after_its_last_mapping(
    daemon: Daemons,
    store: Stores,
    segments: str,
    hold: Callable[[Served], Callable[[], None]],
):
    old, new = edition("a", 0), edition("a", 1)
    server = store(old.objects)
    served = start(daemon, server, segments)
    let_go = hold(served)
    before = pages(served)
    assert sum(before.values()) == old.size_bytes
    put(server, new)
    assert refresh(served, "a") == new.version
    both = pages(served)
    assert before.keys() < both.keys()
    time.sleep(1.2)  # it is looked at twice a second
    assert pages(served) == both, "it went while it was mapped"
    let_go()
    back_s = seconds_until(lambda: sum(pages(served).values()) == new.size_bytes)
    print(f"{segments}, {hold.__name__}: back after {back_s * 1e3:.0f} ms")
    assert back_s <= BACK_S
    model = served.model("a")
    assert model["verified"] == "crc32"
    assert [(each["version"], each["state"]) for each in model["versions"]] == [
        (new.version, "current")
    ]


@pytest.mark.slow
@SEGMENTS
def test_a_version_that_is_kept_comes_back_without_a_byte_from_the_store(
    daemon: Daemons, store: Stores, segments: str
):
    old, new = edition("a", 0), edition("a", 1)
    sums = {each.version: each.sums for each in (old, new)}
    server = store(old.objects)
    served = start(daemon, server, segments, "--kept-versions=1")
    assert served.run("prefetch", "a").returncode == 0
    put(server, new)
    assert refresh(served, "a") == new.version
    requests, served_bytes = len(server.seen), server.served_bytes
    for back in (old, new, old):
        assert refresh(served, "a", f"--version={back.version}") == back.version
        with cached.open("a", timeout_s=30) as model:
            assert model.version == back.version
            assert wrong_in(model, sums) == []
    assert (len(server.seen), server.served_bytes) == (requests, served_bytes)


@pytest.mark.slow
@SEGMENTS
def test_two_versions_are_open_at_once_and_have_in_common_what_is_equal(
    daemon: Daemons, store: Stores, segments: str
):
    old, new = edition("a", 0), edition("a", 1)
    sums = {each.version: each.sums for each in (old, new)}
    server = store(old.objects)
    served = start(daemon, server, segments)
    first = cached.open("a", timeout_s=30)
    assert wrong_in(first, sums) == []
    put(server, new)
    loaded_bytes = server.served_bytes
    assert refresh(served, "a") == new.version
    assert server.served_bytes - loaded_bytes == changed_bytes(old, new)
    assert first.is_stale
    with (
        first,
        cached.open("a", version=old.version, timeout_s=30) as again,
        cached.open("a", version=new.version, timeout_s=30) as second,
    ):
        assert [model.version for model in (again, second)] == [old.version, new.version]
        assert [wrong_in(model, sums) for model in (first, again, second)] == [[], [], []]
        assert inode(first, OWN) == inode(again, OWN) != inode(second, OWN)
        assert inode(first, SAME) == inode(again, SAME) == inode(second, SAME)
        assert sum(pages(served).values()) == old.size_bytes + changed_bytes(old, new)
    with pytest.raises(cached.VersionUnknown, match=new.version):
        cached.open("a", version=old.version, timeout_s=30)


def changed_bytes(old: Edition, new: Edition) -> int:
    """Return how long the objects are that differ."""
    return sum(
        each.size_bytes for key, each in new.objects.items() if each.etag != old.objects[key].etag
    )


def inode(model: cached.Model, path: str) -> tuple[int, int]:
    facts = os.stat(f"{model.path}/{path}")
    return facts.st_dev, facts.st_ino


# --- and the next daemon


def killed(daemon: Daemons, server: StoreServer, *flags: str) -> Callable[[], Served]:
    """Return what starts a daemon of one model on the same root, after a kill of the one before."""
    life: list[Served] = []

    def next_one() -> Served:
        at, root = (life[-1].socket, life[-1].root) if life else (None, None)
        if life:
            life[-1].kill()
        more = aws(server)
        models = {"a": uri_of("a")}
        served = daemon(models, BUDGET, *flags, more=more, purge=False, at=at, root=root)
        life.append(served)
        return served

    return next_one


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("kept", [1, 0])
def test_a_daemon_that_went_back_and_is_killed_stays_there(
    daemon: Daemons, store: Stores, kept: int
):
    old, new = edition("a", 0), edition("a", 1)
    sums = {each.version: each.sums for each in (old, new)}
    server = store(old.objects)
    next_one = killed(daemon, server, f"--kept-versions={kept}")
    served = next_one()
    assert served.run("prefetch", "a").returncode == 0
    with cached.open("a", timeout_s=30):  # so that it stays, also where none is kept
        put(server, new)
        assert refresh(served, "a") == new.version
        assert refresh(served, "a", f"--version={old.version}") == old.version
    served_bytes = server.served_bytes

    second = next_one()
    seconds_until(lambda: bool(second.model("a")["confirmed"]))
    with cached.open("a", timeout_s=30) as model:
        assert model.version == old.version
        assert wrong_in(model, sums) == []
    assert server.served_bytes == served_bytes, "nothing was fetched"
    assert states(second) == {old.version: "current"} | ({new.version: "kept"} if kept else {})
    in_memory_bytes = sum_of(old, new) if kept else old.size_bytes
    memory = second.status()["memory"]
    assert sum(pages(second).values()) == memory["committed_bytes"] == in_memory_bytes
    assert refresh(second, "a") == new.version
    fetched_bytes = 0 if kept else changed_bytes(old, new)
    assert server.served_bytes - served_bytes == fetched_bytes

    third = next_one()
    seconds_until(lambda: bool(third.model("a")["confirmed"]))
    assert third.model("a")["version"] == new.version
    assert server.served_bytes - served_bytes == fetched_bytes


@pytest.mark.slow
@pytest.mark.fault
def test_a_worker_has_its_old_version_again_after_a_kill(daemon: Daemons, store: Stores):
    old, new = edition("a", 0), edition("a", 1)
    sums = {each.version: each.sums for each in (old, new)}
    server = store(old.objects)
    next_one = killed(daemon, server)
    served = next_one()
    assert served.run("prefetch", "a").returncode == 0
    with cached.open("a", timeout_s=30) as model:
        put(server, new)
        assert refresh(served, "a") == new.version
        served_bytes = server.served_bytes

        second = next_one()
        assert model.is_stale
        assert wrong_in(model, sums) == []
        with cached.open("a", version=old.version, timeout_s=30) as again:
            assert inode(model, OWN) == inode(again, OWN)
        assert second.model("a")["version"] == new.version
        assert states(second) == {new.version: "current", old.version: "kept"}
    seconds_until(lambda: states(second) == {new.version: "current"})
    assert server.served_bytes == served_bytes


@pytest.mark.slow
@pytest.mark.fault
def test_half_a_new_version_goes_on_beside_the_current_one_after_a_kill(
    daemon: Daemons, store: Stores
):
    old, new = edition("a", 0), edition("a", 1)
    sums = {each.version: each.sums for each in (old, new)}
    server = store(old.objects)
    next_one = killed(daemon, server)
    served = next_one()
    assert served.run("prefetch", "a").returncode == 0
    put(server, new)
    gets = server.count("GET")
    server.faults = dict.fromkeys(range(gets + 3, gets + 100), Stall(math.inf, -1))
    assert served.run("refresh", "a", "--timeout=1s").returncode == 4
    assert server.stalled.wait(30)

    second = next_one()
    assert second.model("a")["version"] == old.version
    server.faults = {}
    server.resumed.set()
    seconds_until(lambda: second.model("a")["version"] == new.version)
    with cached.open("a", timeout_s=30) as model:
        assert wrong_in(model, sums) == []
    there_bytes = second.metric("cached_adopted_bytes_total", model="a")
    assert there_bytes > old.size_bytes + new.size_bytes - changed_bytes(old, new)
    again_bytes = second.metric("cached_fetch_bytes_total", model="a")
    assert again_bytes == old.size_bytes + new.size_bytes - there_bytes


def states(served: Served) -> dict[str, str]:
    """Return where each version in memory stands."""
    return {each["version"]: each["state"] for each in served.model("a")["versions"]}


def sum_of(old: Edition, new: Edition) -> int:
    """Return what two versions take in memory together."""
    return old.size_bytes + changed_bytes(old, new)
