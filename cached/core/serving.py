"""Peers, their leases, and the requests that wait for an answer.

A request that cannot be answered yet becomes a ``Waiter``; ``settle`` looks again at the
waiters of a model whenever something about it changed. docs/wire.md says what each
request and reply means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core import reporting, wire
from cached.core.effects import Reply
from cached.core.errors import (
    BadRequest,
    CachedError,
    DaemonUnavailable,
    ModelUnknown,
    NotPermitted,
    TimedOut,
)
from cached.core.objects import FileRef, PeerId
from cached.core.peers import Peer, Waiter, refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.core.events import Connected, Requested
    from cached.core.loading import Loading
    from cached.core.loads import Load, Model, Shelf
    from cached.core.objects import Range, VersionRef
    from cached.core.peers import Answer, Ask, Wants
    from cached.core.reporting import About

LOCAL = PeerId(0)
"""The daemon's own threads (HTTP): said hello, and may do what its owner may."""


class Serving:
    """The workers' side of the engine.

    Args:
        shelf: models and loads.
        loading: to want, use and retire models.
        about: what ``hello`` and ``status`` tell.
    """

    def __init__(self, shelf: Shelf, loading: Loading, about: About) -> None:
        self._shelf = shelf
        self._loading = loading
        self._about = about
        self._peers: dict[PeerId, Peer] = {LOCAL: Peer(about.owner_uid, has_greeted=True)}
        self._waiters: dict[str, list[Waiter]] = {}
        self._operations: dict[str, Callable[[Peer, Requested, float], None]] = {
            "hello": self._hello,
            "open": self._open,
            "descriptors": self._descriptors,
            "wait": self._wait,
            "arrivals": self._arrivals,
            "check": self._check,
            "cancel": self._cancel,
            "status": self._status,
            "prefetch": self._prefetch,
            "evict": self._evict,
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
        self._peers[event.peer] = Peer(event.uid)

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
            self._loading.lease_ended(peer.lease, now_s)

    def requested(self, event: Requested, now_s: float) -> None:
        """Answer a request, now or later."""
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
        """Answer those waiters of a model that can be answered now."""
        waiting = self._waiters.pop(name, [])
        still = [waiter for waiter in waiting if not self._try(waiter)]
        if still:
            self._waiters[name] = still

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

    def _answer_or_wait(self, event: Requested, name: str, ask: Ask, wants: Wants = ()) -> None:
        waiter = Waiter(event.peer, event.request_id, event.op, ask, wants)
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
        model = self._model(wire.text(event.fields, "model"))
        until = wire.until(event.fields)
        names = wire.names(event.fields, "tensors")
        self._refuse_when_draining()
        self._loading.used(model, now_s)
        self._loading.want(model, now_s)
        wanted: dict[VersionRef, list[tuple[int, Range]]] = {}  # looked up once for each load

        def answer() -> Answer | None:
            load = model.load
            if load is None:
                if model.state == "failed" and model.error is not None:
                    return refusal(model.error)
                if not model.is_under_way:
                    self._refuse_when_draining()
                self._loading.want(model, now_s)  # it was evicted in the meantime
                return None
            if not load.has_headers:
                return None
            if load.of not in wanted:
                wanted[load.of] = load.tensor_ranges(names or ())
                for index, span in wanted[load.of]:
                    load.planner.want(index, span.start, span.stop)
            is_there = load.is_complete if names is None else load.covers(wanted[load.of])
            if until == "ready" and not is_there:
                return None
            return self._grant(peer, event.peer, load)

        peer.is_opening = True
        self._answer_or_wait(event, model.ref.name, answer)

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
        peer.want(load, wants)
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

        self._answer_or_wait(event, load.of.name, answer, wants)

    def _arrivals(self, peer: Peer, event: Requested, now_s: float) -> None:
        load = self._lease(peer)
        seen_bytes = wire.number(event.fields, "seen")

        def answer() -> Answer | None:
            there = [
                [index, span.start, span.stop]
                for index in range(len(load.manifest.objects))
                for span in load.planner.ranges(index)
            ]
            there_bytes = sum(stop - start for _, start, stop in there)
            if there_bytes > seen_bytes or load.is_complete:
                return self._progress(load, {"seen": there_bytes, "ranges": there})
            if load.error is not None:
                return refusal(load.error)
            self._refuse_when_retired(load)
            return None

        self._answer_or_wait(event, load.of.name, answer)

    def _check(self, peer: Peer, event: Requested, now_s: float) -> None:
        load = self._lease(peer)
        current = self._shelf.models[load.of.name].load
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

    def _status(self, peer: Peer, event: Requested, now_s: float) -> None:
        name = wire.optional_text(event.fields, "model")
        models = [self._model(name)] if name is not None else self._shelf.models.values()
        body = reporting.status(self._shelf, self._about, models, now_s)
        body["ready"] = self._loading.is_ready
        self._reply(event, body)

    def _prefetch(self, peer: Peer, event: Requested, now_s: float) -> None:
        self._refuse_unless_owner(peer, "prefetch")
        model = self._model(wire.text(event.fields, "model"))
        self._refuse_when_draining()
        self._loading.want(model, now_s)
        self._loading.hurry(model, now_s)
        self._reply(event, {"state": model.state})

    def _evict(self, peer: Peer, event: Requested, now_s: float) -> None:
        self._refuse_unless_owner(peer, "evict")
        model = self._model(wire.text(event.fields, "model"))
        load = model.load
        if load is not None and load.holders:
            count = len(load.holders)
            message = f"{model.ref.name} is leased by {count} worker{'s' if count > 1 else ''}"
            raise NotPermitted(message, hint="evict it when they have closed it")
        freed_bytes = self._loading.evict(model, now_s)
        self._reply(event, {"freed_bytes": freed_bytes})

    # --- what requests have in common

    def _model(self, name: str) -> Model:
        model = self._shelf.models.get(name)
        if model is None:
            known = ", ".join(self._shelf.models) or "none"
            message = f"no model named {name[:128]!r} is configured: known are {known}"
            raise ModelUnknown(message, hint=f"start the daemon with --model {name[:128]}=s3://…")
        return model

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

    def _refuse_unless_owner(self, peer: Peer, op: str) -> None:
        if peer.uid not in {0, self._about.owner_uid}:
            message = f"{op} is for uid {self._about.owner_uid} and root, was asked by {peer.uid}"
            raise NotPermitted(message, hint="run the command as the daemon's user")

    def _refuse_when_draining(self) -> None:
        if self._shelf.is_draining:
            raise DaemonUnavailable("the daemon is stopping", hint="try again when it is back")

    def _refuse_when_retired(self, load: Load) -> None:
        if load.of in self._shelf.retired:
            message = f"{load.of} was taken out of memory"
            raise DaemonUnavailable(message, hint="open it again")
