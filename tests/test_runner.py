"""Every effect goes through one port, and every end of it comes back as one event."""

from __future__ import annotations

import hashlib
import os
import sys
import zlib
from queue import SimpleQueue
from typing import TYPE_CHECKING

import pytest

from cached.adapters.checksums import Checksums
from cached.adapters.clock import SystemClock
from cached.adapters.segments import DirectorySegments
from cached.core import effects, events
from cached.core.digests import Digests, FileDigests
from cached.core.digests import write as write_list
from cached.core.errors import DigestsError, LoadFailed, ObjectMissing, StoreUnavailable
from cached.core.header import Header, write
from cached.core.objects import FileRef, ModelRef, Part, PeerId, VersionRef
from cached.runner import Ports, Runner
from tests.fakes.store import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cached.core.events import Event
    from cached.core.objects import Manifest
    from cached.ports import Cancellation, Sink

REF = ModelRef("m", "s3://b/m/")
DATA = write([("a", "U8", (5,))]) + b"12345"
OBJECTS = {"a.safetensors": DATA, "b.txt": b"hello"}


class Replies:
    def __init__(self) -> None:
        self.sent: list[tuple[effects.Reply, list[bytes]]] = []

    def send(self, reply: effects.Reply, descriptors: tuple[int, ...]) -> None:
        self.sent.append((reply, [os.pread(fd, 100, 0) for fd in descriptors]))
        for descriptor in descriptors:
            os.close(descriptor)


class Memory:
    def available_bytes(self) -> int:
        return 12345

    def private_bytes(self) -> int:
        return 0


class Bench:
    """A runner whose threads are run by hand: ``work`` does all jobs there are."""

    def __init__(self, root: str, store: MemoryStore) -> None:
        self.store, self.replies = store, Replies()
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.segments = DirectorySegments(root)
        ports = Ports(
            checksums=Checksums(),
            stores={"s3": store},
            segments=self.segments,
            memory=Memory(),
            replies=self.replies,
            clock=SystemClock(),
        )
        self.runner = Runner(ports, self.events.put, lambda: 0.25)

    def work(self, *jobs: effects.Effect) -> list[Event]:
        for job in jobs:
            self.runner.carry_out(job)
        self.runner.stop(1, 1)
        self.runner.fetch_work()
        self.runner.segment_work()
        self.runner.check_work()
        return [self.events.get() for _ in range(self.events.qsize())]

    def created(self) -> tuple[VersionRef, Manifest]:
        manifest = self.store.resolve(REF)
        of = VersionRef("m", manifest.version)
        assert self.work(effects.CreateSegments(of, manifest)) == [events.SegmentsReady(of)]
        return of, manifest

    def part(self, of: VersionRef, manifest: Manifest, index: int) -> Part:
        stored = manifest.objects[index]
        return Part(index, FileRef(of, index), REF.uri, stored, 0, stored.size_bytes)


@pytest.fixture
def bench(tmp_path) -> Iterator[Bench]:
    bench = Bench(str(tmp_path / "root"), MemoryStore(OBJECTS))
    yield bench
    bench.segments.close()


def test_a_listing_comes_back_with_the_memory_that_is_there(bench):
    manifest = bench.store.resolve(REF)

    assert bench.work(effects.Resolve(REF)) == [events.Resolved("m", manifest, 12345)]


def test_a_listing_that_fails_comes_back_with_its_error_and_jitter(bench):
    bench.store.objects.clear()

    (event,) = bench.work(effects.Resolve(REF))

    assert isinstance(event, events.ResolveFailed)
    assert isinstance(event.error, ObjectMissing)
    assert event.jitter_ratio == 0.25


def test_a_listing_comes_back_with_its_number_well_or_not(bench):
    (well,) = bench.work(effects.Resolve(REF, 7))
    bench.store.objects.clear()
    (badly,) = bench.work(effects.Resolve(REF, 8))

    assert (well.listing, badly.listing) == (7, 8)


def test_a_listing_that_is_outdated_when_its_turn_comes_is_never_sent(bench, monkeypatch):
    asked: list[ModelRef] = []
    real = bench.store.resolve

    def resolve(ref: ModelRef, token: Cancellation) -> Manifest:
        asked.append(ref)
        manifest: Manifest = real(ref, token)
        return manifest

    monkeypatch.setattr(bench.store, "resolve", resolve)
    other = ModelRef("other", "s3://b/other/")

    found = bench.work(effects.Resolve(REF, 1), effects.Resolve(REF, 3), effects.Resolve(other, 1))

    assert [(event.name, event.listing) for event in found] == [("m", 3), ("other", 1)]
    assert asked == [REF, other]


def test_a_listing_that_gets_outdated_while_it_runs_is_cut_and_not_told(bench, monkeypatch):
    def resolve(ref: ModelRef, token: Cancellation) -> Manifest:
        states.append(token.is_cancelled)
        bench.runner.carry_out(effects.Resolve(other, 1))
        states.append(token.is_cancelled)
        bench.runner.carry_out(effects.Resolve(REF, 3))
        states.append(token.is_cancelled)
        monkeypatch.undo()
        raise StoreUnavailable("cut")

    states: list[bool] = []
    other = ModelRef("other", "s3://b/other/")
    monkeypatch.setattr(bench.store, "resolve", resolve)

    assert bench.work(effects.Resolve(REF, 1)) == []
    assert states == [False, False, True]
    assert [event.listing for event in bench.work()] == [1, 3]


def test_an_error_comes_back_without_what_its_thread_had_in_hand(bench, monkeypatch):
    def resolve(ref: ModelRef, token: Cancellation) -> Manifest:
        raise StoreUnavailable("503") from OSError("foreign")

    of, manifest = bench.created()
    (refused,) = bench.work(effects.ReadHeader(FileRef(of, 1), 5))
    bench.store.faults[0] = StoreUnavailable("503")
    (failed,) = bench.work(effects.FetchPart(bench.part(of, manifest, 1)))
    (segments,) = bench.work(effects.CreateSegments(of, manifest))
    monkeypatch.setattr(bench.store, "resolve", resolve)
    (unresolved,) = bench.work(effects.Resolve(REF))

    for event in (refused, failed, segments, unresolved):
        error = event.error
        assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


@pytest.mark.parametrize("error", [LoadFailed("cannot remove"), RuntimeError("a bug")])
def test_a_free_that_fails_comes_back_as_that(bench, monkeypatch, error):
    def refuse(of: VersionRef, *, if_unused: bool) -> bool:
        raise error

    of, _ = bench.created()
    monkeypatch.setattr(bench.segments, "free", refuse)

    (event,) = bench.work(effects.Free(of))

    assert isinstance(event, events.FreeFailed)
    assert event.of == of


def test_a_part_is_fetched_into_its_segment_and_can_be_sent_and_published(bench):
    of, manifest = bench.created()
    parts = [bench.part(of, manifest, index) for index in (0, 1)]

    fetched = bench.work(*(effects.FetchPart(part) for part in parts))

    assert [type(event) for event in fetched] == [events.PartFetched] * 2
    body: dict[str, object] = {"x": 1}
    reply = effects.Reply(PeerId(1), 7, "open", body, (parts[1].file, parts[0].file))
    bench.work(reply)
    assert bench.replies.sent == [(reply, [b"hello", DATA])]
    (published,) = bench.work(effects.Publish(of))
    assert isinstance(published, events.Published)
    with open(f"{published.path}/b.txt", "rb") as file:
        assert file.read() == b"hello"


def test_a_part_that_is_to_be_summed_is_while_it_passes(bench):
    of, manifest = bench.created()
    part = bench.part(of, manifest, 1)

    summed, plain = bench.work(
        effects.FetchPart(part._replace(algorithm="crc32")),
        effects.FetchPart(part._replace(part_id=7)),
    )

    assert summed.checksum == zlib.crc32(b"hello").to_bytes(4)
    assert plain.checksum is None


def test_a_sum_that_cannot_be_computed_fails_its_part(bench, monkeypatch):
    of, manifest = bench.created()
    monkeypatch.setitem(sys.modules, "awscrt", None)

    (event,) = bench.work(
        effects.FetchPart(bench.part(of, manifest, 1)._replace(algorithm="crc32c"))
    )

    assert isinstance(event, events.PartFailed)
    assert "awscrt" in event.error.message
    assert not event.error.transient


def test_a_part_that_fails_comes_back_with_its_watermark(bench):
    bench.store.faults[0] = StoreUnavailable("503")
    of, manifest = bench.created()
    part = bench.part(of, manifest, 1)

    (event,) = bench.work(effects.FetchPart(part))

    assert isinstance(event, events.PartFailed)
    assert event.watermark == 2  # half of "hello"
    assert isinstance(event.error, StoreUnavailable)


def test_a_header_is_read_sized_or_refused(bench):
    of, manifest = bench.created()
    file = FileRef(of, 0)
    bench.work(effects.FetchPart(bench.part(of, manifest, 0)))

    (whole,) = bench.work(effects.ReadHeader(file, len(DATA)))
    (short,) = bench.work(effects.ReadHeader(file, 8))
    (other,) = bench.work(effects.ReadHeader(FileRef(of, 1), 5))

    assert isinstance(whole, events.HeaderRead)
    assert isinstance(whole.header, Header)
    assert short == events.HeaderSized(file, len(DATA) - 5)
    assert isinstance(other, events.HeaderRefused)


def test_a_version_is_freed(bench):
    of, _ = bench.created()

    assert bench.work(effects.Free(of)) == [events.Freed(of)]


def test_an_unforeseen_exception_fails_one_load_and_says_that_it_is_a_defect(bench, monkeypatch):
    of, manifest = bench.created()
    monkeypatch.delitem(bench.store.objects, "b.txt")  # the fake then raises a bare KeyError

    (event,) = bench.work(effects.FetchPart(bench.part(of, manifest, 1)))

    assert isinstance(event, events.PartFailed)
    assert isinstance(event.error, LoadFailed)
    assert "defect" in event.error.hint


def test_segments_that_cannot_be_made_fail_the_load(bench):
    of, manifest = bench.created()

    (event,) = bench.work(effects.CreateSegments(of, manifest))

    assert isinstance(event, events.SegmentsFailed)


def test_a_reply_whose_files_are_gone_becomes_an_error_and_not_the_end_of_the_daemon(bench):
    of, _ = bench.created()
    bench.work(effects.Free(of))
    reply = effects.Reply(PeerId(1), 7, "descriptors", {}, (FileRef(of, 0),))

    bench.work(reply)

    ((sent, contents),) = bench.replies.sent
    assert contents == []
    assert (sent.peer, sent.request_id) == (1, 7)
    assert sent.body["error"]["code"] == "load_failed"


def test_a_reply_that_runs_out_of_descriptors_half_way_closes_those_it_has(bench, monkeypatch):
    of, _ = bench.created()
    before = os.listdir("/proc/self/fd")
    real = bench.segments.reader

    def reader(file: FileRef) -> int:
        if file.index == 1:
            raise LoadFailed("no descriptor is left", hint="ulimit -n")
        descriptor: int = real(file)
        return descriptor

    monkeypatch.setattr(bench.segments, "reader", reader)
    bench.work(effects.Reply(PeerId(1), 7, "open", {}, (FileRef(of, 0), FileRef(of, 1))))

    assert bench.replies.sent[0][0].body["error"]["code"] == "load_failed"
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_store_that_returns_early_has_not_fetched_the_part(bench, monkeypatch):
    of, manifest = bench.created()
    monkeypatch.setattr(
        bench.store, "fetch", lambda part, sink, _: sink.accept(0, memoryview(b"he"))
    )

    (event,) = bench.work(effects.FetchPart(bench.part(of, manifest, 1)))

    assert isinstance(event, events.PartFailed)
    assert event.watermark == 2
    assert event.error.transient


def test_a_get_that_is_still_queued_when_it_is_cancelled_is_never_sent(bench):
    of, manifest = bench.created()
    part = bench.part(of, manifest, 1)

    (event,) = bench.work(effects.FetchPart(part), effects.CancelParts(of))

    assert isinstance(event, events.PartFailed)
    assert event.watermark == 0
    assert bench.store.gets == []


def test_two_attempts_of_a_part_share_its_sink_until_both_have_ended(bench, monkeypatch):
    of, manifest = bench.created()
    part = bench.part(of, manifest, 1)
    sinks: list[object] = []
    tokens: list[object] = []
    released: list[Part] = []
    real = bench.segments.release_sink

    def fetch(asked: Part, sink: Sink, token: Cancellation) -> None:
        assert released == []
        sinks.append(sink)
        tokens.append(token)
        sink.accept(sink.watermark, memoryview(b"hello")[sink.watermark :])

    def release(asked: Part) -> None:
        released.append(asked)
        real(asked)

    monkeypatch.setattr(bench.store, "fetch", fetch)
    monkeypatch.setattr(bench.segments, "release_sink", release)

    found = bench.work(effects.FetchPart(part), effects.FetchPart(part))

    assert [type(event) for event in found] == [events.PartFetched] * 2
    assert sinks[0] is sinks[1]
    assert tokens[0] is not tokens[1]
    assert released == [part]


def test_a_cancel_of_one_version_leaves_the_gets_of_another_alone(bench):
    of, manifest = bench.created()
    other = VersionRef("other", manifest.version)

    (event,) = bench.work(
        effects.FetchPart(bench.part(of, manifest, 1)), effects.CancelParts(other)
    )

    assert isinstance(event, events.PartFetched)


def test_what_is_queued_when_the_runner_is_cut_reaches_no_store(bench):
    of, manifest = bench.created()
    bench.runner.carry_out(effects.FetchPart(bench.part(of, manifest, 1)))
    bench.runner.carry_out(effects.Resolve(REF))
    bench.runner.cut()

    fetched, resolved = bench.work()

    assert isinstance(fetched, events.PartFailed)
    assert isinstance(resolved, events.ResolveFailed)
    assert bench.store.gets == []


def test_an_object_is_described_or_not(bench):
    of, manifest = bench.created()
    look = effects.Describe(FileRef(of, 1), REF.uri, manifest.objects[1])

    (well,) = bench.work(look)
    bench.store.objects.clear()
    (badly,) = bench.work(look)

    assert isinstance(well, events.Described)
    assert isinstance(badly, events.DescribeFailed)
    assert (badly.file, badly.jitter_ratio) == (look.file, 0.25)


def test_bytes_are_read_back_and_summed(bench):
    of, manifest = bench.created()
    bench.work(effects.FetchPart(bench.part(of, manifest, 1)))
    file = FileRef(of, 1)

    some = bench.work(effects.Check(file, "crc32", 1, 4))
    running = [
        *bench.work(effects.Check(file, "sha256", 0, 2, is_running=True)),
        *bench.work(effects.Check(file, "sha256", 2, 5, is_running=True)),
    ]

    crc = zlib.crc32(b"ell").to_bytes(4)
    assert some == [events.Checked(file, "crc32", 1, 4, crc)]
    digests = [hashlib.sha256(data).digest() for data in (b"he", b"hello")]
    assert [event.value for event in running] == digests


def test_bytes_that_are_gone_cannot_be_summed(bench):
    of, _ = bench.created()
    before = len(os.listdir("/proc/self/fd"))
    (longer,) = bench.work(effects.Check(FileRef(of, 1), "crc32", 0, 99))
    bench.work(effects.Free(of))
    (gone,) = bench.work(effects.Check(FileRef(of, 1), "crc32", 0, 5))

    assert isinstance(longer, events.CheckFailed)
    assert isinstance(gone, events.CheckFailed)
    assert len(os.listdir("/proc/self/fd")) < before


def test_a_list_of_digests_is_read_or_refused(tmp_path):
    wanted = Digests(65536, {"b.txt": FileDigests(5, bytes(32), (bytes(32),))})
    bench = Bench(
        str(tmp_path / "root"), MemoryStore({"b.txt": b"hello", "list": write_list(wanted)})
    )
    of, manifest = bench.created()
    bench.work(*(effects.FetchPart(bench.part(of, manifest, index)) for index in (0, 1)))

    (found,) = bench.work(effects.ReadDigests(FileRef(of, 1)))
    (refused,) = bench.work(effects.ReadDigests(FileRef(of, 0)))
    bench.segments.close()

    assert found == events.DigestsRead(FileRef(of, 1), wanted)
    assert isinstance(refused, events.DigestsRefused)
    assert isinstance(refused.error, DigestsError)


def test_two_attempts_of_a_part_share_its_sink_which_goes_with_the_last(bench, monkeypatch):
    of, manifest = bench.created()
    part = bench.part(of, manifest, 1)
    released: list[Part] = []
    real = bench.segments.release_sink

    def release_sink(part: Part) -> None:
        released.append(part)
        real(part)

    monkeypatch.setattr(bench.segments, "release_sink", release_sink)

    ended = bench.work(effects.FetchPart(part), effects.FetchPart(part._replace(hedge=1)))

    assert [type(event) for event in ended] == [events.PartFetched] * 2
    assert [each.hedge for each in released] == [1]


def test_a_hedge_that_comes_after_the_part_is_not_sent(bench):
    of, manifest = bench.created()
    part = bench.part(of, manifest, 1)
    bench.work(effects.FetchPart(part))
    gets = len(bench.store.gets)

    (late,) = bench.work(effects.FetchPart(part._replace(hedge=1)))

    assert isinstance(late, events.PartFailed)
    assert late.error.transient
    assert len(bench.store.gets) == gets


def test_one_part_is_cancelled_and_no_other(bench):
    of, manifest = bench.created()
    parts = [bench.part(of, manifest, index) for index in (0, 1)]

    ended = bench.work(
        *(effects.FetchPart(part) for part in parts), effects.CancelParts(of, parts[0].part_id)
    )

    assert [type(event) for event in ended] == [events.PartFailed, events.PartFetched]
