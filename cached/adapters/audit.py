"""The audit: who was granted a lease and for how long, who changed what is in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from cached.core import effects, events

if TYPE_CHECKING:
    from cached.core.effects import Effect
    from cached.core.events import Event
    from cached.core.objects import PeerId

    class Write(Protocol):
        """Where lines go (``Writer.write``)."""

        def __call__(self, level: str, event: str, **fields: object) -> None:
            """Write one line."""


LOCAL = 0  # the peer that stands for the daemon's own HTTP side
ORDERS = {
    "evict": "model evicted by order",
    "refresh": "model refreshed by order",
    "purge": "models purged by order",
}
_TOLD = ("version", "freed_bytes", "models")  # of a reply, in the line about an order


class _Lease(NamedTuple):
    """What a peer holds, and since when."""

    model: object
    version: object
    granted_s: float


class Audit:
    """An Observer that writes a line for every lease and every order; in the mailbox thread.

    Leases that last when the daemon itself ends have no line of their end.

    Args:
        write: where lines go.
    """

    __slots__ = ("_leases", "_orders", "_peers", "_write")

    def __init__(self, write: Write) -> None:
        self._write = write
        self._peers: dict[PeerId, dict[str, object]] = {}  # pid and uid
        self._leases: dict[PeerId, _Lease] = {}
        self._orders: dict[tuple[PeerId, int], object] = {}  # the model of those under way

    def happened(self, event: Event, now_s: float) -> None:
        """Take note of who connects and what is ordered; write what ends."""
        match event:
            case events.Connected():
                self._peers[event.peer] = {"pid": event.pid, "uid": event.uid}
            case events.Requested() if event.op in ORDERS:
                self._orders[event.peer, event.request_id] = event.fields.get("model")
            case events.Disconnected():
                self._ended(event.peer, now_s)
            case _:
                pass

    def decided(self, effect: Effect, now_s: float) -> None:
        """Write what is granted and done."""
        if not isinstance(effect, effects.Reply):
            return
        model = self._orders.pop((effect.peer, effect.request_id), None)
        if "error" in effect.body:
            return
        if effect.op == "open":
            self._granted(effect, now_s)
        elif effect.op in ORDERS:
            told = {name: _text(effect.body[name]) for name in _TOLD if name in effect.body}
            if model is not None:
                told["model"] = model
            self._write("info", ORDERS[effect.op], **told, **self._who(effect.peer))

    def _granted(self, reply: effects.Reply, now_s: float) -> None:
        body = reply.body
        lease = self._leases[reply.peer] = _Lease(body.get("name"), body.get("version"), now_s)
        self._write(
            "info",
            "lease granted",
            model=lease.model,
            version=lease.version,
            **self._who(reply.peer),
            complete=body.get("complete"),
        )

    def _ended(self, peer: PeerId, now_s: float) -> None:
        who = self._who(peer)
        self._peers.pop(peer, None)
        for key in [key for key in self._orders if key[0] == peer]:
            del self._orders[key]
        lease = self._leases.pop(peer, None)
        if lease is None:
            return
        self._write(
            "info",
            "lease ended",
            model=lease.model,
            version=lease.version,
            **who,
            seconds=round(now_s - lease.granted_s, 3),
        )

    def _who(self, peer: PeerId) -> dict[str, object]:
        return {"via": "http"} if peer == LOCAL else self._peers.get(peer, {})


def _text(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, list) else value
