"""The standalone host: what starts when, and when it is ready."""

from __future__ import annotations

import resource
import threading
from typing import TYPE_CHECKING

import pytest

from cached.cli.load import load
from cached.core import effects, events
from cached.core.errors import ObjectMissing, StoreUnavailable
from cached.core.objects import FileRef, Left, ModelRef, Part, StoredObject, VersionRef
from cached.hosts.standalone import (
    HttpStart,
    Readiness,
    _budget_bytes,
    _directory_mode,
    raise_open_files,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cached.core.events import Event


REF = ModelRef("m", "s3://b/m/")
OF = VersionRef("m", "1")
STORED = StoredObject("m.gguf", "m.gguf", 9, '"1"')
PART = Part(0, FileRef(OF, 0), "s3://b/m.gguf", STORED, 0, 9)
NEVER_S = 3600.0


class Starts:
    """Counts, and tells when the first has come."""

    def __init__(self) -> None:
        self.count = 0
        self.has_come = threading.Event()

    def __call__(self) -> None:
        self.count += 1
        self.has_come.set()


@pytest.fixture
def starts() -> Starts:
    return Starts()


@pytest.fixture
def http(starts: Starts) -> Iterator[HttpStart]:
    http = HttpStart(starts, NEVER_S)
    yield http
    http.stop()


@pytest.mark.parametrize(
    "event",
    [
        events.PartFetched(PART, 0.1),
        events.PartFailed(PART, 0, StoreUnavailable("503")),
        events.Published(OF, "/a/model/of/empty/files"),
        events.ResolveFailed("m", ObjectMissing("nothing")),
    ],
    ids=lambda event: type(event).__name__,
)
def test_http_starts_when_the_first_get_is_over_or_there_will_be_none(
    http: HttpStart, starts: Starts, event: Event
):
    http.decided(effects.Resolve(REF), 0.0)
    http.decided(effects.FetchPart(PART), 0.0)
    assert starts.count == 0

    http.happened(event, 0.0)

    assert starts.count == 1


def test_http_starts_once_when_nothing_will_be_fetched(http: HttpStart, starts: Starts):
    http.decided(effects.WakeAt(1.0), 0.0)
    assert starts.count == 0

    http.decided(effects.Refused("m", "over_budget", "no room"), 0.0)
    http.decided(effects.Refused("m", "over_budget", "no room"), 0.0)

    assert starts.count == 1


def test_http_starts_soon_when_the_store_hangs(starts: Starts):
    http = HttpStart(starts, latest_s=0.0)

    http.decided(effects.Resolve(REF), 0.0)

    assert starts.has_come.wait(5)
    http.stop()
    assert starts.count == 1


def test_http_is_not_started_after_the_stop(http: HttpStart, starts: Starts):
    http.decided(effects.Resolve(REF), 0.0)
    http.stop()

    http.happened(events.PartFetched(PART, 0.1), 0.0)

    assert starts.count == 0
    assert "cached-http-start" not in {thread.name for thread in threading.enumerate()}


def test_readiness_latches():
    readiness = Readiness(["m"])
    assert readiness.why_not()

    readiness.decided(effects.MarkReady(), 0.0)
    readiness.decided(effects.Drained(), 0.0)

    assert readiness.why_not() == ""
    readiness.happened(events.DrainRequested(), 0.0)
    assert "stopping" in readiness.why_not()


def test_who_asks_why_it_is_not_ready_hears_each_model_what_it_does_and_its_last_error():
    readiness = Readiness(["m", "n", "o"])
    readiness.decided(effects.Resolve(REF), 0.0)
    readiness.decided(effects.Retried("m", "store_unavailable", 1.0, "503 of the store"), 0.0)
    readiness.decided(effects.Refused("n", "over_budget", "n needs 3 GiB, 2 GiB are free"), 0.0)
    readiness.decided(effects.Resolve(ModelRef("other", "s3://b/other/")), 0.0)

    assert readiness.why_not() == (
        "models that are prefetched at start are not all there yet: m is being listed "
        "(503 of the store), n has failed (n needs 3 GiB, 2 GiB are free), o is queued"
    )

    readiness.happened(events.Published(OF, "/a/model/of/empty/files"), 0.0)

    assert ": n has failed" in readiness.why_not()


def test_a_probe_is_not_told_of_a_thousand_models():
    readiness = Readiness(f"m{number}" for number in range(1000))
    assert readiness.why_not().endswith("m7 is queued, and 992 more")


@pytest.mark.parametrize(
    ("socket_mode", "directory_mode"), [(0o600, 0o700), (0o660, 0o750), (0o666, 0o755)]
)
def test_who_may_connect_may_look_a_model_up(socket_mode, directory_mode):
    assert _directory_mode(socket_mode) == directory_mode


class Memory:
    def __init__(self, available_bytes: int) -> None:
        self._available_bytes = available_bytes

    def available_bytes(self) -> int:
        return self._available_bytes

    def private_bytes(self) -> int:
        return 0


GIB = 1 << 30


@pytest.mark.parametrize(
    ("given", "available_bytes", "budget_bytes"),
    [
        ("2GiB", 8 * GIB, 2 * GIB),
        ("2GiB", 2 * GIB, GIB),
        (None, 8 * GIB, 7 * GIB),
        (None, GIB // 2, 0),
        ("2GiB", 0, 0),
    ],
)
def test_the_budget_is_the_least_of_what_is_allowed_and_what_is_there_less_headroom(
    given: str | None, available_bytes: int, budget_bytes: int
):
    flags = {"model": ["m=s3://b/m/"], "memory_headroom": "1GiB", "memory_budget": given}
    assert _budget_bytes(load(flags, {}), Memory(available_bytes), []) == budget_bytes


def test_what_an_earlier_daemon_left_belongs_to_the_budget():
    flags = {"model": ["m=s3://b/m/"], "memory_headroom": "1GiB"}
    left = Left(VersionRef("m", "1", 1), None, "/models/m/1", True, True, 3 * GIB, True)
    assert _budget_bytes(load(flags, {}), Memory(2 * GIB), [left]) == 4 * GIB


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one():
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        assert raise_open_files() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
