"""Files of a model, mapped; and the lease that lives as long as any of the mappings.

Views are made over one ``np.frombuffer`` base per file, which holds the mapping: unmapping
under a live view would be a SIGSEGV, so nobody ever unmaps. When the last view of the last
mapping is gone, and the model is closed, the lease's socket closes.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from typing import TYPE_CHECKING

from cached.core.errors import LoadFailed, ModelClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Lease:
    """Knows who still needs the leased version; closes what keeps it when nobody does.

    It has no lock: holdings end in finalizers, which may run between any two steps of any
    thread, this one's included; and a child of fork must find it usable. Calls of the parent's
    threads, which the child does not have, hold nothing there: each holding of a call has the
    id of its process.

    Whoever makes it holds it, until ``release(None)``.

    Args:
        close: ends the lease.
    """

    __slots__ = ("_closers", "_holdings")

    def __init__(self, close: Callable[[], None]) -> None:
        self._closers = [close]
        self._holdings: set[object] = {None}

    def hold(self) -> object:
        """Hold the lease for a call in this process; return what to give to ``release``.

        Raises:
            ModelClosed: it has ended.
        """
        return self._held((os.getpid(), object()))

    def _held(self, holding: object) -> object:
        self._holdings.add(holding)
        if not self._closers:
            message = "the model is closed, and all views of it are gone"
            raise ModelClosed(message, hint="open it again with cached.open")
        return holding

    def hold_for(self, owner: object) -> Callable[[], object]:
        """Hold the lease until ``owner`` is collected, or what is returned is called."""
        return weakref.finalize(owner, self.release, self._held(object()))

    def add(self, close: Callable[[], None]) -> None:
        """Close something more when the lease ends; the caller holds it."""
        self._closers.append(close)

    def release(self, holding: object) -> None:
        """Give a holding back; again: does nothing."""
        self._holdings.discard(holding)
        while self._closers and not self._is_held():
            try:
                close = self._closers.pop()
            except IndexError:
                return  # another thread closed it
            close()

    def _is_held(self) -> bool:
        if not self._holdings:
            return False
        pid = os.getpid()
        held = list(self._holdings)  # in one step: others come and go
        return any(not isinstance(each, tuple) or each[0] == pid for each in held)


class File:
    """One file of the model in memory.

    Attributes:
        path: below the model's directory.
        size_bytes: its length; a file of 0 bytes has no mapping.
        header_bytes: where the data of a safetensors file begins; None for another.
        there: names of tensors whose bytes are known to be in this mapping.
    """

    __slots__ = ("_base", "_inode", "header_bytes", "mapping", "path", "size_bytes", "there")

    def __init__(self, path: str, size_bytes: int, header_bytes: int | None) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.header_bytes = header_bytes
        self.there: set[str] = set()
        self.mapping: mmap.mmap | None = None
        self._base: object = None
        self._inode: tuple[int, int] | None = None

    def map(self, descriptor: int, lease: Lease) -> None:
        """Map it shared and read-only, and close the descriptor."""
        try:
            if self.size_bytes:
                mapping = _mapped(descriptor, self, mmap.MAP_SHARED, mmap.PROT_READ)
                lease.hold_for(mapping)
                self._inode = _inode(descriptor)
                self.mapping = mapping
        finally:
            os.close(descriptor)

    def is_mapped_from(self, descriptor: int) -> bool:
        """Return whether the mapping is of the file that is open here."""
        return self.mapping is not None and self._inode == _inode(descriptor)

    def view(self, start: int, stop: int) -> memoryview:
        """Return bytes ``[start, stop)``, read-only; the caller knows that they are there.

        Raises:
            ModelClosed: the file was dropped.
        """
        if start == stop:
            return memoryview(b"")
        return memoryview(self._kept())[start:stop]

    def base(self, frombuffer: Callable[[mmap.mmap], object]) -> object:
        """Return the one array over the whole file, made by the first call.

        Raises:
            ModelClosed: the file was dropped.
        """
        base = self._base
        if base is None:
            base = self._base = frombuffer(self._kept())
        return base

    def _kept(self) -> mmap.mmap:
        mapping = self.mapping
        if mapping is None:
            message = f"the model is closed: {self.path} is not mapped any more"
            raise ModelClosed(message, hint="take what you need before close(): views stay valid")
        return mapping

    def drop(self) -> None:
        """Let go of the mapping; views of it live on."""
        self.mapping = None
        self._base = None


def _inode(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def private_mapping(descriptor: int, file: File, lease: Lease) -> mmap.mmap:
    """Return a copy-on-write mapping of a complete file, and close the descriptor.

    Only of a complete file: a write to a page that is not filled yet would keep its
    neighbours' zeros in this process for ever.
    """
    try:
        mapping = _mapped(descriptor, file, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
    lease.hold_for(mapping)
    return mapping


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that nobody needs."""
    for descriptor in descriptors:
        os.close(descriptor)


def _mapped(descriptor: int, file: File, flags: int, protection: int) -> mmap.mmap:
    try:
        if sys.version_info >= (3, 13):  # older ones keep a descriptor open for each mapping
            return mmap.mmap(descriptor, file.size_bytes, flags, protection, trackfd=False)
        return mmap.mmap(descriptor, file.size_bytes, flags, protection)
    except (OSError, ValueError) as error:
        message = f"cannot map {file.path} ({file.size_bytes} bytes): {error}"
        hint = "raise the limits of this process: ulimit -v, ulimit -n"
        raise LoadFailed(message, hint=hint) from error
