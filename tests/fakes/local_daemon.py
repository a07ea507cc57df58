"""A real daemon in threads of this process: its socket, its segments; a store that can wait.

``ScriptedDaemon`` is the other end for what a real one never says.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from cached.adapters.checksums import Checksums
from cached.adapters.clock import SystemClock
from cached.adapters.listening_socket import listen
from cached.adapters.segments import DirectorySegments
from cached.adapters.unix_socket import UnixSocket
from cached.cancellation import NEVER
from cached.core import events
from cached.core.engine import Engine
from cached.core.header import write
from cached.core.loads import Limits
from cached.core.objects import ModelRef
from cached.core.reporting import About
from cached.core.wire import FrameBuffer, encode
from cached.daemon import Daemon, Inquiries
from cached.mailbox import Mailbox
from cached.runner import Ports, Runner
from tests.fakes.store import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from concurrent.futures import Future
    from pathlib import Path

    from cached.core.effects import Effect
    from cached.core.errors import StoreError
    from cached.core.events import Event
    from cached.core.objects import Part
    from cached.ports import Cancellation, Sink

WAIT_S = 10.0  # a wait that ends by its time-out is a failure
PAD_BYTES = (1 << 20) - 4096  # less than the first GET, header included
THREADS = 8


def weights(*tensors: tuple[str, str, list[int], bytes], **metadata: str) -> bytes:
    """Return a safetensors file: name, dtype, shape and bytes of each tensor."""
    header = write([tensor[:3] for tensor in tensors], metadata or None)
    return header + b"".join(tensor[3] for tensor in tensors)


def padded(name: str, payload: bytes) -> bytes:
    """Return a file whose first GET brings header and ``NAME.pad``, but not all of the payload.

    The payload must be longer than 4096 bytes.
    """
    pad = (f"{name}.pad", "U8", [PAD_BYTES], bytes(PAD_BYTES))
    return weights(pad, (name, "U8", [len(payload)], payload))


class GatedStore(MemoryStore):
    """Keeps back what follows the first GET of some files, until they are released.

    Args:
        objects: path → bytes.
        held: paths.
    """

    def __init__(self, objects: Mapping[str, bytes], held: Iterable[str] = ()) -> None:
        super().__init__(objects)
        self.error: StoreError | None = None
        self._closed_gates = set(held)
        self._changed = threading.Condition()

    def release(self, *paths: str, error: StoreError | None = None) -> None:
        """Let GETs go on; or end them with an error."""
        with self._changed:
            self.error = error
            self._closed_gates -= set(paths)
            self._changed.notify_all()

    def fetch(self, part: Part, sink: Sink, cancellation: Cancellation = NEVER) -> float | None:
        def may_go() -> bool:
            return part.stored.path not in self._closed_gates or cancellation.is_cancelled

        if part.start > 0:
            cancellation.attach(self._wake)
            with self._changed:
                assert self._changed.wait_for(may_go, 60)
            cancellation.detach()
            if self.error is not None and not cancellation.is_cancelled:
                raise self.error
        return super().fetch(part, sink, cancellation)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class _Memory:
    def available_bytes(self) -> int:
        return 1 << 40

    def private_bytes(self) -> int:
        return 0


class _Leavings:
    """An observer: tells when a worker has left."""

    def __init__(self) -> None:
        self.left: SimpleQueue[None] = SimpleQueue()

    def happened(self, event: Event, now_s: float) -> None:
        if isinstance(event, events.Disconnected):
            self.left.put(None)

    def decided(self, effect: Effect, now_s: float) -> None:
        pass


class LocalDaemon:
    """Serves the model ``m`` at ``address``.

    Args:
        directory: of the test; the socket and the segments lie in it.
        store: of all models.
        names: of models.
        address: of the socket.
        root: of the segments, below the directory.
    """

    def __init__(
        self,
        directory: Path,
        store: GatedStore,
        names: Iterable[str] = ("m",),
        address: str | None = None,
        root: str = "root",
    ) -> None:
        self.store: Any = store  # whichever the test has given
        self.address = address or str(directory / "cached.sock")
        self._leavings = _Leavings()
        self.mailbox = Mailbox()
        clock = SystemClock()
        self._segments = DirectorySegments(str(directory / root))
        self._workers = UnixSocket(listen(self.address), self.mailbox.lane, clock)
        self._inquiries = Inquiries(self.mailbox.lane().post, self._workers)
        ports = Ports(
            checksums=Checksums(),
            stores={"s3": store},
            segments=self._segments,
            memory=_Memory(),
            replies=self._inquiries,
            clock=clock,
        )
        about = About("0.1.0", os.getpid(), os.getuid(), self.address, clock.now_s())
        engine = Engine(
            tuple(ModelRef(name, f"s3://b/{name}/", prefetch=False) for name in names),
            budget_bytes=1 << 30,
            limits=Limits(fetch_slots=THREADS),
            about=about,
            drain_s=0.2,
        )
        daemon = Daemon(
            engine,
            Runner(ports, self.mailbox.post, lambda: 0.0),
            self.mailbox,
            observers=[self._leavings],
            clock=clock,
            fetch_threads=THREADS,
        )
        self._thread = threading.Thread(target=daemon.run, name="daemon of a test")
        self._thread.start()
        self._workers.start()

    def hang_up(self) -> None:
        """Close every connection without a word, as a daemon does that is killed."""
        self._workers.stop()

    def stop(self) -> None:
        self._workers.stop()
        self.mailbox.post(events.DrainRequested())
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._segments.close()

    def status(self, name: str = "m") -> dict[str, Any]:
        answers: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._inquiries.ask("status", {"model": name}, answers.put)
        models: list[dict[str, Any]] = answers.get(timeout=WAIT_S)["models"]
        return models[0]

    @property
    def leases(self) -> int:
        count: int = self.status()["leases"]
        return count

    def wait_for_leases(self, count: int) -> None:
        """Wait until workers have left and this many leases are there."""
        while self.leases != count:
            self._leavings.left.get(timeout=WAIT_S)


class ScriptedDaemon:
    """Says what it is told to say.

    Args:
        connected: its end; accepted or of a pair.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(WAIT_S)
        self._frames = FrameBuffer(1 << 20)

    def read(self) -> dict[str, Any]:
        """Return the next request."""
        while (frame := self._frames.next_frame()) is None:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._frames.feed(data)
        return frame

    def expect(self, op: str) -> dict[str, Any]:
        request = self.read()
        assert request["op"] == op, request
        return request

    def greet(self, **members: object) -> None:
        request = self.expect("hello")
        self.send({"id": request["id"], "protocol": [1, 0], "daemon": "0", "pid": 1, **members})

    def send(self, body: Mapping[str, object], descriptors: tuple[int, ...] = ()) -> None:
        self.send_bytes(encode(body), descriptors)

    def send_bytes(self, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
        ancillary = []
        if descriptors:
            raw = array.array("i", descriptors)
            ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, raw))
        self.socket.sendmsg([data], ancillary)

    def is_quiet(self) -> bool:
        """Return whether nothing has come that was not read."""
        return not select.select([self.socket], [], [], 0)[0]

    def is_hung_up(self) -> bool:
        """Return whether the peer has closed, once it has closed or said something."""
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()


class Calls:
    """Calls in threads of their own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(16)

    def __call__(self, call: Callable[..., Any], *arguments: Any, **members: Any) -> Future[Any]:
        return self._pool.submit(call, *arguments, **members)

    def close(self) -> None:
        self._pool.shutdown()


def open_descriptors() -> dict[str, str]:
    """Return what this process has open."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found
