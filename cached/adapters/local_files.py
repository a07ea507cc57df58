"""Models on a local file system (``file://``): the ``ObjectStore`` port over a directory or a file.

The ETag is made of inode, size and change time, so that a file that is replaced or written
while it is read is noticed.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Final

from cached.cancellation import NEVER
from cached.core.errors import (
    AccessDenied,
    BadReply,
    ObjectChanged,
    ObjectMissing,
    ObjectRefused,
    StoreError,
    StoreUnavailable,
)
from cached.core.manifest import layout_path, manifest_of
from cached.core.objects import Manifest, ObjectFacts, StoredObject

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cached.core.objects import ModelRef, Part
    from cached.ports import Cancellation, Sink

BUFFER_BYTES: Final = 1 << 20
SCHEME: Final = "file://"


class LocalFiles:
    """The ``ObjectStore`` port. Holds nothing open between calls."""

    def __init__(self) -> None:
        self._is_closed = False

    def resolve(self, ref: ModelRef, cancellation: Cancellation = NEVER) -> Manifest:
        """List a directory with all below it, or take one file.

        Symbolic links to files are followed as long as they stay below the directory.

        Raises:
            ObjectMissing: nothing is there.
            ObjectRefused: a link leads out or to a directory, or a name cannot be laid out.
            AccessDenied: this user may not read it.
        """
        place = _place(ref.uri)
        try:
            if os.path.isdir(place):
                root = os.path.realpath(place)
                found = [_stored(path, layout_path(path, f"{root}/")) for path in _walk(root)]
            else:
                found = [_stored(place, layout_path(os.path.basename(place.rstrip("/")), ""))]
        except OSError as error:
            raise _translated(error, place) from error
        return manifest_of(ref.uri, found)

    def describe(
        self, uri: str, stored: StoredObject, cancellation: Cancellation = NEVER
    ) -> ObjectFacts:
        """Return that a file system tells nothing more of a file."""
        return ObjectFacts()

    def read(
        self, uri: str, stored: StoredObject, cancellation: Cancellation, most_bytes: int
    ) -> bytes:
        """Return a small file whole.

        Raises:
            ObjectRefused: it is longer than ``most_bytes``.
            ObjectChanged: the file is not the one of the manifest any more.
            StoreError: it cannot be read.
        """
        if stored.size_bytes > most_bytes:
            message = f"{stored.key} has {stored.size_bytes} bytes, the limit is {most_bytes}"
            raise ObjectRefused(message, hint="look at what it holds")
        with _opened(stored.key) as descriptor:
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                body = file.read(stored.size_bytes)
            _check_same(descriptor, stored)
        return body

    def put(self, uri: str, body: bytes) -> None:
        """Make or replace one file; whoever opens it has the old one or the new one, whole.

        Raises:
            StoreError: it cannot be written.
        """
        path = _place(uri)
        fresh = f"{path}.{os.getpid()}.new"
        try:
            with open(fresh, "wb") as file:
                file.write(body)
            os.replace(fresh, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise _translated(error, path, "write") from error

    def fetch(self, part: Part, sink: Sink, cancellation: Cancellation = NEVER) -> float | None:
        """Copy ``[sink.watermark, part.stop)`` of a file into the sink.

        Raises:
            ObjectChanged: the file is not the one of the manifest any more.
            StoreError: it cannot be read, or was cancelled.
        """
        with _opened(part.stored.key) as descriptor:
            self._copy(descriptor, part, sink, cancellation)
        return None

    def _copy(self, descriptor: int, part: Part, sink: Sink, cancellation: Cancellation) -> None:
        stored = part.stored
        _check_same(descriptor, stored)
        buffer = memoryview(bytearray(min(BUFFER_BYTES, part.stop - part.start)))
        while (at := sink.watermark) < part.stop:
            if self._is_closed or cancellation.is_cancelled:
                message = f"reading {stored.key} was cancelled"
                raise StoreUnavailable(message)
            count = os.preadv(descriptor, [buffer[: part.stop - at]], at)
            if not count:
                _check_same(descriptor, stored)
                message = f"{stored.key} ended at byte {at}, {part.stop} were expected"
                raise BadReply(message)
            sink.accept(at, buffer[:count])
        _check_same(descriptor, stored)

    def close(self) -> None:
        """Cut whatever runs; nothing is open."""
        self._is_closed = True


def _place(uri: str) -> str:
    path = uri.removeprefix(SCHEME).removeprefix("localhost")
    if not path.startswith("/"):
        message = f"{uri} is not absolute"
        raise ObjectMissing(
            message, hint="write file:///directory/ or file:///path/model.safetensors"
        )
    return path


def _walk(root: str) -> Iterator[str]:
    for directory, folders, names in os.walk(root, onerror=_raise):
        folders.sort()
        for name in folders:
            path = f"{directory}/{name}"
            if os.path.islink(path):
                message = f"{path} is a link to a directory"
                raise ObjectRefused(message, hint="copy the directory, or name it in the URI")
        for name in sorted(names):
            path = f"{directory}/{name}"
            target = os.path.realpath(path)
            if not target.startswith(f"{root.rstrip('/')}/"):
                message = f"{path} is a link out of the directory, to {target}"
                raise ObjectRefused(message, hint="copy the file, or name the directory it is in")
            yield path


def _raise(error: OSError) -> None:
    raise error


def _stored(path: str, layout: str) -> StoredObject:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        message = f"{path} is not a regular file"
        raise ObjectRefused(message, hint="only files and directories of files can be served")
    return StoredObject(key=path, path=layout, size_bytes=status.st_size, etag=_etag(status))


def _etag(status: os.stat_result) -> str:
    return f'"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"'


def _check_same(descriptor: int, stored: StoredObject) -> None:
    if _etag(os.fstat(descriptor)) != stored.etag:
        message = f"{stored.key} was replaced or written while it was read"
        raise ObjectChanged(message)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """Open a file for the time of a ``with`` block; what goes wrong in it is translated."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _translated(error, path) from error


def _translated(error: OSError, path: str, verb: str = "read") -> StoreError:
    message = f"cannot {verb} {path}: {error.strerror}"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ObjectMissing(message, hint="check the path in the model's URI")
    if isinstance(error, PermissionError):
        return AccessDenied(message, hint=f"let this user {verb} it")
    return StoreUnavailable(message)
