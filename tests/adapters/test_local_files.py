"""A model in local files is found, pinned and fetched as one in a bucket."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cached.adapters.local_files import LocalFiles
from cached.cancellation import Token
from cached.core.errors import (
    AccessDenied,
    BadReply,
    ObjectChanged,
    ObjectMissing,
    ObjectRefused,
    StoreUnavailable,
)
from cached.core.objects import ModelRef
from tests.fakes.sinks import MemorySink
from tests.fakes.store_cases import ObjectStoreCases, fetched, part_of

if TYPE_CHECKING:
    from pathlib import Path

    from cached.core.objects import Part


class Directory:
    """A store over a directory."""

    def __init__(self, root: Path) -> None:
        self.store = LocalFiles()
        self.root = root

    def put(self, key: str, content: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name("fresh")
        fresh.write_bytes(content)
        fresh.rename(path)

    def uri(self, key: str) -> str:
        return f"file://{self.root}/{key}"


@pytest.fixture
def place(tmp_path: Path) -> Directory:
    return Directory(tmp_path)


class TestLocalFiles(ObjectStoreCases):
    pass


def test_a_link_below_the_directory_is_followed(place: Directory):
    place.put("llm/blobs/1", b"abc")
    (place.root / "llm/a").symlink_to("blobs/1")
    manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
    assert [stored.path for stored in manifest.objects] == ["a", "blobs/1"]
    assert fetched(place.store, part_of(manifest, manifest.objects[0])) == b"abc"


def test_a_link_out_of_the_directory_is_refused(place: Directory):
    place.put("secret", b"abc")
    place.put("llm/b", b"b")
    (place.root / "llm/a").symlink_to("../secret")
    with pytest.raises(ObjectRefused, match="link out of the directory"):
        place.store.resolve(ModelRef("llm", place.uri("llm/")))


def test_what_is_no_file_is_refused(place: Directory):
    place.put("llm/b", b"b")
    os.mkfifo(place.root / "llm/pipe")
    with pytest.raises(ObjectRefused, match="not a regular file"):
        place.store.resolve(ModelRef("llm", place.uri("llm/")))


def test_a_relative_path_is_refused(place: Directory):
    with pytest.raises(ObjectMissing, match="file:///directory/"):
        place.store.resolve(ModelRef("llm", "file://models/llm/"))


def test_localhost_is_this_machine(place: Directory):
    place.put("llm/b", b"b")
    uri = place.uri("llm/").replace("file://", "file://localhost")
    assert len(place.store.resolve(ModelRef("llm", uri)).objects) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(place: Directory):
    place.put("llm/b", b"b")
    manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
    (place.root / "llm/b").chmod(0)
    with pytest.raises(AccessDenied, match="daemon's user"):
        fetched(place.store, part_of(manifest, manifest.objects[0]))


def test_a_link_to_a_directory_is_refused_rather_than_left_out(place: Directory):
    place.put("llm/sub/a", b"a")
    (place.root / "llm/again").symlink_to("sub")
    with pytest.raises(ObjectRefused, match="again is a link to a directory"):
        place.store.resolve(ModelRef("llm", place.uri("llm/")))


def test_a_file_that_is_written_while_it_is_read_is_noticed(place: Directory):
    place.put("llm/a", b"0123456789")
    manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
    part = part_of(manifest, manifest.objects[0])
    sink = WritingSink(place.root / "llm/a", part)
    with pytest.raises(ObjectChanged, match="replaced or written"):
        place.store.fetch(part, sink)


def test_a_part_beyond_the_end_is_cut_short(place: Directory):
    place.put("llm/a", b"0123456789")
    manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
    with pytest.raises(BadReply, match="ended at byte 10"):
        fetched(place.store, part_of(manifest, manifest.objects[0], 0, 11))


class WritingSink(MemorySink):
    """Writes the file as soon as the first bytes have come."""

    def __init__(self, path: Path, part: Part) -> None:
        super().__init__(part.start, part.stop)
        self._path = path

    def accept(self, offset: int, view: memoryview) -> None:
        super().accept(offset, view)
        with self._path.open("ab") as file:
            file.write(b"more")


class CancellingSink(MemorySink):
    """Cancels its own fetch as soon as the first bytes have come."""

    def __init__(self, part: Part) -> None:
        super().__init__(part.start, part.stop)
        self.token = Token()

    def accept(self, offset: int, view: memoryview) -> None:
        super().accept(offset, view)
        self.token.cancel()


def test_a_fetch_that_runs_is_cancelled(place: Directory):
    place.put("llm/a", bytes(3 << 20))
    manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
    part = part_of(manifest, manifest.objects[0])
    sink = CancellingSink(part)
    with pytest.raises(StoreUnavailable, match="was cancelled"):
        place.store.fetch(part, sink, sink.token)
    assert 0 < sink.watermark < part.stop
    assert fetched(place.store, part) == bytes(3 << 20)


def test_a_file_that_cannot_be_put_leaves_nothing(place: Directory, tmp_path: Path):
    place.put("llm/a/x", b"abc")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreUnavailable, match=r"cannot write .*/llm/a: "):
        place.store.put(place.uri("llm/a"), b"{}")  # a directory
    with pytest.raises(ObjectMissing, match=r"cannot write .*/none/a: No such"):
        place.store.put(place.uri("none/a"), b"{}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_path_is_taken_as_it_is_written_and_not_percent_decoded(place: Directory):
    place.put("a%20b/x", b"abc")
    manifest = place.store.resolve(ModelRef("llm", place.uri("a%20b/")))
    assert [stored.path for stored in manifest.objects] == ["x"]
