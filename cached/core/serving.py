"""Peers, their leases, and the requests that wait for an answer.

A request that cannot be answered yet becomes a ``Waiter``; ``settle`` looks again at the
waiters of a model whenever something about it changed. docs/wire.md says what each
request and reply means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core import wire
from cached.core.effects import Reply
from cached.core.errors import (
    BadRequest,
    CachedError,
    DaemonUnavailable,
    TimedOut,
)
from cached.core.loading import unknown_version
from cached.core.loads import Load
from cached.core.objects import FileRef, PeerId
from cached.core.operating import EVERY
from cached.core.peers import MAX_WAITING, Peer, Waiter, refusal
from cached.core.shares import Shares

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cached.core.events import Connected, Requested
    from cached.core.leaving import Leaving
    from cached.core.listing import Listing
    from cached.core.loads import Model
    from cached.core.objects import Range, VersionRef
    from cached.core.operating import Operating
    from cached.core.peers import Answer, Ask, Wants
    from cached.core.reporting import About
    from cached.core.shelf import Shelf

    There = tuple[list[list[int]], int]

LOCAL = PeerId(0)
"""The daemon's own threads (HTTP): said hello, and may do what its owner may."""


class Serving:
    """The workers' side of the engine.

    Args:
        shelf: models and loads.
        listing: to want and use models.
        leaving: told of leases that end.
        operating: answers what the operator asks.
        about: what ``hello`` tells.
    """

    def __init__(
        self,
        shelf: Shelf,
        listing: Listing,
        leaving: Leaving,
        operating: Operating,
        about: About,
    ) -> None:
        self._shelf = shelf
        self._listing = listing
        self._leaving = leaving
        self._operating = operating
        self._about = about
        self._waiting = Shares(MAX_WAITING)
        daemon = (about.owner_uid, about.pid)
        self._peers: dict[PeerId, Peer] = {LOCAL: Peer(daemon, self._waiting, has_greeted=True)}
        self._waiters: dict[str, list[Waiter]] = {}
        self._there: dict[VersionRef, There] = {}  # of this event: many may ask
        self._operations: dict[str, Callable[[Peer, Requested, float], None]] = {
            "hello": self._hello,
            "open": self._open,
            "descriptors": self._descriptors,
            "wait": self._wait,
            "arrivals": self._arrivals,
            "check": self._check,
            "cancel": self._cancel,
            **dict.fromkeys(operating.names, self._operate),
        }

    @property
    def has_peers(self) -> bool:
        """Whether anybody is connected."""
        return len(self._peers) > 1  # the daemon's own threads are one

    @property
    def waiter_count(self) -> int:
        """How many requests are not answered yet."""
        return sum(len(waiters) for waiters in self._waiters.values())

    def connected(self, event: Connected) -> None:
        """Get to know a peer."""
        self._peers[event.peer] = Peer((event.uid, event.pid), self._waiting)

    def disconnected(self, peer_id: PeerId, now_s: float) -> None:
        """End its lease and forget its requests."""
        peer = self._peers.pop(peer_id, None)
        if peer is None:
            return
        for name, waiters in self._waiters.items():
            for waiter in waiters:
                if waiter.peer == peer_id:
                    peer.ended(waiter)
            self._waiters[name] = [waiter for waiter in waiters if waiter.peer != peer_id]
        if peer.lease is not None:
            peer.lease.holders.discard(peer_id)
            self._leaving.lease_ended(peer.lease)

    def requested(self, event: Requested, now_s: float) -> None:
        """Answer a request, now or later."""
        self._there.clear()
        peer = self._peers.get(event.peer)
        if peer is None:
            return  # it left before its request was read
        try:
            operation = self._operations.get(event.op)
            if operation is None:
                known = " ".join(sorted(self._operations))
                message = f"op {event.op[:64]!r} is not known: it is one of {known}"
                raise BadRequest(message, hint="docs/wire.md lists what each takes")
            if not peer.has_greeted and event.op != "hello":
                raise BadRequest("the first request must be hello", hint="see docs/wire.md")
            operation(peer, event, now_s)
        except CachedError as error:
            self._reply(event, wire.error_body(error))

    def settle(self, name: str) -> None:
        """Answer those waiters of a model, or of all, that can be answered now."""
        self._there.clear()
        for key in (name, EVERY):
            waiting = self._waiters.pop(key, [])
            still = [waiter for waiter in waiting if not self._try(waiter)]
            if still:
                self._waiters[key] = still

    def dismiss(self, reason: str) -> None:
        """Answer every waiter with ``DaemonUnavailable``."""
        error = DaemonUnavailable(reason, hint="try again, or read the model another way")
        for waiters in self._waiters.values():
            for waiter in waiters:
                self._send(waiter, refusal(error))
        self._waiters.clear()

    def _try(self, waiter: Waiter) -> bool:
        try:
            answer = waiter.answer()
        except CachedError as error:
            answer = refusal(error)
        if answer is None:
            return False
        self._send(waiter, answer)
        return True

    def _send(self, waiter: Waiter, answer: Answer) -> None:
        self._peers[waiter.peer].ended(waiter)
        body, files = answer
        self._shelf.effects.append(Reply(waiter.peer, waiter.request_id, waiter.op, body, files))

    def _reply(self, event: Requested, body: dict[str, object]) -> None:
        self._shelf.effects.append(Reply(event.peer, event.request_id, event.op, body))

    def _answer_or_wait(
        self,
        event: Requested,
        name: str,
        ask: Ask,
        *,
        wants: Wants = (),
        names: Sequence[str] = (),
    ) -> None:
        waiter = Waiter(event.peer, event.request_id, event.op, ask, wants, names)
        self._peers[event.peer].began(waiter)
        if not self._try(waiter):
            self._waiters.setdefault(name, []).append(waiter)

    # --- requests, in the order of docs/wire.md

    def _hello(self, peer: Peer, event: Requested, now_s: float) -> None:
        wire.check_protocol(event.fields.get("protocol"))
        peer.has_greeted = True
        about = self._about
        protocol = list(wire.PROTOCOL)
        self._reply(event, {"protocol": protocol, "daemon": about.version, "pid": about.pid})

    def _open(self, peer: Peer, event: Requested, now_s: float) -> None:
        self._refuse_another_lease(peer, event.peer)
        model = self._shelf.model(wire.text(event.fields, "model"))
        version = wire.optional_text(event.fields, "version")
        until = wire.until(event.fields)
        names = wire.names(event.fields, "tensors")
        peer_id = event.peer  # the rest of the event is not kept while it waits
        self._shelf.refuse_when_draining()
        self._listing.used(model, now_s)
        find = self._finder(model, version, now_s)
        wanted: dict[VersionRef, list[tuple[int, Range]]] = {}  # looked up once for each load

        def answer() -> Answer | None:
            load = find()
            if not isinstance(load, Load):
                return load
            if not load.has_headers:
                return None
            if load.of not in wanted:
                wanted[load.of] = load.tensor_ranges(names or ())
                for index, span in wanted[load.of]:
                    load.planner.want(index, span.start, span.stop)
            is_there = load.is_complete if names is None else load.covers(wanted[load.of])
            if until == "ready" and not is_there:
                return None
            return self._grant(peer, peer_id, load)

        self._answer_or_wait(event, model.ref.name, answer, names=names or ())

    def _finder(
        self, model: Model, version: str | None, now_s: float
    ) -> Callable[[], Load | Answer | None]:
        """Return what finds the load to open: it, or None to wait, or the answer that refuses."""
        if version is None:
            self._listing.want(model, now_s)
            return lambda: model.offered or self._missing(model, now_s)
        listing = self._listing.look_for(model, version, now_s)

        def find() -> Load | Answer | None:
            load = model.having(version)
            if load is not None:
                return None if load.frees else load
            if model.is_refusal_told and model.pending is not None and model.error is not None:
                return refusal(model.error)  # it waits for room beside what others hold
            if model.is_under_way and model.listing <= listing:
                return None
            raise unknown_version(model, version)

        return find

    def _missing(self, model: Model, now_s: float) -> Answer | None:
        """Have a model that is not in memory loaded; or tell why it cannot be."""
        if model.state == "failed" and model.error is not None:
            return refusal(model.error)
        if not model.is_under_way:
            self._shelf.refuse_when_draining()
        self._listing.want(model, now_s)  # it was evicted in the meantime
        return None

    def _grant(self, peer: Peer, peer_id: PeerId, load: Load) -> Answer:
        peer.lease = load
        load.holders.add(peer_id)
        files = [
            {"path": stored.path, "size": stored.size_bytes, "header_bytes": load.header_bytes(at)}
            for at, stored in enumerate(load.manifest.objects)
        ]
        sent = tuple(FileRef(load.of, at) for at in range(min(len(files), wire.MAX_DESCRIPTORS)))
        body: dict[str, object] = {
            "name": load.of.name,
            "version": load.of.version,
            "complete": load.is_complete,
            "path": load.path,
            "files": files,
        }
        return body, sent

    def _descriptors(self, peer: Peer, event: Requested, now_s: float) -> None:
        load = self._lease(peer)
        indices = wire.numbers(event.fields, "files")
        count = len(load.manifest.objects)
        if len(indices) > wire.MAX_DESCRIPTORS or any(index >= count for index in indices):
            message = f"files must be at most {wire.MAX_DESCRIPTORS} numbers below {count}"
            raise BadRequest(message)
        files = tuple(FileRef(load.of, index) for index in indices)
        self._shelf.effects.append(Reply(event.peer, event.request_id, event.op, {}, files))

    def _wait(self, peer: Peer, event: Requested, now_s: float) -> None:
        load = self._lease(peer)
        ranges = wire.ranges(event.fields)
        wants = ranges or []
        missing = wants[::-1]

        def answer() -> Answer | None:
            while missing and load.covers(missing[-1:]):  # so each is looked at about once
                missing.pop()
            if load.is_complete if ranges is None else not missing:
                return self._progress(load, {"path": load.path} if ranges is None else {})
            if load.error is not None:
                return refusal(load.error)
            self._refuse_when_retired(load)
            return None

        self._answer_or_wait(event, load.of.name, answer, wants=wants)

    def _arrivals(self, peer: Peer, event: Requested, now_s: float) -> None:
        load = self._lease(peer)
        seen_bytes = wire.number(event.fields, "seen")

        def answer() -> Answer | None:
            there, there_bytes = self._there_of(load)
            if there_bytes > seen_bytes or load.is_complete:
                return self._progress(load, {"seen": there_bytes, "ranges": there})
            if load.error is not None:
                return refusal(load.error)
            self._refuse_when_retired(load)
            return None

        self._answer_or_wait(event, load.of.name, answer)

    def _check(self, peer: Peer, event: Requested, now_s: float) -> None:
        load = self._lease(peer)
        current = self._shelf.models[load.of.name].offered
        is_stale = load.error is not None or (current is not None and current is not load)
        version = current.of.version if current is not None else None
        self._reply(event, {"stale": is_stale, "current": version})

    def _cancel(self, peer: Peer, event: Requested, now_s: float) -> None:
        request_id = wire.number(event.fields, "request")
        for name, waiters in self._waiters.items():
            for waiter in waiters:
                if waiter.peer == event.peer and waiter.request_id == request_id:
                    error = TimedOut("given up by the worker")
                    self._send(waiter, refusal(error))
                    self._waiters[name] = [other for other in waiters if other is not waiter]
                    break
        self._reply(event, {})

    def _operate(self, peer: Peer, event: Requested, now_s: float) -> None:
        key, ask = self._operating.ask(event.op, event.fields, peer.uid, now_s)
        self._answer_or_wait(event, key, ask)

    # --- what requests have in common

    @staticmethod
    def _lease(peer: Peer) -> Load:
        if peer.lease is None:
            raise BadRequest("this connection holds no lease", hint="send open first")
        return peer.lease

    @staticmethod
    def _refuse_another_lease(peer: Peer, peer_id: PeerId) -> None:
        if peer.lease is not None or peer.is_opening or peer_id == LOCAL:
            what = f"holds a lease of {peer.lease.of}" if peer.lease else "has asked for a lease"
            message = f"this connection {what}"
            raise BadRequest(message, hint="open another connection for another lease")

    @staticmethod
    def _progress(load: Load, more: dict[str, object]) -> Answer:
        return {"complete": load.is_complete, **more}, ()

    def _there_of(self, load: Load) -> There:
        """Return which ranges of a load are there, and how many bytes these are."""
        if load.of not in self._there:
            ranges = [[index, span.start, span.stop] for index, span in load.there()]
            self._there[load.of] = ranges, sum(stop - start for _, start, stop in ranges)
        return self._there[load.of]

    def _refuse_when_retired(self, load: Load) -> None:
        if load.of in self._shelf.retired:
            message = f"{load.of} was taken out of memory"
            raise DaemonUnavailable(message, hint="open it again")
