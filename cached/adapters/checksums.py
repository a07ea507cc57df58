"""Checksums of bytes that pass, or that are read back through a descriptor (port ``Checksums``).

CRC64NVME and CRC32C need awscrt, which is imported when the first of them is computed; the rest is
in the standard library. What is read back goes into one small buffer per thread: mapping it costs
more (docs/decisions/007-read-back-through-a-small-buffer.md).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
import zlib
from typing import TYPE_CHECKING, Final

from cached.core.errors import LoadFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from hashlib import _Hash

    from cached.core.objects import FileRef, VersionRef

BUFFER_BYTES: Final = 128 << 10  # stays in the L2 cache between the read and the sum
_OF_AWSCRT: Final = frozenset({"crc64nvme", "crc32c"})
_BUILT_IN: Final = frozenset({"crc32", "sha256", "sha1"})
_FOREIGN: Final = "see whether something else writes to the segment root"
_SIZES: Final = {"crc64nvme": 8, "crc32c": 4, "crc32": 4}


class Crc:
    """A CRC of bytes in order, used like one of hashlib's.

    Raises:
        LoadFailed: awscrt cannot be used.
    """

    __slots__ = ("_size_bytes", "_update", "_value")

    def __init__(self, algorithm: str) -> None:
        self._size_bytes = _SIZES[algorithm]
        self._update = _crc(algorithm)
        self._value = 0

    def update(self, view: memoryview) -> None:
        """Take the bytes that come next."""
        self._value = self._update(view, self._value)

    def digest(self) -> bytes:
        """Return the CRC of what came, big-endian."""
        return self._value.to_bytes(self._size_bytes)


class Checksums:
    """Computes them; any thread, several at a time.

    Attributes:
        can: algorithms that this host computes.
    """

    def __init__(self) -> None:
        self.can = _BUILT_IN | _offered_by_awscrt()
        self._lock = threading.Lock()
        self._running: dict[FileRef, _Hash] = {}
        self._buffers = threading.local()

    def summing(self, algorithm: str) -> Crc:
        """Return a CRC of no bytes.

        Args:
            algorithm: a CRC of ``can``.

        Raises:
            LoadFailed: awscrt cannot be used.
        """
        return Crc(algorithm)

    def of_range(self, algorithm: str, fd: int, start: int, stop: int) -> bytes:
        """Return the checksum of bytes ``[start, stop)`` of a file, big-endian.

        Args:
            algorithm: one of ``can``.
            fd: of the file, to read; not closed.
            start: first byte.
            stop: one past the last.

        Raises:
            LoadFailed: the file ends before, cannot be read, or awscrt cannot be used.
        """
        summing: Crc | _Hash = (
            Crc(algorithm) if algorithm in _SIZES else hashlib.new(algorithm, usedforsecurity=False)
        )
        for piece in self._pieces(fd, start, stop):
            summing.update(piece)
        return summing.digest()

    def extend(self, file: FileRef, algorithm: str, fd: int, start: int, stop: int) -> bytes:
        """Return the SHA of all bytes below ``stop``, going on from where the last call ended.

        Args:
            file: whose sum it is; one call at a time for each.
            algorithm: ``sha256`` or ``sha1``.
            fd: of the file, to read; not closed.
            start: where the last call for this file ended; 0 begins anew.
            stop: one past the last byte.

        Raises:
            LoadFailed: the file ends before, or cannot be read; the same call may come again.
        """
        with self._lock:
            if not start:
                self._running[file] = hashlib.new(algorithm, usedforsecurity=False)
            before = self._running[file]
        digest = before.copy()  # so that a call that fails half-way changes nothing
        for piece in self._pieces(fd, start, stop):
            digest.update(piece)
        with self._lock:
            if self._running.get(file) is before:  # else it was forgotten meanwhile
                self._running[file] = digest
        return digest.digest()

    def forget(self, of: VersionRef) -> None:
        """Drop what ``extend`` keeps of a version's files."""
        with self._lock:
            for file in [file for file in self._running if file.of == of]:
                del self._running[file]

    def _pieces(self, fd: int, start: int, stop: int) -> Iterator[memoryview]:
        buffer = getattr(self._buffers, "view", None)
        if buffer is None:
            buffer = self._buffers.view = memoryview(bytearray(BUFFER_BYTES))
        while start < stop:
            try:
                got_bytes = os.preadv(fd, [buffer[: stop - start]], start)
            except OSError as error:
                message = f"cannot read byte {start} back: {error.strerror}"
                raise LoadFailed(message, hint=_FOREIGN) from error
            if not got_bytes:
                message = f"the file ends at byte {start}, {stop} were to be summed"
                raise LoadFailed(message, hint=_FOREIGN)
            start += got_bytes
            yield buffer[:got_bytes]


def _offered_by_awscrt() -> frozenset[str]:
    """Return what the installed awscrt has functions for; importing it would cost 30 ms.

    Old ones, which some platforms bring along unasked, have no CRC64NVME:
    github.com/boto/botocore/pull/3370.
    """
    spec = importlib.util.find_spec("awscrt")
    if spec is None or spec.origin is None:
        return frozenset()
    try:
        with open(os.path.join(os.path.dirname(spec.origin), "checksums.py"), "rb") as file:
            source = file.read()
    except OSError:
        return frozenset()
    return frozenset(name for name in _OF_AWSCRT if f"\ndef {name}(".encode() in source)


def _crc(algorithm: str) -> Callable[[memoryview, int], int]:
    if algorithm == "crc32":
        return zlib.crc32
    try:
        from awscrt import checksums  # 30 ms: only when it is needed
    except ImportError as error:  # its compiled part does not fit this Python or C library
        message = f"awscrt is installed and cannot be imported: {error}"
        raise LoadFailed(message, hint="install it again, or remove it") from error
    found: Callable[[memoryview, int], int] = getattr(checksums, algorithm)
    return found
