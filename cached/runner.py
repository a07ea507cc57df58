"""Each effect through one port, each result back as an event: the only way back.

``carry_out`` runs in the mailbox thread and only hands jobs over; ``fetch`` and
``segment_work`` are the bodies of the threads that do them.
"""

from __future__ import annotations

import os
from queue import SimpleQueue
from typing import TYPE_CHECKING

from cached.core import effects, events
from cached.core.errors import BadReply, CachedError, LoadFailed
from cached.core.wire import error_body

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cached.core.effects import Effect
    from cached.core.objects import Part
    from cached.ports import (
        Clock,
        MemoryProbe,
        ObjectStore,
        Post,
        Replies,
        SegmentStore,
        Sink,
    )


class Fetch:
    """A part that is queued or being fetched.

    Attributes:
        is_cancelled: nobody wants it any more; the store may not know of it yet.
    """

    __slots__ = ("is_cancelled", "part")

    def __init__(self, part: Part) -> None:
        self.part = part
        self.is_cancelled = False


Job = effects.Resolve | Fetch | effects.ReadHeader
SegmentJob = effects.CreateSegments | effects.Publish | effects.Free


class Ports:
    """The outside, as one daemon sees it.

    Attributes:
        stores: by URI scheme, ``s3`` and ``file``.
    """

    __slots__ = ("clock", "memory", "replies", "segments", "stores")

    def __init__(
        self,
        *,
        stores: Mapping[str, ObjectStore],
        segments: SegmentStore,
        memory: MemoryProbe,
        replies: Replies,
        clock: Clock,
    ) -> None:
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
        self._fetches: dict[int, Fetch] = {}  # by part id
        self._listings: dict[str, int] = {}  # number of the last listing, by model

    def carry_out(self, effect: Effect) -> None:
        """Do it, or hand it to the thread that does. Mailbox thread; under a millisecond."""
        match effect:
            case effects.Reply():
                self._reply(effect)
            case effects.FetchPart():
                fetch = self._fetches[effect.part.part_id] = Fetch(effect.part)
                self._fetch_jobs.put(fetch)
            case effects.Resolve():
                self._listings[effect.ref.name] = effect.listing  # earlier ones end soon
                self._fetch_jobs.put(effect)
            case effects.ReadHeader():
                self._fetch_jobs.put(effect)
            case effects.CreateSegments() | effects.Publish() | effects.Free():
                self._segment_jobs.put(effect)
            case effects.CancelParts():
                for fetch in tuple(self._fetches.values()):
                    if fetch.part.file.of == effect.of:
                        self._cancel(fetch)
            case _:
                pass  # for observers and the daemon only

    def cut(self) -> None:
        """Make every listing and GET end soon, those that are queued as well; the last thing."""
        for fetch in tuple(self._fetches.values()):
            self._cancel(fetch)
        for store in self._ports.stores.values():
            store.close()

    def _cancel(self, fetch: Fetch) -> None:
        fetch.is_cancelled = True  # first: the store looks after it has begun to listen to cancel
        self._store(fetch.part.uri).cancel(fetch.part)

    def stop(self, fetch_threads: int) -> None:
        """Let every thread end after the jobs that are queued."""
        for _ in range(fetch_threads):
            self._fetch_jobs.put(None)
        self._segment_jobs.put(None)

    def fetch_work(self) -> None:
        """Body of a fetch thread: until ``stop``."""
        while (job := self._fetch_jobs.get()) is not None:
            match job:
                case Fetch():
                    self._fetch(job)
                case effects.Resolve():
                    self._resolve(job)
                case effects.ReadHeader():
                    self._read_header(job)

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
                segments.create(job.of, job.manifest)
                self._post(events.SegmentsReady(job.of))
            case effects.Publish():
                self._post(events.Published(job.of, segments.publish(job.of)))
            case effects.Free():
                is_free = segments.free(job.of)
                self._post(events.Freed(job.of) if is_free else events.StillMapped(job.of))

    def _resolve(self, job: effects.Resolve) -> None:
        """List, unless a later listing of the model was asked for: that one's answer counts."""
        name = job.ref.name

        def is_outdated() -> bool:
            return self._listings[name] != job.listing

        if is_outdated():
            return
        event: events.Event
        try:
            manifest = self._store(job.ref.uri).resolve(job.ref, is_outdated)
            available_bytes = self._ports.memory.available_bytes()
            event = events.Resolved(name, manifest, available_bytes, job.listing)
        except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
            event = events.ResolveFailed(name, _known(error), self._jitter(), job.listing)
        if not is_outdated():
            self._post(event)

    def _fetch(self, fetch: Fetch) -> None:
        clock, part = self._ports.clock, fetch.part
        began_s = clock.now_s()
        event: events.Event
        sink = None
        try:
            sink = self._ports.segments.sink(part)
            self._fill(fetch, sink)
            event = events.PartFetched(part, clock.now_s() - began_s)
        except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
            watermark = sink.watermark if sink is not None else part.start
            event = events.PartFailed(part, watermark, _known(error), self._jitter())
        self._fetches.pop(part.part_id, None)
        self._ports.segments.release_sink(part)
        self._post(event)

    def _fill(self, fetch: Fetch, sink: Sink) -> None:
        part = fetch.part
        self._store(part.uri).fetch(part, sink, lambda: fetch.is_cancelled)
        if sink.watermark != part.stop:  # no store is trusted with what "complete" means
            message = (
                f"{part.stored.key} came up to byte {sink.watermark}, {part.stop} were asked for"
            )
            raise BadReply(message, hint="look at the store, and at any proxy before it")

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


def _known(error: Exception) -> CachedError:
    """Return an error for the engine, which keeps it; unforeseen ones as such to report.

    Its traceback stays behind: the frames hold whatever the thread had, such as a header.
    """
    if not isinstance(error, CachedError):
        message = f"unexpected {type(error).__name__}: {error}"
        return LoadFailed(message, hint="this is a defect of the daemon: please report it")
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
