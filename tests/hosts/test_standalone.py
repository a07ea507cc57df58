"""The standalone host: what starts when, and when it is ready."""

from __future__ import annotations

import pytest

from cached.core import effects, events
from cached.core.errors import ObjectMissing
from cached.core.objects import FileRef, Part, StoredObject, VersionRef
from cached.hosts.standalone import HttpStart, Readiness, _directory_mode


def test_http_starts_when_the_first_get_is_over_also_of_a_model_without_headers():
    starts: list[int] = []
    http = HttpStart(lambda: starts.append(1))
    stored = StoredObject("m.gguf", "m.gguf", 9, '"1"')
    part = Part(0, FileRef(VersionRef("m", "1"), 0), "s3://b/m.gguf", stored, 0, 9)
    http.decided(effects.FetchPart(part), 0.0)
    assert starts == []

    http.happened(events.PartFetched(part, 0.1), 0.0)

    assert starts == [1]


def test_http_starts_once_when_nothing_will_be_fetched():
    starts: list[int] = []
    http = HttpStart(lambda: starts.append(1))
    http.decided(effects.WakeAt(1.0), 0.0)
    assert starts == []

    http.decided(effects.Refused("m", "over_budget", "no room"), 0.0)
    http.decided(effects.Refused("m", "over_budget", "no room"), 0.0)

    assert starts == [1]


def test_http_starts_when_there_will_be_no_get():
    starts: list[int] = []
    http = HttpStart(lambda: starts.append(1))

    http.happened(events.ResolveFailed("m", ObjectMissing("nothing")), 0.0)

    assert starts == [1]


def test_readiness_latches():
    readiness = Readiness()
    assert readiness.why_not()

    readiness.decided(effects.MarkReady(), 0.0)
    readiness.decided(effects.Drained(), 0.0)

    assert readiness.why_not() == ""
    readiness.happened(events.DrainRequested(), 0.0)
    assert "stopping" in readiness.why_not()


@pytest.mark.parametrize(
    ("socket_mode", "directory_mode"), [(0o600, 0o700), (0o660, 0o750), (0o666, 0o755)]
)
def test_who_may_connect_may_look_a_model_up(socket_mode, directory_mode):
    assert _directory_mode(socket_mode) == directory_mode
