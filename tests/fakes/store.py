"""An object store in memory with a fault plan: ``{k: fault}`` is what happens on the k-th GET."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cached.core.errors import ObjectChanged, ObjectMissing, StoreError, StoreUnavailable
from cached.core.manifest import manifest_of
from cached.core.objects import Manifest, StoredObject

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cached.core.objects import ModelRef, Part
    from cached.ports import Sink

STEP = 64 << 10


class MemoryStore:
    """Objects by path; every model has the same ones.

    Args:
        objects: path → bytes.
        faults: number of the GET → the error it ends with, half-way.
        held: GETs with these numbers wait until they are cancelled.
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
        self.gets: list[Part] = []
        self.holding = threading.Event()
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._is_closed = False

    def resolve(self, ref: ModelRef, is_cancelled: Callable[[], bool] = lambda: False) -> Manifest:
        if self._is_closed or is_cancelled():
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

    def fetch(
        self, part: Part, sink: Sink, is_cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        if self._is_closed or is_cancelled():
            raise StoreUnavailable("cancelled")
        with self._lock:
            number = len(self.gets)
            self.gets.append(part)
        if number in self.held:
            self.holding.set()
            self._cancelled.wait(10)
            raise StoreError("cancelled")
        content = self.objects[part.stored.key]
        if part.stored.etag != _etag(content):
            raise ObjectChanged(f"{part.stored.key} was replaced")
        data = memoryview(content)
        fault = self.faults.get(number)
        stop = part.stop if fault is None else (sink.watermark + part.stop) // 2
        for offset in range(sink.watermark, stop, STEP):
            sink.accept(offset, data[offset : min(offset + STEP, stop)])
        if fault is not None:
            raise fault

    def cancel(self, part: Part) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self._is_closed = True
        self._cancelled.set()


def _etag(content: bytes) -> str:
    return f'"{hash(content)}"'
