"""An outside for the engine, under a virtual clock: stores, segments, workers as plain sets.

Effects become *jobs*; a test decides which job ends next and how. ``World`` checks after
every step what must always be true (``check``): it keeps its own, naive account of which
blocks are where and never asks the engine.
"""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from cached.core import effects, events
from cached.core.digests import Digests
from cached.core.engine import Engine
from cached.core.errors import CachedError, HeaderError, LoadFailed, ObjectMissing
from cached.core.header import Header, Tensor
from cached.core.integrity import Integrity
from cached.core.loads import Limits, Load
from cached.core.manifest import manifest_of
from cached.core.objects import (
    FileRef,
    Left,
    Manifest,
    ModelRef,
    ObjectFacts,
    Part,
    PeerId,
    Range,
    StoredObject,
    VersionRef,
)
from cached.core.parts import Planner
from cached.core.reporting import About

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cached.core.effects import Effect
    from cached.core.events import Event

BLOCK = 256 << 10
HEADER_BYTES = BLOCK
OWNER = 1000
RIGHT = "sha256:" + base64.b64encode(bytes(32)).decode()
_CONTENT = (bytes(BLOCK), b"\1" * BLOCK)  # of a right block, of a wrong one
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


def right_crc(size_bytes: int) -> str:
    """What the store keeps of a file of so many bytes, which are right."""
    value = zlib.crc32(bytes(size_bytes)).to_bytes(4)
    return "crc32:" + base64.b64encode(value).decode()


def blocks_of(file: StoredObject) -> range:
    return range(file.size_bytes // BLOCK)


def load_of(listing: Manifest, version: str = "1", **more: Any) -> Load:
    """A load of a model named m, at time 0; unchecked unless ``verify`` says otherwise."""
    planner = Planner(listing)
    integrity = Integrity(
        listing, planner, verify=more.pop("verify", "off"), can=more.pop("can", frozenset())
    )
    return Load(VersionRef("m", version), listing, planner, 0.0, integrity=integrity, **more)


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

    def __init__(  # noqa: PLR0913 - by keywords
        self,
        listings: dict[str, Manifest],
        *,
        budget_bytes: int = 1 << 40,
        slots: int = 4,
        available_bytes: int = 1 << 40,
        prefetch: Iterable[str] = (),
        pinned: Iterable[str] = (),
        left: Sequence[Left] = (),
        **limits: Any,
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
        self.shared: dict[VersionRef, dict[int, FileRef]] = {}
        self.half: set[tuple[int, int]] = set()
        self.facts: dict[str, ObjectFacts] = {}
        self.wrong: set[tuple[FileRef, int]] = set()
        self.spoil: set[tuple[int, int]] = set()
        self.shown: set[VersionRef] = set()
        self.current: dict[str, VersionRef] = {}
        self.marks: dict[int, int] = {}
        self.digests = Digests(BLOCK, {})
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
            limits=Limits(fetch_slots=slots, part_attempts=3, **{"verify": "off"} | limits),
            about=ABOUT,
            left=left,
        )
        self.verify = limits.get("verify", "off")
        self.left = {each.of: each for each in left}
        for each in left:
            self.sizes[each.of] = each.size_bytes
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

    def stall(self, part: Part, idle_s: float) -> None:
        """Tell that a GET under way brings nothing."""
        watermark = self.marks.get(part.part_id, part.start)
        self.post(events.PartStalled(part, watermark, idle_s))

    def post(self, event: Event) -> None:
        self._take(self.engine.handle(event, self.now_s))

    def end(  # noqa: C901, PLR0912 - one row an effect
        self, job: Effect, *, error: CachedError | None = None, blocks: int = 0
    ) -> None:
        """End a job: well, or with an error after so many blocks."""
        self.jobs.remove(job)
        match job:
            case effects.Resolve():
                self._end_resolve(job, error)
            case effects.CreateSegments():
                self._end_create(job)
            case effects.Describe():
                self._end_describe(job, error)
            case effects.Check():
                self._end_check(job)
            case effects.ReadDigests():
                assert (job.file.index, 0) in self.there[job.file.of], "list not there"
                self.post(events.DigestsRead(job.file, self.digests))
            case effects.FetchPart():
                self._end_fetch(job, error, blocks)
            case effects.ReadHeader():
                file = self.manifest_of(job.file.of).objects[job.file.index]
                if job.file.of not in self.there:  # freed in the meantime
                    self.post(events.HeaderRefused(job.file, HeaderError("gone")))
                    return
                assert (job.file.index, 0) in self.there[job.file.of], "header not there"
                self.post(events.HeaderRead(job.file, header_of(file)))
            case effects.Publish():
                wanted = sum(f.size_bytes // BLOCK for f in self.manifest_of(job.of).objects)
                assert len(self.there[job.of]) == wanted, "published with holes"
                objects = self.manifest_of(job.of).objects
                wrong = {objects[at].path for (of, at), _ in self.wrong if of == job.of}
                assert not wrong & self.facts.keys(), "wrong bytes"
                self.shown.add(job.of)
                self.post(events.Published(job.of, f"/models/{job.of}"))
            case effects.Free():
                self._end_free(job, error)
            case _:
                raise AssertionError(job)

    def run(self, limit: int = 10_000) -> None:
        """End every job well, oldest first, until none is left; time stands still."""
        for _ in range(limit):
            if self.jobs:
                self.end(self.jobs[0])
            elif self.wake_at_s is not None and self.wake_at_s <= self.now_s:
                self.sleep(0)
            else:
                return
        raise AssertionError("does not come to rest")

    def run_one(self) -> None:
        """End the oldest job well."""
        self.end(self.jobs[0])

    def sleep(self, seconds: float) -> None:
        """Let time pass; timers that fall into it ring in their order."""
        until_s = self.now_s + seconds
        rung = 0
        while self.wake_at_s is not None and self.wake_at_s <= until_s:
            rung += 1
            assert rung < 10_000, "the timer rings for ever"
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

    def _end_create(self, job: effects.CreateSegments) -> None:
        of, objects = job.of, job.manifest.objects
        there: set[tuple[int, int]] = set()
        if of in self.left and self.left[of].is_published:
            there = {(at, block) for at, file in enumerate(objects) for block in blocks_of(file)}
        elif of in self.left:
            there = {
                (at, block)
                for at, file in enumerate(objects)
                for block in blocks_of(file)
                if (at, block) in self.half
            }
        for index, donor in job.shared.items():
            assert donor.of in self.there, "shares with what is gone"
            assert objects[index] == self.manifest_of(donor.of).objects[donor.index]
            assert not self._missing(donor), "shares what is not whole"
            there |= {(index, block) for block in blocks_of(objects[index])}
        self.there[of] = there
        self.shared[of] = dict(job.shared)
        self.sizes[of] = sum(
            -(-file.size_bytes // 4096) * 4096
            for at, file in enumerate(objects)
            if at not in job.shared
        )
        spans = [(at, Range(block * BLOCK, (block + 1) * BLOCK)) for at, block in sorted(there)]
        self.post(events.SegmentsReady(of, tuple(spans)))

    def _missing(self, file: FileRef) -> list[int]:
        wanted = blocks_of(self.manifest_of(file.of).objects[file.index])
        return [block for block in wanted if (file.index, block) not in self.there[file.of]]

    def _end_describe(self, job: effects.Describe, error: CachedError | None) -> None:
        if error is not None:
            self.post(events.DescribeFailed(job.file, error))
        else:
            facts = self.facts.get(job.stored.path, ObjectFacts())
            self.post(events.Described(job.file, facts))

    def _crc(self, file: FileRef, start: int, stop: int) -> bytes:
        value = 0
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            value = zlib.crc32(_CONTENT[(file, block) in self.wrong], value)
        return value.to_bytes(4)

    def _end_check(self, job: effects.Check) -> None:
        """A SHA is the number of wrong blocks: of ``RIGHT`` it is 0; a CRC is one."""
        if job.file.of not in self.there:
            self.post(events.CheckFailed(job.file, LoadFailed("gone")))
            return
        span = range(job.start // BLOCK, -(-job.stop // BLOCK))
        if job.is_running:
            span = range(span.stop)
        assert all((job.file.index, block) in self.there[job.file.of] for block in span)
        wrong = sum((job.file, block) in self.wrong for block in span)
        value = wrong.to_bytes(32)
        if job.algorithm == "crc32":
            value = self._crc(job.file, job.start, job.stop)
        self.post(events.Checked(job.file, job.algorithm, job.start, job.stop, value))

    def manifest_of(self, of: VersionRef) -> Manifest:
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
        start = self.marks.get(part.part_id, part.start)  # what the other attempt has brought
        stop = part.stop if error is None else min(part.stop, start + blocks * BLOCK)
        self.marks[part.part_id] = stop
        for block in range(start // BLOCK, stop // BLOCK):
            self.there[part.file.of].add((part.file.index, block))
            key = (part.file, block)
            self.fetched[key] = self.fetched.get(key, 0) + 1
            self.wrong.discard(key)
            if (part.file.index, block) in self.spoil:
                self.spoil.discard((part.file.index, block))
                self.wrong.add(key)
        if error is None:
            value = self._crc(part.file, part.start, part.stop) if part.algorithm else None
            self.post(events.PartFetched(part, 0.1, checksum=value))
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
        self._hand_over(job.of)
        self.sizes.pop(job.of, None)
        self.shown.discard(job.of)
        self.post(events.Freed(job.of))

    def _hand_over(self, gone: VersionRef) -> None:
        """Memory that others share stays: it is the first one's now."""
        heirs: dict[FileRef, FileRef] = {}
        for of, shared in self.shared.items():
            for index, donor in tuple(shared.items()):
                if donor.of == gone and of != gone:
                    heir = heirs.setdefault(donor, FileRef(of, index))
                    if heir == FileRef(of, index):
                        del shared[index]
                        size = self.manifest_of(of).objects[index].size_bytes
                        self.sizes[of] += -(-size // 4096) * 4096
                    else:
                        shared[index] = heir
        self.shared.pop(gone, None)

    def _take(self, decided: list[Effect]) -> None:  # noqa: C901, PLR0912 - one row an effect
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
                case effects.Switched():
                    self.current[effect.of.name] = effect.of
                case effects.Adopted() | effects.Looked():
                    pass
                case effects.Mismatched():
                    for block in range(effect.start // BLOCK, -(-effect.stop // BLOCK)):
                        self.fetched.pop((effect.file, block), None)
                case effects.Hedged():
                    pass
                case effects.DrainBegan() | effects.DrainCut():
                    pass
                case effects.Evicted():
                    if effect.reason == "budget":
                        assert effect.of not in self.leases.values(), "evicted though leased"
                        is_pinned = effect.of.name in self.pinned  # what is superseded is not
                        is_current = self.current.get(effect.of.name) == effect.of
                        assert not (is_pinned and is_current), "evicted though pinned"
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
