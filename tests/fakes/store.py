"""An object store in memory with a fault plan: ``{k: fault}`` is what happens on the k-th GET."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cached.core.errors import ObjectMissing, StoreError
from cached.core.manifest import manifest_of
from cached.core.objects import Manifest, StoredObject

if TYPE_CHECKING:
    from collections.abc import Mapping

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

    def resolve(self, ref: ModelRef) -> Manifest:
        if not self.objects:
            raise ObjectMissing(f"{ref.uri} holds no objects")
        return manifest_of(
            ref.uri,
            [
                StoredObject(key=path, path=path, size_bytes=len(data), etag=f'"{hash(data)}"')
                for path, data in self.objects.items()
            ],
        )

    def fetch(self, part: Part, sink: Sink) -> None:
        with self._lock:
            number = len(self.gets)
            self.gets.append(part)
        if number in self.held:
            self.holding.set()
            self._cancelled.wait(10)
            raise StoreError("cancelled")
        data = memoryview(self.objects[part.stored.key])
        fault = self.faults.get(number)
        stop = part.stop if fault is None else (sink.watermark + part.stop) // 2
        for offset in range(sink.watermark, stop, STEP):
            sink.accept(offset, data[offset : min(offset + STEP, stop)])
        if fault is not None:
            raise fault

    def cancel(self, part: Part) -> None:
        self._cancelled.set()

    def close(self) -> None:
        pass
