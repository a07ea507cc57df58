"""Killed at any moment: the next daemon goes on with what is there, and so do the workers."""

from __future__ import annotations

import gc
import itertools
import math
import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cached
from cached.core.ranges import RangeSet
from tests.e2e.conftest import aws
from tests.e2e.dense import URI, asked_for, bytes_asked, dense, fetched, settled
from tests.e2e.left import assert_counts, assert_nothing_but, found
from tests.e2e.served import Served
from tests.fakes.store_faults import Stall
from tests.fakes.store_server import StoreServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.e2e.conftest import Daemons, Stores
    from tests.fakes.s3_objects import Asked

pytestmark = pytest.mark.usefixtures("tmpfs")

MODEL = dense()
LINK_BYTES_PER_S = 60e6
SLOW_LINK_BYTES_PER_S = 20e6  # a MiB takes 0.052 s, so that parts stay as short as they begin
SLOTS = 3  # so few that most of what was asked for has come
REQUESTS = 26  # GETs and HEADs of a load; it has two more
MOMENTS = 50
DEBUG = "--log-level=debug"


class Worker:
    """A worker that reads one tensor after another, until its daemon has gone.

    Attributes:
        model: None until it has mapped it.
        views: what it has read.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.model: cached.Model | None = None
        self.views: dict[str, Any] = {}
        self._names = names
        self._error: cached.CachedError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.model = cached.open("llm", timeout_s=60)
            for name in self._names:
                self.views[name] = self.model[name]
        except cached.CachedError as error:
            self._error = error

    def keeps(self) -> None:
        """See that what it has is as it was; if it has not mapped it, it waits for a daemon."""
        if self.model is not None:
            self._end()

    def _end(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "it does not hear of the death"
        assert self._error is None or isinstance(self._error, cached.DaemonUnavailable), self._error
        self._check()

    def _check(self) -> None:
        for name, view in self.views.items():
            assert view.tobytes() == MODEL.tensors[name], name

    def goes_on(self) -> None:
        """Read all of it from the next daemon; what it had is as it was."""
        self._end()
        if self.model is None:
            self.model = cached.open("llm", timeout_s=60)
        with self.model as model:
            assert not model.is_stale
            for name in self._names:
                assert model[name].tobytes() == MODEL.tensors[name], name
            self._check()


def workers() -> list[Worker]:
    """Return two: one that reads from the front, as files are fetched, and one from the end."""
    names = list(MODEL.tensors)
    return [Worker(names), Worker(names[::-1])]


class Killer:
    """Kills a daemon at its k-th GET or HEAD, before that is answered; the first is 1."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._numbers = itertools.count(1)
        self._served: Served | None = None
        self._is_known = threading.Event()

    def kills(self, served: Served) -> None:
        """Tell whom; it is waited for."""
        self._served = served
        self._is_known.set()

    def __call__(self, asked: Asked) -> None:
        if "list-type" in asked.parameters or next(self._numbers) != self._k:
            return
        assert self._is_known.wait(20)
        assert self._served is not None
        self._served.process.kill()


def there_of(killed: Sequence[Served]) -> dict[str, RangeSet]:
    """Return what daemons on one root had told to be there when they were killed."""
    there = {path: RangeSet() for path in MODEL.files}
    for served in killed:
        for path, ranges in fetched(served).items():
            for span in ranges:
                there[path].add(span.start, span.stop)
    return there


def assert_taken_over(
    daemon: Daemons, store: Stores, killed: Sequence[Served], readers: Sequence[Worker], *flags: str
) -> Served:
    """Start the next daemon on root and socket of those that were killed, and look at all of it."""
    there = there_of(killed)
    server = store(MODEL.objects())
    served = daemon(
        {"llm": URI},
        DEBUG,
        *flags,
        more=aws(server),
        prefetch=True,
        purge=False,
        at=killed[0].socket,
        root=killed[0].root,
    )
    for reader in readers:
        reader.goes_on()
    with cached.open("llm", timeout_s=60, until="ready") as model:
        for path, content in MODEL.files.items():
            assert bytes(model.file(path)) == content, path
    asked = asked_for(server)
    for path, content in MODEL.files.items():
        if there[path].covers(0, len(content)):
            assert path not in asked, f"all of {path} was there"
        for first, stop in settled(there[path], len(content)):
            again = [span for span in asked.get(path, ()) if span[0] < stop and first < span[1]]
            assert not again, f"{path} was there from {first} to {stop}"
    assert sum(bytes_asked(server).values()) <= MODEL.size_bytes
    status = served.status()
    (told,) = status["models"]
    holders = sum(bool(reader.views) for reader in readers)  # a lease lives as long as a view
    assert (told["state"], told["leases"], told["error"]) == ("resident", holders, None)
    assert_nothing_but(served.root, told["version"], MODEL.files)
    assert_counts(served.root, status["memory"])
    return served


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("k", range(1, REQUESTS + 1))
def test_a_daemon_killed_at_a_get_or_head_is_taken_over(daemon: Daemons, store: Stores, k: int):
    server = store(MODEL.objects(), throttle_bytes_per_s=SLOW_LINK_BYTES_PER_S)
    server.noticed = killer = Killer(k)
    first = daemon(
        {"llm": URI},
        DEBUG,
        f"--fetch-threads={SLOTS}",
        more=aws(server),
        prefetch=True,
        purge=False,
    )
    readers = workers()
    killer.kills(first)
    first.process.wait(60)
    for reader in readers:
        reader.keeps()
    there = there_of([first])
    come = sum(len(settled(there[path], len(content))) for path, content in MODEL.files.items())
    assert come >= k - len(MODEL.files) - 2 * SLOTS, "so much it had asked for, and more"
    assert_taken_over(daemon, store, [first], readers)


@pytest.fixture(scope="module")
def load_s() -> Iterator[float]:
    """From the start of a daemon until it has the model, in seconds."""
    with StoreServer(MODEL.objects(), throttle_bytes_per_s=LINK_BYTES_PER_S) as server:
        began_s = time.monotonic()
        served = Served({"llm": URI}, more=aws(server), prefetch=True)
        try:
            while "version became current" not in served.log.read_text():
                assert served.process.poll() is None, served.log.read_text()
                time.sleep(0.005)
            yield time.monotonic() - began_s
        finally:
            served.remove()


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("seed", range(MOMENTS))
def test_a_daemon_killed_at_a_random_moment_is_taken_over(
    daemon: Daemons, store: Stores, load_s: float, seed: int
):
    chance = random.Random(seed)
    killed: list[Served] = []
    readers: list[Worker] = []
    for _ in range(1 + seed % 2):  # the one that takes over is killed, too
        server = store(MODEL.objects(), throttle_bytes_per_s=LINK_BYTES_PER_S)
        settings: dict[str, Any] = (
            {"at": killed[0].socket, "root": killed[0].root} if killed else {}
        )
        began_s = time.monotonic()
        served = daemon(
            {"llm": URI},
            DEBUG,
            more=aws(server),
            prefetch=True,
            purge=False,
            is_awaited=False,
            **settings,
        )
        readers = readers or workers()
        moment_s = began_s + chance.uniform(0, 1.15 * load_s)
        time.sleep(max(0, moment_s - time.monotonic()))
        served.kill()
        killed.append(served)
    assert_taken_over(daemon, store, killed, readers)


# --- the other back ends


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("state", ["loading", "resident"])
def test_it_is_the_same_on_a_disk(daemon: Daemons, store: Stores, on_disk: Path, state: str):
    first, readers = killed_when(daemon, store, state, "--segments=file", root=on_disk)
    assert_taken_over(daemon, store, [first], readers, "--segments=file")


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("state", ["loading", "resident"])
def test_sealed_memory_stays_with_the_workers_alone(daemon: Daemons, store: Stores, state: str):
    first, readers = killed_when(daemon, store, state, "--segments=memfd")
    assert "memfd:cached" in maps()

    server = store(MODEL.objects())
    second = daemon(
        {"llm": URI},
        "--segments=memfd",
        more=aws(server),
        purge=False,
        at=first.socket,
        root=first.root,
    )
    told = second.status()
    assert found(second.root) == ["filling/", "lock", "models/"]
    assert told["memory"]["free_bytes"] == told["memory"]["budget_bytes"]
    assert told["models"][0]["state"] == "absent"

    for reader in readers:
        reader.goes_on()
    with cached.open("llm", timeout_s=60, until="ready") as model:
        for path, content in MODEL.files.items():
            assert bytes(model.file(path)) == content, path
    assert bytes_asked(server) == {path: len(content) for path, content in MODEL.files.items()}
    del reader, model
    readers.clear()
    gc.collect()  # an error's traceback has the worker's frames
    assert "memfd:cached" not in maps()


def killed_when(
    daemon: Daemons, store: Stores, state: str, *flags: str, root: Path | None = None
) -> tuple[Served, list[Worker]]:
    """Return a daemon that was killed in a state of the model, and its workers."""
    server = store(MODEL.objects(), throttle_bytes_per_s=LINK_BYTES_PER_S)
    if state == "loading":
        server.faults = {at: Stall(math.inf) for at in range(16, 100)}
    first = daemon(
        {"llm": URI}, DEBUG, *flags, more=aws(server), prefetch=True, purge=False, root=root
    )
    readers = workers()
    if state == "loading":
        assert server.stalled.wait(60)
        while not all(reader.views for reader in readers):
            time.sleep(0.005)
    else:
        first.wait_for_state("llm", "resident")
    first.kill()
    for reader in readers:
        reader.keeps()
    return first, readers


def maps() -> str:
    """Return the table of what this process maps."""
    return Path("/proc/self/maps").read_text()
