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

Job = effects.Resolve | effects.FetchPart | effects.ReadHeader
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
        self._running: dict[int, Part] = {}

    def carry_out(self, effect: Effect) -> None:
        """Do it, or hand it to the thread that does. Mailbox thread; under a millisecond."""
        match effect:
            case effects.Reply():
                self._reply(effect)
            case effects.FetchPart():
                self._running[effect.part.part_id] = effect.part
                self._fetch_jobs.put(effect)
            case effects.Resolve() | effects.ReadHeader():
                self._fetch_jobs.put(effect)
            case effects.CreateSegments() | effects.Publish() | effects.Free():
                self._segment_jobs.put(effect)
            case effects.CancelParts():
                for part in tuple(self._running.values()):
                    if part.file.of == effect.of:
                        self._store(part.uri).cancel(part)
            case _:
                pass  # for observers and the daemon only

    def stop(self, fetch_threads: int) -> None:
        """Let every thread end after the job it has; cut running GETs."""
        for part in tuple(self._running.values()):
            self._store(part.uri).cancel(part)
        for _ in range(fetch_threads):
            self._fetch_jobs.put(None)
        self._segment_jobs.put(None)

    def fetch_work(self) -> None:
        """Body of a fetch thread: until ``stop``."""
        while (job := self._fetch_jobs.get()) is not None:
            match job:
                case effects.FetchPart():
                    self._fetch(job.part)
                case effects.Resolve():
                    self._resolve(job)
                case effects.ReadHeader():
                    self._read_header(job)

    def segment_work(self) -> None:
        """Body of the segment thread: until ``stop``."""
        while (job := self._segment_jobs.get()) is not None:
            try:
                self._segment_job(job)
            except CachedError as error:
                self._post(events.SegmentsFailed(job.of, error))
            except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
                self._post(events.SegmentsFailed(job.of, _bug(error)))

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
        name = job.ref.name
        try:
            manifest = self._store(job.ref.uri).resolve(job.ref)
            available_bytes = self._ports.memory.available_bytes()
        except CachedError as error:
            self._post(events.ResolveFailed(name, error, self._jitter()))
        except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
            self._post(events.ResolveFailed(name, _bug(error)))
        else:
            self._post(events.Resolved(name, manifest, available_bytes))

    def _fetch(self, part: Part) -> None:
        clock = self._ports.clock
        began_s = clock.now_s()
        event: events.Event
        sink = None
        try:
            sink = self._ports.segments.sink(part)
            self._fill(part, sink)
            event = events.PartFetched(part, clock.now_s() - began_s)
        except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
            known = error if isinstance(error, CachedError) else _bug(error)
            watermark = sink.watermark if sink is not None else part.start
            event = events.PartFailed(part, watermark, known, self._jitter())
        self._running.pop(part.part_id, None)
        self._ports.segments.release_sink(part)
        self._post(event)

    def _fill(self, part: Part, sink: Sink) -> None:
        self._store(part.uri).fetch(part, sink)
        if sink.watermark != part.stop:  # no store is trusted with what "complete" means
            message = (
                f"{part.stored.key} came up to byte {sink.watermark}, {part.stop} were asked for"
            )
            raise BadReply(message, hint="it is tried again from there")

    def _read_header(self, job: effects.ReadHeader) -> None:
        try:
            found = self._ports.segments.read_header(job.file, job.there_bytes)
        except CachedError as error:
            self._post(events.HeaderRefused(job.file, error))
        except Exception as error:  # noqa: BLE001 - the outermost loop: a bug fails one load, not the daemon
            self._post(events.HeaderRefused(job.file, _bug(error)))
        else:
            if isinstance(found, int):
                self._post(events.HeaderSized(job.file, found))
            else:
                self._post(events.HeaderRead(job.file, found))


def _bug(error: Exception) -> LoadFailed:
    """Return an unforeseen exception as an error that a user can report."""
    message = f"unexpected {type(error).__name__}: {error}"
    return LoadFailed(message, hint="this is a defect of the daemon: please report it")
