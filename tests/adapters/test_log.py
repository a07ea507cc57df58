"""The log tells a day in a page, holds no secret, and cannot stop the daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cached.adapters.log import MAX_LINE_BYTES, ROWS, SILENT, Log, Writer, timestamp
from cached.core import effects, errors, events
from cached.core.objects import (
    FileRef,
    Manifest,
    ModelRef,
    Part,
    PeerId,
    StoredObject,
    VersionRef,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OF = VersionRef("llm", "9f2c")
SIZE_BYTES = 250_000_000
STORED = StoredObject("m/a.safetensors", "a.safetensors", SIZE_BYTES, '"etag"')
MANIFEST = Manifest("s3://b/m/", "9f2c", (STORED,))
PEER = PeerId(7)


class FixedClock:
    def now_s(self) -> float:
        return 0.0

    def wall_s(self) -> float:
        return 1_769_903_999.1239


class Pipe:
    """A Writer into a pipe, and what came out of it."""

    def __init__(self, **options: object) -> None:
        self.out, self.into = os.pipe()
        os.set_blocking(self.out, False)
        self.writer = Writer(self.into, FixedClock(), **options)  # type: ignore[arg-type]
        self.log = Log(self.writer)

    def text(self) -> str:
        try:
            return os.read(self.out, 1 << 20).decode()
        except BlockingIOError:
            return ""

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.text().splitlines()]

    def close(self) -> None:
        self.writer.close()
        for fd in (self.out, self.into):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@pytest.fixture
def debug() -> Iterator[Pipe]:
    pipe = Pipe(level="debug")
    yield pipe
    pipe.close()


def part(start: int = 0, part_id: int = 1) -> Part:
    return Part(part_id, FileRef(OF, 0), MANIFEST.uri, STORED, start, start + 100)


def test_a_line_is_one_json_object_with_time_level_event_and_fields(pipe: Pipe):
    pipe.writer.write("info", "daemon started", pid=4, load_s=0.25, socket=None, is_new=True)
    assert pipe.text() == (
        '{"ts": "2026-01-31T23:59:59.123Z", "level": "info", "event": "daemon started", '
        '"pid": 4, "load_s": 0.25, "socket": null, "is_new": true}\n'
    )


def test_a_field_cannot_replace_time_level_or_event(pipe: Pipe):
    pipe.writer.write("info", "daemon started", ts="never")
    assert pipe.lines()[0]["ts"] == "2026-01-31T23:59:59.123Z"


def test_time_is_utc_with_milliseconds():
    assert timestamp(0) == "1970-01-01T00:00:00.000Z"
    assert timestamp(1.9999) == "1970-01-01T00:00:01.999Z"


def test_lines_below_the_level_are_not_written():
    pipe = Pipe(level="warning")
    for level in ("debug", "info", "warning", "error"):
        pipe.writer.write(level, f"{level} written")
    assert [line["level"] for line in pipe.lines()] == ["warning", "error"]
    pipe.close()


def test_text_is_for_people():
    pipe = Pipe(is_text=True)
    pipe.writer.write("info", "model published", model="llm", path="/dev/shm/a b", load_s=0.25)
    assert pipe.text() == (
        "2026-01-31T23:59:59.123Z INFO    model published  "
        'model=llm  path="/dev/shm/a b"  load_s=0.25\n'
    )
    pipe.close()


@pytest.mark.parametrize("is_text", [False, True])
@example(value="Infinity")
@example(value=float("nan"))
@example(value=-float("inf"))
@given(value=st.one_of(st.text(max_size=5000), st.floats(), st.integers(), st.binary()))
def test_any_value_makes_one_line_that_a_pipe_takes_whole(is_text: bool, value: object):
    pipe = Pipe(is_text=is_text)
    pipe.writer.write("error", "load refused", error=value, more=[value])
    line = pipe.text()
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert line.isascii()
    assert line[:-1].isprintable()
    assert len(line) < MAX_LINE_BYTES
    if not is_text:
        # NaN and Infinity, which JSON has not, would come to parse_constant; as text they may stand
        assert json.loads(line, parse_constant=pytest.fail)["event"] == "load refused"
    pipe.close()


def test_many_fields_are_cut_rather_than_the_line(pipe: Pipe):
    pipe.writer.write("info", "model published", **{f"field{n}": "x" * 3000 for n in range(8)})
    (line,) = pipe.lines()
    assert line["field7"] == "x" * 200 + "…"


@pytest.mark.parametrize(
    "text",
    [
        "GET https://h/k?X-Amz-Credential=HUSH&X-Amz-Signature=HUSH&x=1 failed",
        "sent X-Amz-Security-Token: HUSH, got 403",
        "Authorization: AWS4-HMAC-SHA256 Credential=HUSH, Signature=HUSH",
        "aws_secret_access_key = HUSH",
        '{"AWS_SESSION_TOKEN": "HUSH"}',
        "https://user:HUSH@host/key",
    ],
)
def test_secrets_are_never_written(pipe: Pipe, text: str):
    pipe.writer.write("error", "load refused", error=text)
    line = pipe.text()
    assert "HUSH" not in line
    assert "***" in line


@pytest.mark.parametrize("text", ["s3://bucket/k@y", "a credential is missing", "tokens: 3"])
def test_what_is_no_secret_stays(pipe: Pipe, text: str):
    pipe.writer.write("error", "load refused", error=text)
    assert pipe.lines()[0]["error"] == text


def test_a_full_pipe_drops_lines_and_tells_so_later(pipe: Pipe):
    for n in range(5000):
        pipe.writer.write("info", "part fetched", n=n, filler="x" * 100)
    dropped = pipe.writer.dropped
    assert 0 < dropped < 5000
    assert len(pipe.lines()) == 5000 - dropped
    pipe.writer.write("info", "daemon drained")
    pipe.writer.write("info", "daemon stopped")
    first, second = pipe.lines()
    assert first["dropped_before"] == dropped
    assert "dropped_before" not in second


def test_a_pipe_that_nobody_reads_any_more_is_no_error(pipe: Pipe):
    os.close(pipe.out)
    pipe.out = -1
    pipe.writer.write("info", "daemon started")
    assert pipe.writer.dropped == 1


def test_a_descriptor_that_is_closed_is_no_error():
    closed, other = os.pipe()
    os.close(closed)
    os.close(other)
    writer = Writer(closed, FixedClock())
    writer.write("info", "daemon started")
    writer.close()
    writer.close()
    writer.write("info", "daemon stopped")
    assert writer.dropped == 2


def test_a_full_disk_is_no_error():
    with open("/dev/full", "wb", buffering=0) as full:
        writer = Writer(full.fileno(), FixedClock())
        writer.write("info", "daemon started")
        writer.close()
    assert writer.dropped == 1


def test_a_line_after_one_that_was_cut_by_a_full_disk_stands_alone(tmp_path: Path):
    path = tmp_path / "log"
    code = f"""
import os, resource
from cached.adapters.clock import SystemClock
from cached.adapters.log import Writer
writer = Writer(os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT), SystemClock())
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, most))
writer.write("info", "daemon started")
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
writer.write("info", "daemon stopped")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    cut, whole = path.read_text().splitlines()
    assert len(cut) == 10
    assert json.loads(whole)["event"] == "daemon stopped"
    assert json.loads(whole)["dropped_before"] == 1


def test_lines_go_on_after_the_callers_descriptor_is_closed(pipe: Pipe):
    os.close(pipe.into)
    pipe.into = -1
    pipe.writer.write("info", "daemon started")
    assert len(pipe.lines()) == 1


def test_the_callers_descriptor_stays_blocking(pipe: Pipe):
    pipe.writer.write("info", "daemon started")
    assert os.get_blocking(pipe.into)


def test_every_event_and_effect_has_a_row_or_is_silent():
    known = {*get_args(events.Event), *get_args(effects.Effect)}
    assert known == ROWS.keys() | SILENT
    assert not ROWS.keys() & SILENT


def test_info_tells_the_story_of_a_load(pipe: Pipe):
    log = pipe.log
    log.decided(effects.Resolve(ModelRef("llm", "s3://b/m/")), 1.0)
    log.happened(events.Resolved("llm", MANIFEST, 1 << 33), 1.25)
    log.decided(effects.CreateSegments(OF, MANIFEST), 1.25)
    log.happened(events.SegmentsReady(OF), 1.26)
    log.decided(effects.FetchPart(part()), 1.26)
    log.decided(effects.FetchPart(part(100, 2)), 1.26)
    log.happened(events.PartFetched(part(), 0.1), 1.4)
    log.decided(effects.WakeAt(2.0), 1.4)
    log.happened(events.Published(OF, "/dev/shm/llm"), 1.75)
    log.decided(effects.MarkReady(), 1.75)
    log.decided(effects.Evicted(OF, "asked", SIZE_BYTES), 9.0)
    log.happened(events.Freed(OF), 9.1)
    lines = [{k: v for k, v in line.items() if k not in {"ts", "level"}} for line in pipe.lines()]
    llm = {"model": "llm", "version": "9f2c"}
    resolved = {"available_bytes": 1 << 33, "files": 1, "size_bytes": SIZE_BYTES, "seconds": 0.25}
    resolved["listing"] = 0
    published = {"size_bytes": SIZE_BYTES, "seconds": 0.5, "mb_per_s": 500.0}
    assert lines == [
        {"event": "model resolved", **llm, **resolved},
        {"event": "model admitted", **llm, "files": 1, "size_bytes": SIZE_BYTES},
        {"event": "loading began", **llm},
        {"event": "model published", **llm, "path": "/dev/shm/llm", **published},
        {"event": "daemon became ready"},
        {"event": "model evicted", **llm, "reason": "asked", "size_bytes": SIZE_BYTES},
        {"event": "memory freed", **llm},
    ]


def test_what_is_taken_over_has_its_size_and_no_rate(pipe: Pipe):
    pipe.log.decided(effects.CreateSegments(OF, MANIFEST), 1.0)
    pipe.log.decided(effects.Adopted(OF, SIZE_BYTES), 1.5)
    pipe.log.happened(events.Published(OF, "/p"), 1.5)
    published = pipe.lines()[-1]
    assert published | {"size_bytes": SIZE_BYTES, "seconds": 0.5} == published
    assert "mb_per_s" not in published


@pytest.mark.parametrize("is_shared", [False, True], ids=["half", "shared"])
def test_the_rate_is_of_what_was_fetched(pipe: Pipe, is_shared: bool):
    shared = {1: FileRef(OF._replace(load=1), 0)} if is_shared else {}
    one, two = (STORED._replace(path=path, size_bytes=SIZE_BYTES // 2) for path in "ab")
    manifest = MANIFEST._replace(objects=(one, two))
    pipe.log.decided(effects.CreateSegments(OF, manifest, shared), 1.0)
    if not is_shared:
        pipe.log.decided(effects.Adopted(OF, SIZE_BYTES // 2), 1.0)
    pipe.log.happened(events.Published(OF, "/p"), 1.5)
    published = pipe.lines()[-1]
    assert (published["size_bytes"], published["mb_per_s"]) == (SIZE_BYTES, 250.0)


def test_what_becomes_current_again_is_not_told_as_published(pipe: Pipe, debug: Pipe):
    for log in (pipe.log, debug.log):
        log.happened(events.Published(OF, "/p"), 9.0)
        log.decided(effects.Switched(OF, "77aa"), 9.0)
    assert [line["event"] for line in pipe.lines()] == ["version became current"]
    published = debug.lines()[0]
    assert published["event"] == "model published"
    assert published.keys().isdisjoint({"size_bytes", "seconds", "mb_per_s"})


def test_a_second_load_of_a_version_begins_again(pipe: Pipe):
    for start_s in (0.0, 10.0):
        pipe.log.decided(effects.CreateSegments(OF, MANIFEST), start_s)
        pipe.log.decided(effects.FetchPart(part()), start_s)
        pipe.log.decided(effects.Evicted(OF, "failed", SIZE_BYTES), start_s + 1)
    assert [line["event"] for line in pipe.lines()].count("loading began") == 2


def test_debug_tells_the_story_of_a_request_without_what_the_peer_sent(debug: Pipe):
    log = debug.log
    log.happened(events.Connected(PEER, 1000, 4711), 1.0)
    log.happened(events.Requested(PEER, 2, "open", {"model": "llm", "x": "HUSH"}), 1.0)
    log.decided(effects.Reply(PEER, 2, "open", {"path": "/HUSH"}, (FileRef(OF, 0),)), 1.1)
    log.happened(events.Disconnected(PEER), 2.0)
    text = debug.text()
    assert "HUSH" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == [
        "worker connected",
        "request received",
        "request answered",
        "worker disconnected",
    ]
    assert lines[0] | {"uid": 1000, "pid": 4711, "peer": 7, "level": "debug"} == lines[0]
    assert lines[1] | {"request_id": 2, "op": "open"} == lines[1]


def test_effects_name_what_they_are_about(debug: Pipe):
    debug.log.decided(effects.Resolve(ModelRef("llm", "s3://b/m/")), 1.0)
    debug.log.decided(effects.ReadHeader(FileRef(OF, 3), 100), 1.0)
    first, second = debug.lines()
    assert first | {"model": "llm", "uri": "s3://b/m/"} == first
    assert second | {"model": "llm", "version": "9f2c", "file": 3, "there_bytes": 100} == second


def test_a_line_of_too_many_fields_keeps_its_event(pipe: Pipe):
    fields = {f"field_{n}": "x" * 100 for n in range(500)}
    pipe.writer.write("info", "daemon started", **fields)
    (line,) = pipe.lines()
    assert line.keys() == {"ts", "level", "event"}


def test_a_load_that_took_no_time_has_no_rate(pipe: Pipe):
    pipe.log.decided(effects.CreateSegments(OF, MANIFEST), 1.0)
    pipe.log.happened(events.Published(OF, "/p"), 1.0)
    assert "mb_per_s" not in pipe.lines()[-1]


def test_a_failed_get_names_the_object_and_the_reason(debug: Pipe):
    error = errors.StoreUnavailable("503 of the store", hint="wait")
    debug.log.happened(events.PartFailed(part(), 50, error), 1.0)
    (line,) = debug.lines()
    assert line["key"] == "m/a.safetensors"
    assert (line["code"], line["error"]) == ("store_unavailable", "503 of the store; wait")
    assert line["watermark"] == 50


@pytest.mark.parametrize(
    ("code", "level"),
    [("access_denied", "error"), ("over_budget", "warning"), ("object_changed", "warning")],
)
def test_a_refused_load_is_an_error_only_where_a_person_must_act(pipe: Pipe, code: str, level: str):
    pipe.log.decided(effects.Refused("llm", code, "403 for s3:GetObject"), 1.0)
    (line,) = pipe.lines()
    assert (line["level"], line["code"], line["model"]) == (level, code, "llm")
    assert line["message"] == "403 for s3:GetObject"


def test_a_refused_request_is_told_but_one_that_was_given_up_is_not(pipe: Pipe):
    for code in ("model_unknown", "timed_out"):
        body: dict[str, object] = {"error": {"code": code, "message": "m", "hint": ""}}
        pipe.log.decided(effects.Reply(PEER, 2, "open", body), 1.0)
    (line,) = pipe.lines()
    assert line["event"] == "request refused"
    assert (line["level"], line["code"], line["error"]) == ("info", "model_unknown", "m")


def test_a_refusal_tells_what_to_do_and_a_retry_why(pipe: Pipe):
    body: dict[str, object] = {"error": {"code": "model_unknown", "message": "m", "hint": "name"}}
    pipe.log.decided(effects.Reply(PEER, 2, "open", body), 1.0)
    pipe.log.decided(effects.Refused("llm", "over_budget", "no room", "free some"), 1.0)
    pipe.log.decided(effects.Retried("llm", "store_unavailable", 0.5, "503; wait"), 1.0)
    request, load, retry = pipe.lines()
    assert (request["error"], request["hint"]) == ("m", "name")
    assert (load["message"], load["hint"]) == ("no room", "free some")
    assert retry["error"] == "503; wait"


def test_a_drain_tells_what_it_waits_for_and_how_to_end_it_at_once(pipe: Pipe):
    pipe.log.decided(effects.DrainBegan(1), 1.0)
    pipe.log.decided(effects.DrainCut(1), 1.0)
    first, second = pipe.lines()
    assert (first["event"], first["requests_under_way"]) == ("drain began", 1)
    assert "second signal ends it at once" in str(first["hint"])
    assert (second["event"], second["requests_given_up"]) == ("drain cut short", 1)


def test_a_storm_of_retries_is_one_line_in_ten_seconds_with_a_count(pipe: Pipe):
    for n in range(1000):
        pipe.log.decided(effects.Retried("llm", "store_unavailable", 0.5), n / 100)
    pipe.log.decided(effects.Retried("llm", "bad_reply", 0.5), 9.99)
    pipe.log.decided(effects.Retried("llm", "store_unavailable", 0.5), 10.0)
    lines = pipe.lines()
    assert [line["code"] for line in lines] == [
        "store_unavailable",
        "bad_reply",
        "store_unavailable",
    ]
    assert [line.get("repeated") for line in lines] == [None, None, 999]


def test_a_peer_cannot_fill_the_memory_with_refused_operations(pipe: Pipe):
    body: dict[str, object] = {"error": {"code": "bad_request", "message": "m", "hint": ""}}
    for n in range(3000):
        pipe.log.decided(effects.Reply(PEER, n, f"op{n}", body), 1.0)
    assert len(pipe.log._repeats) <= 1000


def test_it_is_light():
    code = "import sys, cached.adapters.log; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"asyncio", "logging", "dataclasses", "datetime", "aiohttp", "prometheus_client"}
    assert heavy & set(done.stdout.split()) == set()
