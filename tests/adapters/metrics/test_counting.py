"""Metrics count what happened, in bounded labels, in a form that Prometheus reads."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from cached.adapters.metrics import Metrics
from cached.adapters.metrics.counting import MAX_SERIES, OPS, Histogram
from cached.adapters.metrics.rows import LAG_S, ROWS
from cached.core import effects, errors, events
from cached.core.objects import (
    FileRef,
    Manifest,
    ModelRef,
    ObjectFacts,
    Part,
    PeerId,
    StoredObject,
    VersionRef,
)
from tests.fakes.status import STATUS

if TYPE_CHECKING:
    from collections.abc import Mapping

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
OF = VersionRef("llm", "9f2c")
STORED = StoredObject("m/a.safetensors", "a.safetensors", 10_000, '"etag"')
PEER = PeerId(7)
LOCAL = PeerId(0)


KMS = ObjectFacts(encryption="aws:kms", kms_key="key")


MANIFEST = Manifest("s3://b/m/", OF.version, (STORED,))


def load(counted: Metrics, of: VersionRef = OF, *, began_s: float = 0.5) -> None:
    """Have a version loaded until 1.0."""
    counted.decided(effects.CreateSegments(of, MANIFEST), began_s)
    counted.happened(events.Published(of, "/p"), 1.0)


def metrics(**probes: float) -> Metrics:
    asked = {name: lambda value=value: value for name, value in probes.items()}
    return Metrics("0.1.0", ["llm", "clip"], asked)


def part(start: int = 0, stop: int = 100) -> Part:
    return Part(1, FileRef(OF, 0), "s3://b/m/", STORED, start, stop)


def samples(
    counted: Metrics, status: Mapping[str, object] = STATUS
) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return what the parser reads: value by (name, values of the labels)."""
    body, _ = counted.render(status)
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in parse_text(body.decode())
        for sample in family.samples
    }


def ask(counted: Metrics, op: str, request_id: int, now_s: float, **fields: object) -> None:
    counted.happened(events.Requested(PEER, request_id, op, fields), now_s)


def answer(
    counted: Metrics, op: str, request_id: int, now_s: float, body: dict[str, object] | None = None
) -> None:
    counted.decided(effects.Reply(PEER, request_id, op, body or {}), now_s)


def refusal(code: str) -> dict[str, object]:
    return {"error": {"code": code, "message": "m", "hint": ""}}


@pytest.mark.parametrize("accept", ["", "text/plain;version=0.0.4", OPENMETRICS])
def test_prometheus_reads_every_family(accept: str):
    probes = {
        "cached_process_private_bytes": 3e7,
        "cached_process_cpu_seconds_total": 1.5,
        "cached_connections_refused_total": 1,
        "cached_frames_malformed_total": 2,
        "cached_replies_unread_total": 3,
        "cached_events_waiting": 4,
        "cached_log_lines_dropped_total": 5,
    }
    counted = metrics(**probes)
    counted.decided(effects.Refused("llm", "over_budget", "m"), 1.0)
    counted.decided(effects.Retried("llm", "store_unavailable", 1.0), 1.0)
    counted.happened(events.PartFailed(part(), 0, errors.StoreBusy("503")), 1.0)
    counted.decided(effects.Hedged(part(), 0.3), 1.0)
    counted.decided(effects.Mismatched(FileRef(OF, 0), "a", "crc32c", 0, 9, is_final=False), 1.0)
    counted.decided(effects.Looked(FileRef(OF, 0), "a", KMS, "crc32c"), 1.0)
    counted.decided(effects.Adopted(OF, 7), 1.0)
    load(counted)
    ask(counted, "open", 1, 1.0, model="llm")
    answer(counted, "open", 1, 1.5, {"complete": True})
    body, content_type = counted.render(STATUS, accept)
    is_openmetrics = accept == OPENMETRICS
    assert content_type.startswith("application/openmetrics-text" if is_openmetrics else "text/pl")
    parse = parse_openmetrics if is_openmetrics else parse_text
    families = {family.name: family for family in parse(body.decode())}
    expected = {row.family for row in ROWS}
    if not is_openmetrics:  # the older format has no info: it is a gauge with the whole name
        expected = expected - {"cached_build"} | {"cached_build_info"}
    assert families.keys() == expected
    for row in ROWS:
        if row.name != "cached_build_info":
            assert families[row.family].type == row.kind
            labels = set(families[row.family].samples[0].labels) - {"le"}
            assert labels == set(row.labels)
    assert samples(counted)["cached_log_lines_dropped_total", ()] == 5


def test_the_bytes_of_a_part_that_was_asked_for_twice_are_counted_once():
    counted = metrics()
    for hedge in (0, 1):
        counted.decided(effects.FetchPart(part()._replace(hedge=hedge)), 1.0)
    counted.decided(effects.Hedged(part()._replace(hedge=1), 0.3), 1.0)
    counted.happened(events.PartFetched(part()._replace(hedge=1), 0.05), 1.1)
    counted.happened(events.PartFailed(part(), 100, errors.StoreUnavailable("cut")), 1.2)
    found = samples(counted)
    assert found["cached_fetch_bytes_total", ("llm",)] == 100
    assert found["cached_hedges_total", ("llm",)] == 1
    assert found["cached_gets_in_flight", ()] == 0


def test_what_one_attempt_brought_counts_though_the_last_to_end_brought_nothing():
    counted = metrics()
    counted.decided(effects.Hedged(part()._replace(hedge=1), 0.3), 1.0)
    counted.happened(events.PartFailed(part(), 60, errors.StoreUnavailable("cut")), 1.1)
    late = part()._replace(hedge=1)
    counted.happened(events.PartFailed(late, 0, errors.StoreUnavailable("late")), 1.2)
    assert samples(counted)["cached_fetch_bytes_total", ("llm",)] == 60


def test_files_are_counted_by_what_they_were_checked_by():
    counted = metrics()
    for algorithm in ("crc32c", "crc32c", ""):
        counted.decided(effects.Looked(FileRef(OF, 0), "a", KMS, algorithm), 1.0)
    found = samples(counted)
    assert found["cached_files_checked_total", ("crc32c",)] == 2
    assert found["cached_files_checked_total", ("none",)] == 1
    assert found["cached_kms_without_bucket_key_total", ("llm",)] == 3


def test_a_probe_without_a_row_is_not_served():
    assert ("nonsense", ()) not in samples(metrics(nonsense=1.0))


def test_the_build_is_named():
    names = [labels for name, labels in samples(metrics()) if name == "cached_build_info"]
    assert [set(labels) for labels in names] == [{"0.1.0", sys.version.split()[0]}]


def test_gets_are_counted_by_how_they_ended_and_bytes_once():
    counted = metrics()
    for _ in range(3):
        counted.decided(effects.FetchPart(part()), 1.0)
    assert samples(counted)["cached_gets_in_flight", ()] == 3
    counted.happened(events.PartFetched(part(0, 100), 0.05), 1.1)
    counted.happened(events.PartFailed(part(100, 200), 130, errors.BadReply("short")), 1.2)
    counted.happened(events.PartFailed(part(130, 200), 130, errors.AccessDenied("403")), 1.3)
    found = samples(counted)
    assert found["cached_gets_in_flight", ()] == 0
    assert found["cached_gets_total", ("206",)] == 1
    assert found["cached_gets_total", ("bad_reply",)] == 1
    assert found["cached_gets_total", ("access_denied",)] == 1
    assert found["cached_fetch_bytes_total", ("llm",)] == 130
    assert found["cached_fetch_bytes_total", ("clip",)] == 0
    assert found["cached_get_seconds_count", ()] == 1
    assert found["cached_get_seconds_bucket", ("0.05",)] == 1
    assert found["cached_get_seconds_bucket", ("0.025",)] == 0


def test_an_open_of_a_resident_model_is_a_hit_and_has_its_first_tensor():
    counted = metrics()
    load(counted)
    ask(counted, "open", 1, 2.0, model="llm")
    answer(counted, "open", 1, 2.004, {"complete": True})
    found = samples(counted)
    assert found["cached_opens_total", ("hit",)] == 1
    assert found["cached_opens_total", ("miss",)] == 0
    assert found["cached_open_seconds_sum", ()] == pytest.approx(0.004)
    assert found["cached_first_tensor_seconds_sum", ()] == pytest.approx(0.004)
    assert found["cached_loads_total", ("llm",)] == 1
    assert found["cached_requests_total", ("open", "ok")] == 1


def test_the_first_tensor_of_a_cold_open_comes_with_its_first_wait():
    counted = metrics()
    ask(counted, "open", 1, 2.0, model="llm")
    answer(counted, "open", 1, 2.5, {"complete": False})
    ask(counted, "wait", 2, 2.5)
    answer(counted, "wait", 2, 2.6, refusal("timed_out"))
    assert samples(counted)["cached_first_tensor_seconds_count", ()] == 0
    for request_id in (3, 4):
        ask(counted, "wait", request_id, 2.6)
        answer(counted, "wait", request_id, 3.0)
    found = samples(counted)
    assert found["cached_opens_total", ("miss",)] == 1
    assert found["cached_open_seconds_sum", ()] == pytest.approx(0.5)
    assert found["cached_first_tensor_seconds_count", ()] == 1
    assert found["cached_first_tensor_seconds_sum", ()] == pytest.approx(1.0)


def loads(counted: Metrics) -> tuple[float, float | None]:
    """Return how many versions of llm were loaded, and how long the last took."""
    found = samples(counted)
    seconds = found.get(("cached_load_seconds", ("llm",)))
    return found["cached_loads_total", ("llm",)], seconds


def test_what_becomes_current_again_was_not_loaded():
    counted = metrics()
    newer = VersionRef("llm", "77aa", 2)
    load(counted, began_s=0.25)
    load(counted, newer)
    assert loads(counted) == (2, 0.5)
    counted.happened(events.Published(OF, "/p"), 9.0)
    counted.happened(events.Published(newer, "/p"), 9.5)
    assert loads(counted) == (2, 0.5)


def test_of_what_is_taken_over_only_the_rest_is_loaded():
    counted = metrics()
    counted.decided(effects.CreateSegments(OF, MANIFEST), 1.0)
    counted.decided(effects.Adopted(OF, 10_000), 1.0)
    counted.happened(events.Published(OF, "/p"), 1.5)
    assert loads(counted) == (0, None)
    half = VersionRef("llm", "77aa", 2)
    counted.decided(effects.CreateSegments(half, MANIFEST), 2.0)
    counted.decided(effects.Adopted(half, 100), 3.0)
    counted.decided(effects.FetchPart(part()._replace(file=FileRef(half, 0))), 3.0)
    counted.happened(events.Published(half, "/p"), 3.25)
    assert loads(counted) == (1, 0.25)


def test_a_load_that_was_given_up_is_none():
    counted = metrics()
    counted.decided(effects.CreateSegments(OF, MANIFEST), 1.0)
    counted.decided(effects.Evicted(OF, "failed", 0), 2.0)
    counted.happened(events.Published(OF, "/p"), 3.0)
    assert loads(counted) == (0, None)


def test_an_open_after_an_eviction_is_a_miss():
    counted = metrics()
    counted.happened(events.Published(OF, "/p"), 1.0)
    counted.decided(effects.Evicted(OF, "asked", 1000), 1.5)
    ask(counted, "open", 1, 2.0, model="llm")
    answer(counted, "open", 1, 2.5, {"complete": True})
    found = samples(counted)
    assert found["cached_opens_total", ("miss",)] == 1
    assert found["cached_evictions_total", ("asked",)] == 1
    assert found["cached_evictions_total", ("budget",)] == 0


def test_a_refused_open_is_counted_by_its_code_and_has_no_time():
    counted = metrics()
    ask(counted, "open", 1, 2.0, model="nope")
    answer(counted, "open", 1, 2.5, refusal("model_unknown"))
    found = samples(counted)
    assert found["cached_opens_total", ("model_unknown",)] == 1
    assert found["cached_open_seconds_count", ()] == 0
    assert found["cached_requests_total", ("open", "model_unknown")] == 1


def test_a_worker_that_left_is_forgotten():
    counted = metrics()
    counted.happened(events.Connected(PEER, 0, 1), 1.0)
    assert samples(counted)["cached_connections", ()] == 1
    ask(counted, "open", 1, 2.0, model="llm")
    ask(counted, "open", 2, 2.0, model="llm")
    answer(counted, "open", 1, 2.1, {"complete": False})
    counted.happened(events.Disconnected(PEER), 3.0)
    answer(counted, "open", 2, 3.1, {"complete": True})
    answer(counted, "wait", 3, 3.1)
    found = samples(counted)
    assert found["cached_connections", ()] == 0
    assert found["cached_open_seconds_count", ()] == 1
    assert found["cached_first_tensor_seconds_count", ()] == 0
    assert not counted._opens
    assert not counted._awaiting


def test_the_daemons_own_requests_are_not_counted():
    counted = metrics()
    counted.happened(events.Requested(LOCAL, 1, "status", {}), 1.0)
    counted.decided(effects.Reply(LOCAL, 1, "status", {}), 1.0)
    assert not [key for key in samples(counted) if key[0] == "cached_requests_total"]


@given(names=st.lists(st.text(), max_size=200))
def test_what_peers_send_never_becomes_a_label(names: list[str]):
    counted = metrics()
    for request_id, name in enumerate(names):
        ask(counted, name, request_id, 1.0, model=name)
        ask(counted, "open", request_id, 1.0, model=name)
        answer(counted, name, request_id, 2.0)
    ops = {key[1][0] for key in samples(counted) if key[0] == "cached_requests_total"}
    assert ops <= OPS | {"other"}


def test_a_counter_has_a_bounded_number_of_series():
    counted = metrics()
    for n in range(1000):
        counted.decided(effects.Retried("llm", f"code{n}", 1.0), 1.0)
    found = {key: value for key, value in samples(counted).items() if "retries" in key[0]}
    assert len(found) == MAX_SERIES + 1
    seeded = sum(value == 0 for value in found.values())
    assert found["cached_retries_total", ("other",)] == 1000 - MAX_SERIES + seeded


def test_models_that_are_not_configured_are_left_out():
    counted = metrics()
    other = VersionRef("stranger", "1")
    load(counted, other)
    models: list[dict[str, object]] = [
        dict(model, name="stranger")
        for model in STATUS["models"]  # type: ignore[attr-defined]  # a list, see above
    ]
    found = samples(counted, {**STATUS, "models": models})
    assert "stranger" not in {label for _, labels in found for label in labels}
    assert found["cached_loads_total", ("other",)] == 1


def test_resolves_take_time_whether_they_succeed_or_not():
    counted = metrics()
    counted.decided(effects.Resolve(ModelRef("llm", "s3://b/m/")), 1.0)
    counted.happened(events.ResolveFailed("llm", errors.StoreUnavailable("503")), 1.5)
    counted.decided(effects.Retried("llm", "store_unavailable", 1.0), 1.5)
    found = samples(counted)
    assert found["cached_resolve_seconds_sum", ()] == pytest.approx(0.5)
    assert found["cached_retries_total", ("store_unavailable",)] == 1


def test_a_late_timer_shows_the_lag_of_the_mailbox():
    counted = metrics()
    counted.happened(events.Ticked(), 0.5)  # nobody asked for it
    counted.decided(effects.WakeAt(1.0), 0.5)
    counted.happened(events.Ticked(), 1.25)
    counted.happened(events.Ticked(), 9.0)
    found = samples(counted)
    assert found["cached_mailbox_lag_seconds_count", ()] == 1
    assert found["cached_mailbox_lag_seconds_sum", ()] == 0.25
    assert found["cached_events_total", ("Ticked",)] == 3


def test_memory_that_is_still_mapped_is_shown_until_it_is_freed():
    counted = metrics()
    counted.happened(events.StillMapped(OF), 1.0)
    counted.happened(events.StillMapped(OF), 2.0)
    assert samples(counted)["cached_versions_still_mapped", ()] == 1
    counted.happened(events.Freed(OF), 3.0)
    assert samples(counted)["cached_versions_still_mapped", ()] == 0


def test_counters_are_there_before_the_first_event():
    found = samples(metrics(), {})
    assert found["cached_gets_total", ("206",)] == 0
    for reason in ("store_unavailable", "bad_reply"):
        assert found["cached_retries_total", (reason,)] == 0
    assert found["cached_opens_total", ("hit",)] == 0
    assert found["cached_fetch_bytes_total", ("llm",)] == 0
    assert found["cached_open_seconds_bucket", ("+Inf",)] == 0


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_counts_like_the_naive_list(observed: list[float]):
    histogram = Histogram(LAG_S)
    for value in observed:
        histogram.observe(value)
    for bound, count in histogram.cumulative():
        limit = float(bound.replace("+Inf", "inf"))
        assert count == sum(value <= limit for value in observed)
    assert histogram.sum == pytest.approx(sum(observed))


def test_counting_is_light():
    code = "import sys, cached.adapters.metrics; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"asyncio", "logging", "dataclasses", "aiohttp", "prometheus_client"}
    assert heavy & set(done.stdout.split()) == set()
