"""Files of a model, mapped; and the lease that lives as long as any of the mappings.

Views are made over one ``np.frombuffer`` base per file, which holds the mapping: unmapping
under a live view would be a SIGSEGV, so nobody ever unmaps. When the last view of the last
mapping is gone, and the model is closed, the lease's socket closes.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Lease:
    """Counts who still needs the leased version; closes what keeps it when nobody does.

    Whoever makes it holds it, until ``release``.

    Args:
        close: ends the lease.
    """

    __slots__ = ("_closers", "_count", "_lock")

    def __init__(self, close: Callable[[], None]) -> None:
        self._closers = [close]
        self._count = 1
        self._lock = threading.Lock()

    def hold_for(self, owner: object) -> Callable[[], object]:
        """Hold the lease until ``owner`` is collected, or what is returned is called."""
        with self._lock:
            self._count += 1
        holding = weakref.finalize(owner, self.release)
        holding.atexit = False  # the kernel closes the socket of a process that ends
        return holding

    def add(self, close: Callable[[], None]) -> None:
        """Close something more when the lease ends."""
        self._closers.append(close)

    def release(self) -> None:
        """Give one holding back."""
        with self._lock:
            self._count -= 1
            is_last = self._count == 0
        if is_last:
            for close in self._closers:
                close()


class File:
    """One file of the model in memory.

    Attributes:
        path: below the model's directory.
        size_bytes: its length; a file of 0 bytes has no mapping.
        header_bytes: where the data of a safetensors file begins; None for another.
    """

    __slots__ = ("_base", "header_bytes", "mapping", "path", "size_bytes")

    def __init__(self, path: str, size_bytes: int, header_bytes: int | None) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.header_bytes = header_bytes
        self.mapping: mmap.mmap | None = None
        self._base: object = None

    def map(self, descriptor: int, lease: Lease) -> None:
        """Map it shared and read-only, and close the descriptor."""
        try:
            if self.size_bytes:
                self.mapping = mmap.mmap(
                    descriptor, self.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ
                )
                lease.hold_for(self.mapping)
        finally:
            os.close(descriptor)

    def view(self, start: int, stop: int) -> memoryview:
        """Return bytes ``[start, stop)``, read-only; the caller knows that they are there."""
        return memoryview(self.mapping or b"")[start:stop]

    def base(self, frombuffer: Callable[[mmap.mmap], object]) -> object:
        """Return the one array over the whole file, made by the first call."""
        if self._base is None and self.mapping is not None:
            self._base = frombuffer(self.mapping)
        return self._base

    def drop(self) -> None:
        """Let go of the mapping; views of it live on."""
        self.mapping = None
        self._base = None


def private_mapping(descriptor: int, size_bytes: int, lease: Lease) -> mmap.mmap:
    """Return a copy-on-write mapping of a complete file, and close the descriptor.

    Only of a complete file: a write to a page that is not filled yet would keep its
    neighbours' zeros in this process for ever.
    """
    try:
        mapping = mmap.mmap(
            descriptor, size_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        )
    finally:
        os.close(descriptor)
    lease.hold_for(mapping)
    return mapping
