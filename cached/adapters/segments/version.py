"""One version of a model in a store: its files, and what is there of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cached.core.errors import LoadFailed

if TYPE_CHECKING:
    from cached.adapters.segments.description import Marks
    from cached.adapters.segments.part_sink import OpenFile, PartSink
    from cached.core.objects import Range


class Version:
    """One version's files.

    Attributes:
        place: its directory; None while there is none, or no more.
        stem: its number in the root; None: nothing is told about it.
        is_published: complete, read-only and visible.
        is_gone: it is freed, or is just being: nobody gets any of it any more.
        files: by index; empty where not all could be made; what it does not share once it is gone.
        paths: of the files, in this version.
        sinks: of parts under way, by id.
        marks: the map on disk, while it is being filled.
    """

    __slots__ = ("files", "is_gone", "is_published", "marks", "paths", "place", "sinks", "stem")

    def __init__(self) -> None:
        self.place: str | None = None
        self.stem: str | None = None
        self.is_published = False
        self.is_gone = False
        self.files: list[OpenFile] = []
        self.paths: list[str] = []
        self.sinks: dict[int, PartSink] = {}
        self.marks: Marks | None = None


def what_is_there(version: Version) -> list[tuple[int, Range]]:
    """Return the bytes that are there, by index of the file."""
    found: list[tuple[int, Range]] = []
    for index, file in enumerate(version.files):
        with file.lock:
            found.extend((index, span) for span in file.there)
    return found


def close_marks(version: Version) -> None:
    """Close the map, if there is one."""
    if version.marks is not None:
        version.marks.close()


def check_length(file: OpenFile) -> None:
    """Refuse a file whose length somebody changed.

    Raises:
        LoadFailed: it has not its length.
    """
    found_bytes = os.fstat(file.fd).st_size
    if found_bytes != file.size_bytes:
        message = f"{file.path} must have {file.size_bytes} bytes, has {found_bytes}"
        raise LoadFailed(message, hint="something else writes to the segment root: find out what")
