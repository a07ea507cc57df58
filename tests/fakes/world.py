"""An outside for the engine, under a virtual clock: stores, segments, workers as plain sets.

Effects become *jobs*; a test decides which job ends next and how. ``World`` checks after
every step what must always be true (``check``): it keeps its own, naive account of which
blocks are where and never asks the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cached.core import effects, events
from cached.core.engine import Engine
from cached.core.errors import CachedError, HeaderError, ObjectMissing
from cached.core.header import Header, Tensor
from cached.core.loads import Limits
from cached.core.manifest import manifest_of
from cached.core.objects import FileRef, Manifest, ModelRef, PeerId, StoredObject, VersionRef
from cached.core.reporting import About

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cached.core.effects import Effect
    from cached.core.events import Event

BLOCK = 256 << 10
HEADER_BYTES = BLOCK
OWNER = 1000
ABOUT = About(version="0.0.0", pid=1, owner_uid=OWNER, socket="/nowhere", began_s=0.0)
GREETING = {"protocol": [1, 0], "client": "test"}


def stored(path: str, blocks: int, etag: str = '"1"') -> StoredObject:
    return StoredObject(key=f"m/{path}", path=path, size_bytes=blocks * BLOCK, etag=etag)


def manifest(*files: StoredObject, uri: str = "s3://bucket/m/") -> Manifest:
    return manifest_of(uri, files)


def header_of(file: StoredObject) -> Header:
    """One tensor a block, after a header of one block."""
    tensors = {
        f"{file.path}:{block}": Tensor(
            name=f"{file.path}:{block}",
            dtype="U8",
            shape=(BLOCK,),
            start=block * BLOCK,
            stop=(block + 1) * BLOCK,
        )
        for block in range(1, file.size_bytes // BLOCK)
    }
    return Header(header_bytes=HEADER_BYTES, tensors=tensors, metadata={})


class Sent(NamedTuple):
    """A reply that a worker got."""

    peer: int
    request_id: int
    op: str
    body: dict[str, object]
    files: tuple[FileRef, ...]

    @property
    def code(self) -> str | None:
        error = self.body.get("error")
        return str(error["code"]) if isinstance(error, dict) else None


class World:
    """The outside of one engine.

    Attributes:
        jobs: effects that wait for their end, oldest first.
        sent: all replies, in order.
        there: blocks in memory, by version: (file index, block).
        fetched: how often each block was written.
    """

    def __init__(
        self,
        listings: dict[str, Manifest],
        *,
        budget_bytes: int = 1 << 40,
        slots: int = 4,
        available_bytes: int = 1 << 40,
        prefetch: Iterable[str] = (),
        pinned: Iterable[str] = (),
    ) -> None:
        self.listings = dict(listings)
        self.budget_bytes = budget_bytes
        self.available_bytes = available_bytes
        self.now_s = 0.0
        self.wake_at_s: float | None = None
        self.jobs: list[Effect] = []
        self.log: list[Effect] = []
        self.sent: list[Sent] = []
        self.there: dict[VersionRef, set[tuple[int, int]]] = {}
        self.sizes: dict[VersionRef, int] = {}
        self.fetched: dict[tuple[FileRef, int], int] = {}
        self.mapped: set[VersionRef] = set()
        self.is_ready = False
        self.is_drained = False
        self._next_request = 0
        self._next_peer = 0
        self._outstanding: set[tuple[int, int]] = set()
        self.leases: dict[int, VersionRef] = {}
        self.pinned = set(pinned)
        refs = tuple(
            ModelRef(name, f"s3://bucket/{name}/", name in set(prefetch), name in self.pinned)
            for name in listings
        )
        self.engine = Engine(
            refs,
            budget_bytes=budget_bytes,
            limits=Limits(fetch_slots=slots, part_attempts=3),
            about=ABOUT,
        )
        self._take(self.engine.start(0.0))

    # --- what workers do

    def connect(self, uid: int = OWNER) -> int:
        self._next_peer += 1
        self.post(events.Connected(PeerId(self._next_peer), uid, 1))
        self.ask(self._next_peer, "hello", **GREETING)
        return self._next_peer

    def leave(self, peer: int) -> None:
        self.leases.pop(peer, None)
        self._outstanding = {pair for pair in self._outstanding if pair[0] != peer}
        self.post(events.Disconnected(PeerId(peer)))

    def ask(self, peer: int, op: str, **fields: object) -> int:
        self._next_request += 1
        self._outstanding.add((peer, self._next_request))
        self.post(events.Requested(PeerId(peer), self._next_request, op, fields))
        return self._next_request

    def answer(self, request_id: int) -> Sent | None:
        return next((sent for sent in self.sent if sent.request_id == request_id), None)

    def opened(self, name: str, **fields: object) -> tuple[int, int]:
        peer = self.connect()
        return peer, self.ask(peer, "open", model=name, **fields)

    def status(self, name: str) -> dict[str, object]:
        peer = self.connect()
        reply = self.answer(self.ask(peer, "status", model=name))
        self.leave(peer)
        assert reply is not None
        models = reply.body["models"]
        assert isinstance(models, list)
        return dict(models[0])

    # --- what the outside does

    def post(self, event: Event) -> None:
        self._take(self.engine.handle(event, self.now_s))

    def end(self, job: Effect, *, error: CachedError | None = None, blocks: int = 0) -> None:
        """End a job: well, or with an error after so many blocks."""
        self.jobs.remove(job)
        match job:
            case effects.Resolve():
                self._end_resolve(job, error)
            case effects.CreateSegments():
                self.there[job.of] = set()
                self.sizes[job.of] = sum(
                    -(-file.size_bytes // 4096) * 4096 for file in job.manifest.objects
                )
                self.post(events.SegmentsReady(job.of))
            case effects.FetchPart():
                self._end_fetch(job, error, blocks)
            case effects.ReadHeader():
                file = self._manifest(job.file.of).objects[job.file.index]
                if job.file.of not in self.there:  # freed in the meantime
                    self.post(events.HeaderRefused(job.file, HeaderError("gone")))
                    return
                assert (job.file.index, 0) in self.there[job.file.of], "header not there"
                self.post(events.HeaderRead(job.file, header_of(file)))
            case effects.Publish():
                wanted = sum(f.size_bytes // BLOCK for f in self._manifest(job.of).objects)
                assert len(self.there[job.of]) == wanted, "published with holes"
                self.post(events.Published(job.of, f"/models/{job.of}"))
            case effects.Free():
                self._end_free(job, error)
            case _:
                raise AssertionError(job)

    def run(self, limit: int = 100_000) -> None:
        """End every job well, oldest first, until none is left; time stands still."""
        for _ in range(limit):
            if not self.jobs:
                return
            self.end(self.jobs[0])
        raise AssertionError("does not come to rest")

    def sleep(self, seconds: float) -> None:
        """Let time pass; timers that fall into it ring in their order."""
        until_s = self.now_s + seconds
        while self.wake_at_s is not None and self.wake_at_s <= until_s:
            self.now_s, self.wake_at_s = max(self.now_s, self.wake_at_s), None
            self.post(events.Ticked())
        self.now_s = until_s

    @property
    def endable(self) -> list[Effect]:
        """Jobs that may end next: those of the one segment thread only in their order."""
        kinds = effects.CreateSegments | effects.Publish | effects.Free
        first = next((job for job in self.jobs if isinstance(job, kinds)), None)
        return [job for job in self.jobs if job is first or not isinstance(job, kinds)]

    def job(self, kind: type[Effect]) -> Effect:
        return next(job for job in self.jobs if isinstance(job, kind))

    def _manifest(self, of: VersionRef) -> Manifest:
        created = [e for e in self.log if isinstance(e, effects.CreateSegments) and e.of == of]
        return created[-1].manifest

    def _end_resolve(self, job: effects.Resolve, error: CachedError | None) -> None:
        listing = self.listings.get(job.ref.name)
        if listing is None and error is None:
            error = ObjectMissing("nothing there")
        if error is not None:
            self.post(events.ResolveFailed(job.ref.name, error, listing=job.listing))
            return
        assert listing is not None
        self.post(events.Resolved(job.ref.name, listing, self.available_bytes, job.listing))

    def _end_fetch(self, job: effects.FetchPart, error: CachedError | None, blocks: int) -> None:
        part = job.part
        assert part.start % BLOCK == 0 == part.stop % BLOCK
        stop = part.stop if error is None else min(part.stop, part.start + blocks * BLOCK)
        for block in range(part.start // BLOCK, stop // BLOCK):
            self.there[part.file.of].add((part.file.index, block))
            key = (part.file, block)
            self.fetched[key] = self.fetched.get(key, 0) + 1
        if error is None:
            self.post(events.PartFetched(part, 0.1))
        else:
            self.post(events.PartFailed(part, stop, error))

    def _end_free(self, job: effects.Free, error: CachedError | None) -> None:
        if error is not None:
            self.post(events.FreeFailed(job.of, error))
            return
        held = job.of in self.mapped or job.of in self.leases.values()
        if held:
            self.post(events.StillMapped(job.of))
            return
        self.there.pop(job.of, None)
        self.sizes.pop(job.of, None)
        self.post(events.Freed(job.of))

    def _take(self, decided: list[Effect]) -> None:
        for effect in decided:
            self.log.append(effect)
            match effect:
                case effects.Reply():
                    self._take_reply(effect)
                case effects.WakeAt():
                    self.wake_at_s = effect.when_s
                case effects.MarkReady():
                    self.is_ready = True
                case effects.Drained():
                    self.is_drained = True
                case effects.CancelParts() | effects.Refused() | effects.Retried():
                    pass
                case effects.DrainBegan() | effects.DrainCut():
                    pass
                case effects.Evicted():
                    if effect.reason == "budget":
                        assert effect.of not in self.leases.values(), "evicted though leased"
                        assert effect.of.name not in self.pinned, "evicted though pinned"
                case _:
                    self.jobs.append(effect)
        self.check()

    def _take_reply(self, reply: effects.Reply) -> None:
        if (reply.peer, reply.request_id) not in self._outstanding:
            return  # its peer has left; twice is caught below
        self._outstanding.discard((reply.peer, reply.request_id))
        sent = Sent(reply.peer, reply.request_id, reply.op, reply.body, reply.files)
        assert self.answer(sent.request_id) is None, "answered twice"
        self.sent.append(sent)
        if sent.op == "open" and sent.code is None:
            files = sent.files
            assert files, "a lease of nothing"
            self.leases[sent.peer] = files[0].of

    def check(self) -> None:
        """Raise unless all is as it must always be."""
        assert sum(self.sizes.values()) <= self.budget_bytes, "over budget"
        for job in self.jobs:
            if isinstance(job, effects.FetchPart):
                assert job.part.file.of in self.there, "fetched into nothing"
