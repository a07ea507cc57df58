"""Every lease has a line when it is granted and when it ends; every order names who gave it."""

from __future__ import annotations

import pytest

from cached.adapters.audit import Audit
from cached.core import effects, events
from cached.core.objects import PeerId

PEER, OTHER, LOCAL = PeerId(7), PeerId(8), PeerId(0)
GRANTED: dict[str, object] = {"name": "llm", "version": "9f2c", "complete": False, "files": []}
ERROR: dict[str, object] = {"error": {"code": "not_permitted", "message": "m", "hint": ""}}


class Lines:
    """An audit, and what it wrote."""

    def __init__(self) -> None:
        self.written: list[dict[str, object]] = []
        self.audit = Audit(self.write)
        self.audit.happened(events.Connected(PEER, uid=1000, pid=4711), 1.0)

    def write(self, level: str, event: str, **fields: object) -> None:
        assert level == "info"
        self.written.append({"event": event, **fields})

    def ask(self, op: str, peer: PeerId = PEER, request_id: int = 1, **fields: object) -> None:
        self.audit.happened(events.Requested(peer, request_id, op, fields), 2.0)

    def answer(
        self, op: str, body: dict[str, object], peer: PeerId = PEER, request_id: int = 1
    ) -> None:
        self.audit.decided(effects.Reply(peer, request_id, op, body), 2.5)


@pytest.fixture
def lines() -> Lines:
    return Lines()


def test_a_lease_is_told_when_it_is_granted_and_when_it_ends(lines: Lines):
    lines.ask("open", model="llm")
    assert lines.written == []
    lines.answer("open", GRANTED)
    lines.audit.happened(events.Disconnected(PEER), 12.0)
    lines.audit.happened(events.Disconnected(PEER), 13.0)
    who = {"model": "llm", "version": "9f2c", "pid": 4711, "uid": 1000}
    assert lines.written == [
        {"event": "lease granted", **who, "complete": False},
        {"event": "lease ended", **who, "seconds": 9.5},
    ]


def test_what_is_refused_or_no_lease_has_no_line(lines: Lines):
    lines.ask("open", model="llm")
    lines.answer("open", ERROR)
    lines.ask("evict", model="llm")
    lines.answer("evict", ERROR)
    lines.ask("status")
    lines.answer("status", {"models": []})
    lines.audit.happened(events.Disconnected(PEER), 3.0)
    assert lines.written == []


@pytest.mark.parametrize(
    ("op", "fields", "body", "line"),
    [
        (
            "evict",
            {"model": "llm"},
            {"freed_bytes": 7},
            {"event": "model evicted by order", "freed_bytes": 7, "model": "llm"},
        ),
        (
            "refresh",
            {"model": "llm", "version": "v1"},
            {"state": "resident", "version": "v1"},
            {"event": "model refreshed by order", "version": "v1", "model": "llm"},
        ),
        (
            "purge",
            {},
            {"freed_bytes": 9, "models": ["a", "b"]},
            {"event": "models purged by order", "freed_bytes": 9, "models": "a b"},
        ),
    ],
)
def test_an_order_names_who_gave_it(
    lines: Lines,
    op: str,
    fields: dict[str, object],
    body: dict[str, object],
    line: dict[str, object],
):
    lines.ask(op, **fields)  # type: ignore[arg-type]
    lines.answer(op, body)
    assert lines.written == [{**line, "pid": 4711, "uid": 1000}]


def test_an_order_over_http_says_so(lines: Lines):
    lines.ask("evict", LOCAL, model="llm")
    lines.answer("evict", {"freed_bytes": 7}, LOCAL)
    assert lines.written == [
        {"event": "model evicted by order", "freed_bytes": 7, "model": "llm", "via": "http"}
    ]


def test_orders_of_two_peers_with_the_same_number_are_told_apart(lines: Lines):
    lines.audit.happened(events.Connected(OTHER, uid=0, pid=12), 1.0)
    lines.ask("evict", PEER, model="a")
    lines.ask("evict", OTHER, model="b")
    lines.answer("evict", {"freed_bytes": 1}, OTHER)
    lines.answer("evict", {"freed_bytes": 2}, PEER)
    assert [(line["model"], line["uid"]) for line in lines.written] == [("b", 0), ("a", 1000)]


def test_nothing_is_kept_of_who_has_left(lines: Lines):
    lines.ask("open", model="llm")
    lines.answer("open", GRANTED)
    lines.ask("evict", request_id=2, model="llm")
    lines.audit.happened(events.Disconnected(PEER), 3.0)
    audit = lines.audit
    assert (audit._peers, audit._leases, audit._orders) == ({}, {}, {})
