"""Each effect through one port, each result back as an event: the only way back.

``carry_out`` runs in the mailbox thread and only hands jobs over; ``fetch_work``,
``segment_work`` and ``check_work`` are the bodies of the threads that do them.
"""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from cached.cancellation import Token
from cached.core import digests, effects, events
from cached.core.errors import BadReply, CachedError, LoadFailed, StoreUnavailable
from cached.core.wire import error_body

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cached.core.effects import Effect
    from cached.core.objects import Part
    from cached.ports import (
        Checksums,
        Clock,
        MemoryProbe,
        ObjectStore,
        Post,
        Replies,
        SegmentStore,
        Sink,
    )


class Fetch:
    """An attempt to fetch a part, queued or under way; a part may have two.

    Attributes:
        token: cancels it.
    """

    __slots__ = ("part", "token")

    def __init__(self, part: Part) -> None:
        self.part = part
        self.token = Token()


class Listing:
    """A listing that is queued or under way.

    Attributes:
        token: cancels it: another listing of the same model was asked for.
    """

    __slots__ = ("asked", "token")

    def __init__(self, asked: effects.Resolve) -> None:
        self.asked = asked
        self.token = Token()


class Look(NamedTuple):
    """A look at one object that is queued or under way."""

    asked: effects.Describe
    token: Token


Job = Listing | Fetch | Look | effects.ReadHeader
CheckJob = effects.Check | effects.ReadDigests
SegmentJob = effects.CreateSegments | effects.Publish | effects.Free


class Ports:
    """The outside, as one daemon sees it.

    Attributes:
        stores: by URI scheme, ``s3`` and ``file``.
    """

    __slots__ = ("checksums", "clock", "memory", "replies", "segments", "stores")

    def __init__(
        self,
        *,
        checksums: Checksums,
        stores: Mapping[str, ObjectStore],
        segments: SegmentStore,
        memory: MemoryProbe,
        replies: Replies,
        clock: Clock,
    ) -> None:
        self.checksums = checksums
        self.stores = stores
        self.segments = segments
        self.memory = memory
        self.replies = replies
        self.clock = clock


class Runner:
    """Carries effects out.

    Args:
        ports: the outside.
        post: puts a result into the mailbox.
        jitter: returns a random number in [0, 1).
    """

    def __init__(self, ports: Ports, post: Post, jitter: Callable[[], float]) -> None:
        self._ports = ports
        self._post = post
        self._jitter = jitter
        self._fetch_jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._segment_jobs: SimpleQueue[SegmentJob | None] = SimpleQueue()
        self._check_jobs: SimpleQueue[CheckJob | None] = SimpleQueue()
        self._lock = threading.Lock()  # of the fetches, as far as two may be of one part
        self._fetches: set[Fetch] = set()
        self._looks: set[Look] = set()
        self._listings: dict[str, Listing] = {}  # the last one, by model

    def carry_out(self, effect: Effect) -> None:
        """Do it, or hand it to the thread that does. Mailbox thread; under a millisecond."""
        match effect:
            case effects.Reply():
                self._reply(effect)
            case effects.FetchPart():
                self._begin_fetch(Fetch(effect.part))
            case effects.Resolve():
                self._list(Listing(effect))
            case effects.Describe():
                look = Look(effect, Token())
                self._looks.add(look)
                self._fetch_jobs.put(look)
            case effects.ReadHeader():
                self._fetch_jobs.put(effect)
            case effects.Check() | effects.ReadDigests():
                self._check_jobs.put(effect)
            case effects.CreateSegments() | effects.Publish() | effects.Free():
                self._segment_jobs.put(effect)
            case effects.CancelParts():
                self._cancel(effect)
            case _:
                pass  # for observers and the daemon only

    def _begin_fetch(self, fetch: Fetch) -> None:
        """Queue an attempt; a hedge only while the first one still runs, whose sink it shares."""
        with self._lock:
            is_late = fetch.part.hedge > 0 and not self._is_under_way(fetch.part)
            if not is_late:
                self._fetches.add(fetch)
        if is_late:
            error = StoreUnavailable("the part has come in the meantime")
            self._post(events.PartFailed(fetch.part, fetch.part.start, error, self._jitter()))
        else:
            self._fetch_jobs.put(fetch)

    def _is_under_way(self, part: Part) -> bool:
        return any(other.part.part_id == part.part_id for other in self._fetches)

    def _cancel(self, effect: effects.CancelParts) -> None:
        for fetch in tuple(self._fetches):
            is_meant = effect.part_id is None or fetch.part.part_id == effect.part_id
            if is_meant and fetch.part.file.of == effect.of:
                fetch.token.cancel()

    def cut(self) -> None:
        """Make every listing and GET end soon, those that are queued as well; the last thing."""
        tokens = [fetch.token for fetch in tuple(self._fetches)]
        for token in (*tokens, *(look.token for look in tuple(self._looks))):
            token.cancel()
        for store in self._ports.stores.values():
            store.close()

    def _list(self, listing: Listing) -> None:
        """Queue a listing; an earlier one of the model ends soon."""
        earlier = self._listings.get(listing.asked.ref.name)
        if earlier is not None:
            earlier.token.cancel()
        self._listings[listing.asked.ref.name] = listing
        self._fetch_jobs.put(listing)

    def stop(self, fetch_threads: int, check_threads: int) -> None:
        """Let every thread end after the jobs that are queued."""
        for _ in range(fetch_threads):
            self._fetch_jobs.put(None)
        for _ in range(check_threads):
            self._check_jobs.put(None)
        self._segment_jobs.put(None)

    def fetch_work(self) -> None:
        """Body of a fetch thread: until ``stop``."""
        while (job := self._fetch_jobs.get()) is not None:
            match job:
                case Fetch():
                    self._fetch(job)
                case Listing():
                    self._resolve(job)
                case Look():
                    self._describe(job)
                case effects.ReadHeader():
                    self._read_header(job)

    def check_work(self) -> None:
        """Body of a check thread: until ``stop``."""
        while (job := self._check_jobs.get()) is not None:
            try:
                self._post(self._check(job))
            except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
                is_list = isinstance(job, effects.ReadDigests)
                failed = events.DigestsRefused if is_list else events.CheckFailed
                self._post(failed(job.file, _known(error)))

    def segment_work(self) -> None:
        """Body of the segment thread: until ``stop``."""
        while (job := self._segment_jobs.get()) is not None:
            try:
                self._segment_job(job)
            except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
                is_free = isinstance(job, effects.Free)
                failed = events.FreeFailed if is_free else events.SegmentsFailed
                self._post(failed(job.of, _known(error)))

    def _store(self, uri: str) -> ObjectStore:
        return self._ports.stores[uri.partition(":")[0]]

    def _reply(self, reply: effects.Reply) -> None:
        descriptors: list[int] = []
        try:
            for file in reply.files:
                descriptors.append(self._ports.segments.reader(file))  # noqa: PERF401 - closed if a later one fails
        except CachedError as error:  # the version was freed, or no descriptor is left
            for descriptor in descriptors:
                os.close(descriptor)
            descriptors.clear()
            reply = reply._replace(body=error_body(error), files=())
        self._ports.replies.send(reply, tuple(descriptors))

    def _segment_job(self, job: SegmentJob) -> None:
        segments = self._ports.segments
        match job:
            case effects.CreateSegments():
                there = segments.create(job.of, job.manifest, job.shared)
                self._post(events.SegmentsReady(job.of, tuple(there)))
            case effects.Publish():
                path = segments.publish(job.of, job.checked_by)
                if job.is_current:
                    segments.switch(job.of, job.passed_over)
                self._post(events.Published(job.of, path))
            case effects.Free():
                is_free = segments.free(job.of, if_unused=job.if_unused)
                if is_free:
                    self._ports.checksums.forget(job.of)
                self._post(events.Freed(job.of) if is_free else events.StillMapped(job.of))

    def _resolve(self, listing: Listing) -> None:
        """List, unless a later listing of the model was asked for: that one's answer counts."""
        asked, token = listing.asked, listing.token
        if token.is_cancelled:
            return
        name = asked.ref.name
        event: events.Event
        try:
            manifest = self._store(asked.ref.uri).resolve(asked.ref, token)
            available_bytes = self._ports.memory.available_bytes()
            event = events.Resolved(name, manifest, available_bytes, asked.listing)
        except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
            event = events.ResolveFailed(name, _known(error), self._jitter(), asked.listing)
        if not token.is_cancelled:
            self._post(event)

    def _fetch(self, fetch: Fetch) -> None:
        clock, part = self._ports.clock, fetch.part
        began_s = clock.now_s()
        event: events.Event
        sink = None
        try:
            summing = self._ports.checksums.summing(part.algorithm) if part.algorithm else None
            sink = self._ports.segments.sink(part, summing)
            first_byte_s = self._fill(fetch, sink)
            seconds = clock.now_s() - began_s
            event = events.PartFetched(part, seconds, first_byte_s, sink.checksum)
        except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
            watermark = sink.watermark if sink is not None else part.start
            event = events.PartFailed(part, watermark, _known(error), self._jitter())
        with self._lock:
            self._fetches.remove(fetch)
            if not self._is_under_way(part):
                self._ports.segments.release_sink(part)
        self._post(event)

    def _fill(self, fetch: Fetch, sink: Sink) -> float | None:
        part = fetch.part
        first_byte_s = self._store(part.uri).fetch(part, sink, fetch.token)
        if sink.watermark != part.stop:  # no store is trusted with what "complete" means
            message = (
                f"{part.stored.key} came up to byte {sink.watermark}, {part.stop} were asked for"
            )
            raise BadReply(message, hint="look at the store, and at any proxy before it")
        return first_byte_s

    def _describe(self, look: Look) -> None:
        asked = look.asked
        event: events.Event
        try:
            facts = self._store(asked.uri).describe(asked.uri, asked.stored, look.token)
            event = events.Described(asked.file, facts)
        except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
            event = events.DescribeFailed(asked.file, _known(error), self._jitter())
        self._looks.discard(look)
        self._post(event)

    def _check(self, job: CheckJob) -> events.Event:
        """Read bytes of a file back; through a descriptor of its own, which a free cannot close."""
        descriptor = self._ports.segments.reader(job.file)
        try:
            if isinstance(job, effects.ReadDigests):
                return events.DigestsRead(job.file, digests.parse(_whole(descriptor)))
            sums = self._ports.checksums
            if job.is_running:
                value = sums.extend(job.file, job.algorithm, descriptor, job.start, job.stop)
            else:
                value = sums.of_range(job.algorithm, descriptor, job.start, job.stop)
            return events.Checked(job.file, job.algorithm, job.start, job.stop, value)
        finally:
            os.close(descriptor)

    def _read_header(self, job: effects.ReadHeader) -> None:
        try:
            found = self._ports.segments.read_header(job.file, job.there_bytes)
        except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
            self._post(events.HeaderRefused(job.file, _known(error)))
        else:
            if isinstance(found, int):
                self._post(events.HeaderSized(job.file, found))
            else:
                self._post(events.HeaderRead(job.file, found))


def _whole(descriptor: int) -> bytes:
    """Return the bytes of a small file."""
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes > digests.MAX_BYTES:
        message = (
            f"{digests.MANIFEST_NAME} has {size_bytes} bytes, the limit is {digests.MAX_BYTES}"
        )
        raise LoadFailed(message, hint="write it anew: cached digest URI")
    return os.pread(descriptor, size_bytes, 0)


def _known(error: Exception) -> CachedError:
    """Return an error for the engine, which keeps it; unforeseen ones as such to report.

    Its traceback stays behind: the frames hold whatever the thread had, such as a header.
    """
    if not isinstance(error, CachedError):
        message = f"unexpected {type(error).__name__}: {error}"
        return LoadFailed(message, hint="this is a defect of the daemon: please report it")
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
