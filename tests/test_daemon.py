"""The daemon's threads around the engine: real segments, a store in memory, workers as a queue."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

import pytest

from cached.adapters.checksums import Checksums
from cached.adapters.clock import SystemClock
from cached.adapters.segments import DirectorySegments
from cached.core import effects, events
from cached.core.engine import Engine
from cached.core.errors import BadReply, StoreUnavailable
from cached.core.header import write
from cached.core.loads import Limits
from cached.core.objects import ModelRef, PeerId
from cached.core.reporting import About
from cached.daemon import Daemon, Inquiries, drain_on_signals
from cached.mailbox import Mailbox
from cached.runner import Ports, Runner
from tests.fakes.store import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cached.core.effects import Effect, Reply
    from cached.core.events import Event

THREADS = 3
PAYLOAD = os.urandom(3 << 20)
TENSORS = write([("a", "U8", (len(PAYLOAD),))]) + PAYLOAD
OBJECTS = {"model.safetensors": TENSORS, "config.json": b"{}", "empty.txt": b""}


class Workers:
    """The ``Replies`` port as a queue."""

    def __init__(self) -> None:
        self.replies: SimpleQueue[tuple[Reply, list[bytes]]] = SimpleQueue()

    def send(self, reply: Reply, descriptors: tuple[int, ...]) -> None:
        contents = []
        for descriptor in descriptors:
            contents.append(os.pread(descriptor, 1 << 30, 0))
            os.close(descriptor)
        self.replies.put((reply, contents))


class Memory:
    def available_bytes(self) -> int:
        return 1 << 40

    def private_bytes(self) -> int:
        return 0


class Notes:
    """An observer that keeps all it sees."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.effects: list[Effect] = []

    def happened(self, event: Event, now_s: float) -> None:
        self.events.append(event)

    def decided(self, effect: Effect, now_s: float) -> None:
        self.effects.append(effect)


class Running:
    """A daemon in a thread, and how to talk to it."""

    def __init__(self, root: Path, store: MemoryStore, *, prefetch: bool) -> None:
        self.store, self.workers, self.notes = store, Workers(), Notes()
        self.mailbox = Mailbox()
        clock = SystemClock()
        self.segments = DirectorySegments(str(root))
        self.inquiries = Inquiries(self.mailbox.post, self.workers)
        ports = Ports(
            checksums=Checksums(),
            stores={"s3": store},
            segments=self.segments,
            memory=Memory(),
            replies=self.inquiries,
            clock=clock,
        )
        engine = Engine(
            (ModelRef("m", "s3://b/m/", prefetch),),
            budget_bytes=1 << 30,
            limits=Limits(fetch_slots=THREADS),
            about=About("0", os.getpid(), os.getuid(), "", clock.now_s()),
            drain_s=2.0,
        )
        self.daemon = Daemon(
            engine,
            Runner(ports, self.mailbox.post, lambda: 0.0),
            self.mailbox,
            observers=[self.notes],
            clock=clock,
            fetch_threads=THREADS,
        )
        self.thread = threading.Thread(target=self.daemon.run)
        self.thread.start()

    def stop(self) -> None:
        self.mailbox.post(events.DrainRequested())
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.segments.close()

    def ask(self, request_id: int, op: str, **fields: object) -> None:
        self.mailbox.post(events.Requested(PeerId(1), request_id, op, fields))

    def answer(self) -> tuple[Reply, list[bytes]]:
        return self.workers.replies.get(timeout=10)

    def open(self, **fields: object) -> tuple[Reply, list[bytes]]:
        self.mailbox.post(events.Connected(PeerId(1), os.getuid(), os.getpid()))
        self.ask(1, "hello", protocol=[1, 0])
        self.answer()
        self.ask(2, "open", model="m", **fields)
        return self.answer()


@pytest.fixture
def running(tmp_path, request) -> Iterator[Running]:
    store, prefetch = getattr(request, "param", (MemoryStore(OBJECTS), False))
    daemon = Running(tmp_path / "root", store, prefetch=prefetch)
    with contextlib.closing(daemon_stop(daemon)):
        yield daemon


class daemon_stop:  # noqa: N801 - used like contextlib.closing
    def __init__(self, daemon: Running) -> None:
        self.close = daemon.stop


def test_an_opened_model_has_the_bytes_of_the_store(running):
    reply, contents = running.open(until="ready")

    assert reply.body["complete"] is True
    files = [file["path"] for file in reply.body["files"]]
    assert dict(zip(files, contents, strict=True)) == OBJECTS


@pytest.mark.parametrize(
    "running",
    [(MemoryStore(OBJECTS, faults={0: BadReply("cut"), 3: StoreUnavailable("503")}), False)],
    indirect=True,
    ids=["cut"],
)
def test_cut_gets_go_on_where_they_stopped(running):
    reply, contents = running.open(until="ready")

    assert contents[-1] == TENSORS
    first, *rest = [part for part in running.store.gets if part.stored.path.endswith("tensors")]
    assert rest[0].start == (first.start + first.stop) // 2 or len(rest) > 1
    assert reply.body["complete"] is True


@pytest.mark.parametrize(
    "running", [(MemoryStore({"x.safetensors": b"\xff" * 100}), False)], indirect=True, ids=["bad"]
)
def test_a_file_that_is_not_safetensors_fails_the_load_and_names_it(running):
    reply, _ = running.open()

    error = reply.body["error"]
    assert error["code"] == "load_failed"
    assert "x.safetensors" in error["message"]


@pytest.mark.parametrize("running", [(MemoryStore(OBJECTS), True)], indirect=True, ids=["prefetch"])
def test_the_daemons_own_threads_can_ask(running):
    running.open(until="ready")
    answers: SimpleQueue[dict[str, object]] = SimpleQueue()

    running.inquiries.ask("status", {}, answers.put)
    body = answers.get(timeout=10)

    assert body["ready"] is True
    models = body["models"]
    assert isinstance(models, list)
    assert models[0]["state"] == "resident"


@pytest.mark.parametrize(
    "running",
    [(MemoryStore(OBJECTS, held=frozenset({0, 1, 2})), True)],
    indirect=True,
    ids=["held"],
)
def test_a_drain_cuts_gets_that_hang(running):
    assert running.store.holding.wait(10)

    running.mailbox.post(events.DrainRequested())
    running.thread.join(10)

    assert not running.thread.is_alive()


def test_observers_see_events_and_effects(running):
    running.open()

    assert any(isinstance(event, events.Resolved) for event in running.notes.events)
    assert any(isinstance(effect, effects.FetchPart) for effect in running.notes.effects)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def test_signals_ask_for_a_drain_and_their_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    mailbox = Mailbox()
    restore = drain_on_signals(mailbox.post)
    for number in (*SIGNALS, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_DFL:
            signal.raise_signal(number)
    is_interruptible = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    restore()

    assert [mailbox.take(0.0) for _ in range(6)] == [events.DrainRequested()] * 5 + [None]
    assert is_interruptible  # a third Ctrl-C ends it as it stands
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    restore = drain_on_signals(Mailbox().post)
    found = signal.getsignal(signal.SIGHUP)
    restore()
    signal.signal(signal.SIGHUP, before)

    assert found == signal.SIG_IGN
