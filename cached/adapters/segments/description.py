"""What is told about a version to the next daemon: what it is, and which bytes of it are there.

Two files beside each version, never in its directory, which is as its author laid it out:

- a description, JSON: layout version, boot_id, name, version, uri, and the objects' fields;
- a map, one byte per MiB of each file in the order of the objects: 1 once that MiB is there.

Whatever is read here may have been written by anybody or cut anywhere, and is not believed.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cached.adapters.segments.homes import check_names
from cached.core.errors import ObjectRefused
from cached.core.objects import Manifest, Range, StoredObject, VersionRef

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYOUT: Final = 1  # of the description, the map and the root; another one is not read
MARK_BYTES: Final = 1 << 20
MAX_BYTES: Final = 1 << 26  # some 200,000 objects
MAX_SIZE: Final = 1 << 62  # of one file; what the kernel takes is 2^63 - 1
_TEXTS: Final = ("key", "path", "etag")
_OPTIONAL: Final = ("version_id", "checksum")


class Description(NamedTuple):
    """What a description says.

    Attributes:
        of: its ``load`` is 0.
        boot_id: of the machine's start during which it was written.
    """

    of: VersionRef
    manifest: Manifest
    boot_id: str


def encode(of: VersionRef, manifest: Manifest, boot_id: str) -> bytes:
    """Return the description of a version."""
    told = {
        "layout": LAYOUT,
        "boot_id": boot_id,
        "name": of.name,
        "version": of.version,
        "uri": manifest.uri,
        "objects": [stored._asdict() for stored in manifest.objects],
    }
    return json.dumps(told).encode()


def parse(data: bytes) -> Description:
    """Return what a description says, every name and number checked.

    Raises:
        ValueError: it is broken, of another layout, or names what cannot be.
    """
    try:
        told = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(told, dict) or told.get("layout") != LAYOUT:
        raise ValueError("not a description of this layout")
    name, version, uri, boot_id = (
        _text(told, key) for key in ("name", "version", "uri", "boot_id")
    )
    listed = told.get("objects")
    if not isinstance(listed, list) or not listed:
        raise ValueError("no objects")
    objects = tuple(_stored(one) for one in listed)
    if len({stored.path for stored in objects}) < len(objects):
        raise ValueError("a path is there twice")
    of = VersionRef(name, version)
    manifest = Manifest(uri, version, objects)
    try:
        check_names(of, manifest)
    except ObjectRefused as error:
        raise ValueError(str(error)) from error
    return Description(of, manifest, boot_id)


def _stored(told: Any) -> StoredObject:
    if not isinstance(told, dict):
        raise ValueError("an object that is none")  # noqa: TRY004 - one error for all that is broken
    key, path, etag = (_text(told, field) for field in _TEXTS)
    version_id, checksum = (
        None if told.get(field) is None else _text(told, field) for field in _OPTIONAL
    )
    size_bytes = told.get("size_bytes")
    if type(size_bytes) is not int or not 0 <= size_bytes <= MAX_SIZE:
        raise ValueError("no size")
    return StoredObject(key, path, size_bytes, etag, version_id, checksum)


def _text(told: dict[str, Any], field: str) -> str:
    value = told.get(field)
    if not isinstance(value, str):
        message = f"{field} is no text"
        raise ValueError(message)  # noqa: TRY004 - one error for all that is broken
    value.encode()  # a lone surrogate is a ValueError
    return value


def boot_id() -> str:
    """Return what tells this start of the machine from others; empty: nobody says."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def marks_of(size_bytes: int) -> int:
    """Return how many bytes of the map a file has."""
    return -(-size_bytes // MARK_BYTES)


def ranges(marks: bytes, manifest: Manifest) -> list[list[Range]]:
    """Return which bytes of each file a map says are there.

    Raises:
        ValueError: it has not the length that it must have.
    """
    sizes = [stored.size_bytes for stored in manifest.objects]
    needed = sum(map(marks_of, sizes))
    if len(marks) != needed:
        message = f"the map has {len(marks)} bytes, must have {needed}"
        raise ValueError(message)
    found = []
    first = 0
    for size_bytes in sizes:
        count = marks_of(size_bytes)
        found.append(_runs(marks[first : first + count], size_bytes))
        first += count
    return found


def _runs(marks: bytes, size_bytes: int) -> list[Range]:
    runs = []
    start = marks.find(1)
    while start >= 0:
        stop = start + 1
        while stop < len(marks) and marks[stop] == 1:
            stop += 1
        runs.append(Range(start * MARK_BYTES, min(stop * MARK_BYTES, size_bytes)))
        start = marks.find(1, stop)
    return runs


class Marks:
    """The map of a version that is being filled.

    Args:
        fd: of the map, to read and write; this closes it.
        sizes: of the files, in bytes.
    """

    __slots__ = ("_fd", "_firsts", "_lock", "_sizes")

    def __init__(self, fd: int, sizes: Sequence[int]) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._sizes = sizes
        self._firsts = [0]
        for size_bytes in sizes:
            self._firsts.append(self._firsts[-1] + marks_of(size_bytes))

    def mark(self, index: int, there: Range) -> None:
        """Mark every MiB of a file that lies wholly in what is there. Any thread.

        What cannot be marked is fetched again by the next daemon.
        """
        first = -(-there.start // MARK_BYTES)
        is_end = there.stop == self._sizes[index]
        last = marks_of(there.stop) if is_end else there.stop // MARK_BYTES
        with self._lock:
            if first >= last or self._fd < 0:
                return
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, b"\1" * (last - first), self._firsts[index] + first)

    def unmark(self, index: int, start: int, stop: int) -> None:
        """Take out every MiB of a file of which a byte in ``[start, stop)`` may change. Any thread.

        Raises:
            OSError: of the system. The marks may be there still.
        """
        at = self._firsts[index] + start // MARK_BYTES
        count = self._firsts[index] + marks_of(stop) - at
        with self._lock:
            if self._fd >= 0 and any(os.pread(self._fd, count, at)):
                os.pwrite(self._fd, bytes(count), at)

    def close(self) -> None:
        """Write no more; waits for what is being written."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
