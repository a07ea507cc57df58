"""Which back end holds the segments: as the operator says, or as the root's file system allows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from cached.adapters.segments.directory import DirectorySegments
from cached.adapters.segments.memfd import MemfdSegments
from cached.core.errors import InvalidConfig

if TYPE_CHECKING:
    from cached.adapters.segments.store import Segments

KINDS: Final = ("auto", "tmpfs", "memfd", "file")


def open_segments(kind: str, root: str, *, dir_mode: int = 0o750) -> Segments:
    """Return the store of segments; the caller closes it.

    Args:
        kind: ``tmpfs``: files on a tmpfs. ``file``: files on a disk. ``memfd``: sealed memory, with
            links to it in the root. ``auto``: ``tmpfs`` if the root can be written and lies on one,
            else ``memfd``.
        root: its directory; made if it is not there.
        dir_mode: of the directories that workers pass.

    Raises:
        InvalidConfig: there is no such kind, it is not possible here, or the root cannot be had.
    """
    if kind not in KINDS:
        message = f"segments must be one of {', '.join(KINDS)}, was {kind!r}"
        raise InvalidConfig(message)
    place = _existing(root)
    is_tmpfs = file_system(place) == "tmpfs"
    if kind == "auto":
        kind = "tmpfs" if is_tmpfs and os.access(place, os.W_OK | os.X_OK) else "memfd"
    if kind == "memfd":
        return MemfdSegments(root, dir_mode=dir_mode)
    if kind == "tmpfs" and not is_tmpfs:
        message = f"segments cannot be on a tmpfs: {root} lies on {file_system(place) or 'none'}"
        hint = "name a directory on a tmpfs with --segment-root, or choose memfd or file"
        raise InvalidConfig(message, hint=hint)
    if kind == "file" and is_tmpfs:
        message = f"segments cannot be on a disk: {root} lies on a tmpfs"
        hint = "name a directory on a disk with --segment-root, or choose tmpfs"
        raise InvalidConfig(message, hint=hint)
    return DirectorySegments(root, dir_mode=dir_mode, kind=kind)


def _existing(path: str) -> str:
    """Return the nearest directory that is there, from a path upwards."""
    path = os.path.abspath(path)
    while not os.path.isdir(path) and path != "/":
        path = os.path.dirname(path)
    return path


def file_system(path: str, mounts: str = "/proc/self/mountinfo") -> str:
    """Return the type of the file system that a path lies on; empty if it is not known.

    Args:
        path: exists.
        mounts: a table as in proc_pid_mountinfo(5).
    """
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open(mounts, encoding="utf-8", errors="replace") as file:
            lines = [line.split(" ") for line in file]
    except OSError:
        return ""
    for fields in lines:
        if number in fields[2:3] and "-" in fields[:-1]:
            return fields[fields.index("-", 6) + 1]
    return ""
