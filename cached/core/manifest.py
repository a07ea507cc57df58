"""Which objects make a version of a model, and where each lies in its directory.

Keys come from a bucket and are not trusted: only what ``layout_path`` lets through ever
becomes a path.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from cached.core.errors import ObjectMissing, ObjectRefused
from cached.core.objects import Manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cached.core.objects import StoredObject

MAX_PATH_BYTES = 1024  # S3's limit for a key; leaves room for a root below PATH_MAX (4096)
MAX_NAME_BYTES = 255  # NAME_MAX of Linux
VERSION_DIGITS = 16  # 64 bits: two versions of one model never meet
_RENAME = "rename the object, or name a prefix that does not hold it"


def layout_path(key: str, prefix: str) -> str:
    """Return where an object lies in the directory of its model: relative, with ``/``.

    Args:
        key: of the object.
        prefix: what the model's URI names: empty, or ending in ``/``; it is cut off.

    Raises:
        ObjectRefused: the rest would not be a file below that directory on every system.
    """
    if not key.startswith(prefix):
        message = f"key {_shown(key)} does not start with {_shown(prefix)}"
        raise ObjectRefused(message)
    path = key[len(prefix) :]
    reason = _fault(path)
    if reason:
        message = f"key {_shown(key)} cannot be a file name: {reason}"
        raise ObjectRefused(message, hint=_RENAME)
    return path


def _fault(path: str) -> str | None:
    """Return what makes a path unusable; ``None`` if nothing does."""
    if not path:
        return "nothing is left after the prefix"
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "it is not UTF-8"
    if len(encoded) > MAX_PATH_BYTES:
        return f"it has {len(encoded)} bytes after the prefix, the limit is {MAX_PATH_BYTES}"
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in path):
        return "it holds a control character"
    return _segment_fault(encoded.split(b"/"))


def _segment_fault(segments: Sequence[bytes]) -> str | None:
    for segment in segments:
        if not segment:
            return "a segment is empty (a '/' at an end, or '//')"
        if segment in {b".", b".."}:
            return f"{segment.decode()!r} is a segment of it"
        if len(segment) > MAX_NAME_BYTES:
            return f"a segment has {len(segment)} bytes, the limit is {MAX_NAME_BYTES}"
    return None


def version_of(uri: str, objects: Iterable[StoredObject]) -> str:
    """Return the id of a version: equal for equal objects at one URI, in any order."""
    facts = sorted(
        (stored.path, stored.size_bytes, stored.etag, stored.version_id or "") for stored in objects
    )
    digest = hashlib.sha256(json.dumps([uri, facts]).encode())
    return digest.hexdigest()[:VERSION_DIGITS]


def manifest_of(uri: str, objects: Iterable[StoredObject]) -> Manifest:
    """Return the manifest of what the store listed, sorted by path.

    Raises:
        ObjectMissing: there are no objects.
        ObjectRefused: a path is not safe, is there twice, or is the directory of another.
    """
    ordered = tuple(sorted(objects, key=lambda stored: stored.path))
    if not ordered:
        message = f"no objects at {uri}"
        hint = "check bucket and prefix, and that the model was uploaded"
        raise ObjectMissing(message, hint=hint)
    _check_paths([stored.path for stored in ordered])
    return Manifest(uri, version_of(uri, ordered), ordered)


def _check_paths(paths: Sequence[str]) -> None:
    files = set()
    directories: set[str] = set()
    for path in paths:
        layout_path(path, "")
        if path in files:
            message = f"two objects would be the file {_shown(path)}"
            raise ObjectRefused(message, hint=_RENAME)
        files.add(path)
        parent = path.rpartition("/")[0]
        while parent and parent not in directories:
            directories.add(parent)
            parent = parent.rpartition("/")[0]
    for path in files & directories:
        message = f"{_shown(path)} would be a file and a directory"
        raise ObjectRefused(message, hint=_RENAME)


def _shown(text: str) -> str:
    shown = ascii(text) if not text.isprintable() else repr(text)
    return shown if len(shown) <= 200 else f"{shown[:197]}..."
