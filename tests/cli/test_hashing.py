"""The digests are those of the bytes, however the bytes come, and of one version only."""

from __future__ import annotations

import hashlib
import os
import threading
from typing import TYPE_CHECKING

import pytest

from cached.cli import hashing
from cached.cli.hashing import Hashing, HashingSink, Patience
from cached.core.digests import BLOCK_BYTES, FileDigests
from cached.core.errors import (
    AccessDenied,
    BadReply,
    ObjectChanged,
    ObjectMissing,
    StoreError,
    StoreUnavailable,
)
from cached.core.manifest import manifest_of
from cached.core.objects import ModelRef, StoredObject
from tests.fakes.s3_objects import Generated

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.core.objects import Manifest, Part
    from cached.ports import Cancellation, Sink

REF = ModelRef("m", "s3://b/m/")
LONG = Generated(2 * BLOCK_BYTES + 12345).content(0, 2 * BLOCK_BYTES + 12345)


def digests(data: bytes) -> FileDigests:
    blocks = [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]
    whole = hashlib.sha256(data).digest()
    return FileDigests(len(data), whole, tuple(hashlib.sha256(each).digest() for each in blocks))


# --- the sink


@pytest.mark.parametrize("size_bytes", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1])
@pytest.mark.parametrize("step_bytes", [3 << 20, 9 << 20])
def test_a_file_and_its_blocks_are_hashed(size_bytes: int, step_bytes: int):
    sink = HashingSink(size_bytes)
    for at in range(0, size_bytes, step_bytes):
        sink.accept(at, memoryview(LONG)[at : min(at + step_bytes, size_bytes)])
    assert sink.watermark == size_bytes
    assert sink.digests() == digests(LONG[:size_bytes])


def test_what_came_before_is_not_hashed_again():
    sink = HashingSink(9)
    sink.accept(0, memoryview(b"abcdef"))
    sink.accept(2, memoryview(b"XXXXghi"))
    assert sink.digests() == digests(b"abcdefghi")


@pytest.mark.parametrize(("offset", "size_bytes"), [(5, 1), (-1, 1), (4, 6), (0, 10)])
def test_holes_and_what_is_outside_are_bugs(offset: int, size_bytes: int):
    sink = HashingSink(9)
    sink.accept(0, memoryview(b"abcd"))
    with pytest.raises(ValueError, match="with its watermark at 4"):
        sink.accept(offset, memoryview(bytes(size_bytes)))
    assert sink.watermark == 4


def test_bytes_may_come_through_a_pipe_as_far_as_they_are_meant_for_it():
    sink = HashingSink(7)
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"abcdefg")
    sink.accept_from_pipe(read_fd, 0, 4)
    assert sink.watermark == 4
    os.close(write_fd)
    sink.accept_from_pipe(read_fd, 4, 3)
    with pytest.raises(BadReply, match="2 bytes early"):
        sink.accept_from_pipe(read_fd, 7, 2)
    os.close(read_fd)
    assert sink.digests() == digests(b"abcdefg")


# --- patience


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float | None]]:
    """Wait for nothing; note after how many failures, and what the store asked for."""
    noted: list[tuple[int, float | None]] = []

    def delay_s(failures: int, jitter_ratio: float, asked_s: float | None) -> float:
        assert 0 <= jitter_ratio < 1
        noted.append((failures, asked_s))
        return 0.0

    monkeypatch.setattr(hashing, "delay_s", delay_s)
    return noted


def failing(*errors: StoreError) -> Callable[[], str]:
    left = list(errors)

    def attempt() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return attempt


def test_what_may_pass_is_tried_again(pauses: list[tuple[int, float | None]]):
    busy = StoreUnavailable("busy", retry_after_s=3)
    assert Patience(3).call(failing(busy, BadReply("cut"))) == "done"
    assert pauses == [(1, 3), (2, None)]


def test_what_does_not_pass_is_not_tried_again(pauses: list[tuple[int, float | None]]):
    with pytest.raises(AccessDenied):
        Patience(3).call(failing(AccessDenied("no")))
    assert pauses == []


def test_after_so_many_attempts_that_brought_nothing_it_fails():
    with pytest.raises(StoreUnavailable, match="second"):
        Patience(2).call(failing(StoreUnavailable("first"), StoreUnavailable("second")))


def test_an_attempt_that_brought_something_does_not_count():
    done = iter(range(100))
    errors = [StoreUnavailable(f"{count}") for count in range(5)]
    assert Patience(2).call(failing(*errors), lambda: next(done)) == "done"


def test_nothing_is_tried_again_after_the_end():
    patience = Patience(9)
    patience.end()
    with pytest.raises(StoreUnavailable, match="first"):
        patience.call(failing(StoreUnavailable("first")))


# --- the whole


class Files:
    """An ``ObjectStore`` whose files come in pieces; ``doings`` happen before the k-th fetch."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.doings: dict[int, Callable[[], object]] = {}
        self.fetches = 0
        self.closed = threading.Event()
        self._lock = threading.Lock()

    def resolve(self, ref: ModelRef, cancellation: Cancellation | None = None) -> Manifest:
        return manifest_of(
            ref.uri,
            [
                StoredObject(f"m/{path}", path, len(data), f'"{hash(data)}"')
                for path, data in self.files.items()
            ],
        )

    def fetch(self, part: Part, sink: Sink, cancellation: Cancellation | None = None) -> None:
        with self._lock:
            doing = self.doings.pop(self.fetches, lambda: None)
            self.fetches += 1
        doing()
        data = self.files[part.stored.path]
        while (at := sink.watermark) < part.stop:
            sink.accept(at, memoryview(data)[at : at + (1 << 20)])

    def close(self) -> None:
        self.closed.set()


def hashed(store: Files, threads: int = 2, attempts: int = 3) -> dict[str, FileDigests]:
    shown: list[tuple[int, int]] = []
    made = Hashing(store, Patience(attempts), threads).digests(  # type: ignore[arg-type]
        REF, lambda done, size: shown.append((done, size))
    )
    size_bytes = sum(len(data) for path, data in store.files.items() if path in made.files)
    assert shown[-1] == (size_bytes, size_bytes)
    assert made.block_bytes == BLOCK_BYTES
    return dict(made.files)


def test_every_file_is_hashed_but_not_the_list_itself():
    files = {"a.bin": LONG, "b/empty": b"", "b/c": b"text"}
    store = Files({**files, "cached.manifest.json": b"{}"})
    assert hashed(store) == {path: digests(data) for path, data in files.items()}
    assert store.fetches == 3
    assert not store.closed.is_set()


def test_a_list_alone_is_no_model():
    with pytest.raises(ObjectMissing, match=r"nothing but cached\.manifest\.json is at s3://b/m/"):
        hashed(Files({"cached.manifest.json": b"{}"}))


def test_files_are_read_at_the_same_time():
    store = Files({"a": b"1", "b": b"2"})
    both = threading.Barrier(2, timeout=5)
    store.doings = {0: both.wait, 1: both.wait}
    assert set(hashed(store)) == {"a", "b"}


def test_the_first_error_ends_all_of_it():
    store = Files({"a": b"1", "b": b"2"})

    def cut() -> None:
        assert store.closed.wait(5)
        raise StoreUnavailable("cut")  # must not be tried again

    def refused() -> None:
        raise AccessDenied("no")

    store.doings = {0: cut, 1: refused}
    with pytest.raises(AccessDenied):
        hashed(store)
    assert store.fetches == 2


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("m/a", lambda files: files.update(a=b"4")),
        ("m/another", lambda files: files.update(another=b"5")),
        ("m/a", lambda files: files.pop("a")),
    ],
    ids=["replaced", "added", "removed"],
)
def test_a_change_after_the_file_was_read_is_noticed(
    key: str, change: Callable[[dict[str, bytes]], object]
):
    store = Files({"a": b"1", "b": b"2"})
    store.doings = {1: lambda: change(store.files)}
    with pytest.raises(ObjectChanged, match=f"{key} was changed") as caught:
        hashed(store, threads=1)
    assert caught.value.hint.startswith("nothing was written; ")


def test_the_old_list_may_go_meanwhile():
    store = Files({"a": b"1", "cached.manifest.json": b"{}"})
    store.doings = {0: lambda: store.files.pop("cached.manifest.json")}
    assert set(hashed(store)) == {"a"}


def test_files_are_resumed_where_they_broke(pauses: list[tuple[int, float | None]]):
    def broken() -> None:
        raise StoreUnavailable("broken")

    store = Files({"a": b"1"})
    store.doings = {0: broken, 1: broken}
    assert hashed(store) == {"a": digests(b"1")}
    assert [failures for failures, _ in pauses] == [1, 2]
