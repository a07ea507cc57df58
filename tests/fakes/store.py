"""An object store in memory with a fault plan: ``{k: fault}`` is what happens on the k-th GET."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cached.cancellation import NEVER
from cached.core.errors import (
    ObjectChanged,
    ObjectMissing,
    ObjectRefused,
    StoreError,
    StoreUnavailable,
)
from cached.core.manifest import manifest_of
from cached.core.objects import Manifest, ObjectFacts, StoredObject

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cached.core.objects import ModelRef, Part
    from cached.ports import Cancellation, Sink

STEP = 64 << 10


class MemoryStore:
    """Objects by path; every model has the same ones.

    Args:
        objects: path → bytes.
        faults: number of the GET → the error it ends with, half-way.
        held: GETs with these numbers wait until they are cancelled.

    Attributes:
        facts: what ``describe`` tells, by path.
    """

    def __init__(
        self,
        objects: Mapping[str, bytes],
        *,
        faults: Mapping[int, StoreError] | None = None,
        held: frozenset[int] = frozenset(),
    ) -> None:
        self.objects = dict(objects)
        self.faults = dict(faults or {})
        self.held = held
        self.facts: dict[str, ObjectFacts] = {}
        self.gets: list[Part] = []
        self.holding = threading.Event()
        self._lock = threading.Lock()
        self._held: list[threading.Event] = []
        self._is_closed = False

    def resolve(self, ref: ModelRef, cancellation: Cancellation = NEVER) -> Manifest:
        if self._is_closed or cancellation.is_cancelled:
            raise StoreUnavailable("closed")
        if not self.objects:
            raise ObjectMissing(f"{ref.uri} holds no objects")
        return manifest_of(
            ref.uri,
            [
                StoredObject(key=path, path=path, size_bytes=len(data), etag=_etag(data))
                for path, data in self.objects.items()
            ],
        )

    def describe(
        self, uri: str, stored: StoredObject, cancellation: Cancellation = NEVER
    ) -> ObjectFacts:
        self._pinned(stored)
        return self.facts.get(stored.path, ObjectFacts())

    def read(
        self, uri: str, stored: StoredObject, cancellation: Cancellation, most_bytes: int
    ) -> bytes:
        if stored.size_bytes > most_bytes:
            raise ObjectRefused("too long")
        return self._pinned(stored)

    def _pinned(self, stored: StoredObject) -> bytes:
        content = self.objects[stored.key]
        if stored.etag != _etag(content):
            raise ObjectChanged(f"{stored.key} was replaced")
        return content

    def fetch(self, part: Part, sink: Sink, cancellation: Cancellation = NEVER) -> float | None:
        if self._is_closed or cancellation.is_cancelled:
            raise StoreUnavailable("cancelled")
        with self._lock:
            number = len(self.gets)
            self.gets.append(part)
        if number in self.held:
            self._hold(cancellation)
        data = memoryview(self._pinned(part.stored))
        fault = self.faults.get(number)
        stop = part.stop if fault is None else (sink.watermark + part.stop) // 2
        for offset in range(sink.watermark, stop, STEP):
            sink.accept(offset, data[offset : min(offset + STEP, stop)])
        if fault is not None:
            raise fault
        return None

    def _hold(self, cancellation: Cancellation) -> None:
        cut = threading.Event()
        with self._lock:
            self._held.append(cut)
        cancellation.attach(cut.set)
        self.holding.set()
        cut.wait(10)
        cancellation.detach()
        raise StoreError("cancelled")

    def close(self) -> None:
        self._is_closed = True
        for cut in self._held:
            cut.set()


def _etag(content: bytes) -> str:
    return f'"{hash(content)}"'
