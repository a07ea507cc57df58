"""Versions of a model to make, fill, read and look at."""

from __future__ import annotations

import os
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cached.adapters.segments import DirectorySegments, MemfdSegments
from cached.core.header import write
from cached.core.objects import FileRef, Manifest, Part, StoredObject, VersionRef

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cached.adapters.segments import Segments

STORES: dict[str, Callable[..., Segments]] = {
    "tmpfs": DirectorySegments,
    "file": partial(DirectorySegments, kind="file"),
    "memfd": MemfdSegments,
}
OF = VersionRef("llm", "0123456789abcdef")
HEADER = write([("a", "U8", (5,))])
DATA = {
    "config.json": b"{}",
    "empty": b"",
    "sub/dir/b c+é.bin": random.Random(1).randbytes(10_000),
    "z.safetensors": HEADER + b"hello",
}


def manifest_of(data: Mapping[str, bytes], version: str = OF.version) -> Manifest:
    objects = [StoredObject(path, path, len(body), '"e"') for path, body in data.items()]
    return Manifest("s3://b/m/", version, tuple(objects))


def part_of(
    of: VersionRef, manifest: Manifest, index: int, start: int = 0, stop: int | None = None
) -> Part:
    stored = manifest.objects[index]
    stop = stored.size_bytes if stop is None else stop
    return Part(index, FileRef(of, index), manifest.uri, stored, start, stop)


def put(segments: Segments, part: Part, data: bytes) -> None:
    """Have one attempt bring bytes, and end."""
    segments.sink(part).accept(part.start, memoryview(data))
    segments.release_sink(part)


def fill(
    segments: Segments,
    of: VersionRef = OF,
    data: Mapping[str, bytes] = DATA,
    shared: Mapping[int, FileRef] | None = None,
) -> Manifest:
    """Make a version with all its bytes, but those that it shares."""
    manifest = manifest_of(data, of.version)
    segments.create(of, manifest, shared or {})
    for index, body in enumerate(data.values()):
        if index not in (shared or {}):
            put(segments, part_of(of, manifest, index), body)
    return manifest


def read(segments: Segments, index: int, of: VersionRef = OF) -> bytes:
    fd = segments.reader(FileRef(of, index))
    with open(fd, "rb") as file:
        return file.read()


def paths(root: str) -> set[str]:
    """Return what lies in a root, but for what is always there."""
    found = {str(path.relative_to(root)) for path in Path(root).rglob("*")}
    return found - {"lock", "about", "filling", "models"}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def make_deep(top: Path, depth: int, name: str) -> None:
    """Make directories one in the other, with a file and a link at the bottom."""
    before = os.getcwd()
    top.mkdir(parents=True, exist_ok=True)
    os.chdir(top)
    try:
        for _ in range(depth):
            os.mkdir(name, 0o750)
            os.chdir(name)
        Path("file").write_bytes(b"x" * 5000)
        os.symlink(before, "link")
    finally:
        os.chdir(before)
