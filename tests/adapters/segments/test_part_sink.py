"""A part's bytes are written once, from the front, by whoever comes first."""

from __future__ import annotations

import os
import random
import select
import threading
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.adapters.checksums import Crc
from cached.adapters.segments.part_sink import OpenFile, PartSink
from cached.core.errors import BadReply, LoadFailed, OutOfSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cached.core.objects import Range

SIZE = 4000
START, STOP = 1000, 3000


class Target:
    """A file with one part, in memory."""

    def __init__(self, summing: Crc | None = None) -> None:
        self.fd = os.memfd_create("target")
        os.ftruncate(self.fd, SIZE)
        self.file = OpenFile(self.fd, "a.safetensors", SIZE)
        self.sink = PartSink(self.file, START, STOP, summing)

    def read(self, start: int = 0, stop: int = SIZE) -> bytes:
        return os.pread(self.fd, stop - start, start)

    def accept(self, offset: int, data: bytes) -> None:
        self.sink.accept(offset, memoryview(data))


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target()
    yield target
    os.close(target.fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_bytes_land_at_their_offset_and_move_the_watermark(target):
    target.accept(START, b"abc")
    target.accept(START + 3, b"de")
    assert target.sink.watermark == START + 5
    assert target.read() == bytes(START) + b"abcde" + bytes(SIZE - START - 5)


def test_bytes_below_the_watermark_are_dropped(target):
    target.accept(START, b"abcdef")
    target.accept(START, b"XXX")
    target.accept(START + 3, b"YYYghi")
    assert target.read(START, START + 9) == b"abcdefghi"
    assert target.sink.watermark == START + 9


@pytest.mark.parametrize(
    ("offset", "size"),
    [(START - 1, 5), (START + 1, 5), (START, STOP - START + 1), (STOP, 1)],
    ids=["before the part", "a hole", "past the part", "after the part"],
)
def test_bytes_that_do_not_fit_are_refused_and_change_nothing(target, offset, size):
    with pytest.raises(ValueError, match=f"bytes {offset} to {offset + size} do not fit"):
        target.accept(offset, b"x" * size)
    assert target.read() == bytes(SIZE)
    assert target.sink.watermark == START


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 900)), max_size=20))
def test_any_two_attempts_make_the_same_bytes(steps):
    truth = random.Random(1).randbytes(SIZE)
    target = Target()
    at = [START, START]
    for attempt, size in steps:
        stop = min(at[attempt] + size, STOP)
        target.accept(at[attempt], truth[at[attempt] : stop])
        at[attempt] = stop
    reached = max(at)
    assert target.sink.watermark == reached
    assert target.read(START, reached) == truth[START:reached]
    assert target.read(reached) == bytes(SIZE - reached)
    os.close(target.fd)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 900)), max_size=20))
def test_any_two_attempts_make_the_same_sum(steps):
    truth = random.Random(1).randbytes(SIZE)
    target = Target(Crc("crc32"))
    at = [START, START]
    for attempt, size in steps:
        stop = min(at[attempt] + size, STOP)
        target.accept(at[attempt], truth[at[attempt] : stop])
        at[attempt] = stop
    assert target.sink.checksum == zlib.crc32(truth[START : max(at)]).to_bytes(4)
    os.close(target.fd)


def test_what_was_not_written_is_not_summed():
    fd = os.open("/dev/full", os.O_RDWR)
    sink = PartSink(OpenFile(fd, "a.safetensors", SIZE), START, STOP, Crc("crc32"))
    with pytest.raises(OutOfSpace):
        sink.accept(START, memoryview(b"abc"))
    assert sink.checksum == bytes(4)
    os.close(fd)


def test_a_sink_that_sums_takes_nothing_from_a_pipe(pipe):
    target = Target(Crc("crc32"))
    assert target.sink.sees_bytes
    os.write(pipe[1], b"abc")
    with pytest.raises(ValueError, match="do not fit"):
        target.sink.accept_from_pipe(pipe[0], START, 3)
    assert target.sink.watermark == START
    os.close(target.fd)


def test_without_a_sum_there_is_none(target):
    assert not target.sink.sees_bytes
    assert target.sink.checksum is None


def write_all(target: Target, letter: bytes, seed: int, seen: list[bytes]) -> None:
    """One attempt: its own letter in steps of any size; notes what is there after each."""
    rng = random.Random(seed)
    at = START
    while at < STOP:
        size = min(rng.randrange(1, 200), STOP - at)
        target.accept(at, letter * size)
        at += size
        seen.append(target.read(START, target.sink.watermark))


def test_what_was_read_once_is_never_written_again_by_a_late_attempt(monkeypatch):
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        os.sched_yield()  # lets the others come between the look at the watermark and the write
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for seed in range(30):
        target = Target()
        seen: list[bytes] = []
        attempts = [
            threading.Thread(target=write_all, args=(target, letter, seed + turn, seen))
            for turn, letter in enumerate([b"a", b"b", b"c"])
        ]
        for attempt in attempts:
            attempt.start()
        for attempt in attempts:
            attempt.join()
        final = target.read(START, STOP)
        assert all(final.startswith(before) for before in seen)
        assert b"\0" not in final
        os.close(target.fd)


def test_a_pipe_is_moved_to_the_watermark(target, pipe):
    out, into = pipe
    target.accept(START, b"abc")
    os.write(into, b"defgh")
    target.sink.accept_from_pipe(out, target.sink.watermark, 5)
    assert target.read(START, START + 8) == b"abcdefgh"
    assert target.sink.watermark == START + 8


def test_no_more_is_taken_from_a_pipe_than_asked_for(target, pipe):
    out, into = pipe
    os.write(into, b"abcdef")
    target.sink.accept_from_pipe(out, START, 4)
    assert target.sink.watermark == START + 4
    assert os.read(out, 10) == b"ef"


def test_a_pipe_that_ends_early_leaves_what_came(target):
    out, into = os.pipe()
    os.write(into, b"abc")
    os.close(into)
    with pytest.raises(BadReply, match="ended 2 bytes early"):
        target.sink.accept_from_pipe(out, target.sink.watermark, 5)
    os.close(out)
    assert target.sink.watermark == START + 3
    assert target.read(START, START + 5) == b"abc\0\0"


def test_what_another_attempt_has_brought_is_dropped_from_a_pipe(target, pipe):
    out, into = pipe
    target.accept(START, b"abc")
    os.write(into, b"XYZdefgh")
    target.sink.accept_from_pipe(out, START, 5)
    assert target.read(START, START + 6) == b"abcde\0"
    target.accept(START + 5, b"fghij")
    target.sink.accept_from_pipe(out, START + 5, 3)
    assert target.read(START, START + 11) == b"abcdefghij\0"
    assert target.sink.watermark == START + 10
    assert select.select([out], [], [], 0)[0] == [], "nothing is left in it"


@given(st.lists(st.tuples(st.integers(0, 1), st.booleans(), st.integers(1, 900)), max_size=20))
def test_any_two_attempts_with_and_without_pipes_make_the_same_bytes(steps):
    truth = random.Random(1).randbytes(SIZE)
    target = Target()
    out, into = os.pipe()
    at = [START, START]
    for attempt, by_pipe, size in steps:
        start, stop = at[attempt], min(at[attempt] + size, STOP)
        if by_pipe and stop > start:
            os.write(into, truth[start:stop])
            target.sink.accept_from_pipe(out, start, stop - start)
        else:
            target.accept(start, truth[start:stop])
        at[attempt] = stop
    reached = max(at)
    assert target.sink.watermark == reached
    assert target.read(START, reached) == truth[START:reached]
    assert target.read(reached) == bytes(SIZE - reached)
    for fd in (target.fd, out, into):
        os.close(fd)


def test_a_pipe_that_ends_within_what_is_dropped_ends_early(target):
    out, into = os.pipe()
    target.accept(START, b"abcde")
    os.write(into, b"abc")
    os.close(into)
    with pytest.raises(BadReply, match="ended 2 bytes early"):
        target.sink.accept_from_pipe(out, START, 5)
    os.close(out)


@pytest.mark.parametrize("offset", [START - 1, START + 4, STOP])
def test_a_pipe_before_the_part_or_after_a_hole_is_refused_and_not_read(target, pipe, offset):
    target.accept(START, b"abc")
    os.write(pipe[1], b"x")
    with pytest.raises(ValueError, match="do not fit"):
        target.sink.accept_from_pipe(pipe[0], offset, 1)
    assert os.read(pipe[0], 10) == b"x"
    assert target.read(START, START + 5) == b"abc\0\0"


def noted(target: Target, start: int, stop: int, grain: int = 100) -> Range | None:
    sink = PartSink(target.file, start, stop)
    sink.accept(start, memoryview(bytes(stop - start)))
    return sink.noted(grain)


def test_what_was_written_is_noted_with_its_neighbours_up_to_the_grain(target):
    assert noted(target, 0, 150) == (0, 150)
    assert noted(target, 350, 500) == (350, 500)
    assert noted(target, 150, 350) == (100, 400)
    assert list(target.file.there) == [(0, 500)]


@pytest.mark.parametrize("is_piped", [False, True])
def test_what_is_fetched_anew_is_not_there_until_it_has_come(target, pipe, is_piped):
    target.file.complete()
    if is_piped:
        os.write(pipe[1], b"abc")
        target.sink.accept_from_pipe(pipe[0], START, 3)
    else:
        target.accept(START, b"abc")
    assert list(target.file.there) == [(0, START), (STOP, SIZE)]
    assert target.sink.noted(SIZE) == (0, START + 3)
    assert list(target.file.there) == [(0, START + 3), (STOP, SIZE)]


def test_of_a_part_without_a_byte_nothing_is_noted(target):
    assert target.sink.noted(100) is None
    assert list(target.file.there) == []


def test_a_complete_file_is_all_there(target):
    target.file.complete()
    assert list(target.file.there) == [(0, SIZE)]


def test_a_pipe_with_more_than_the_part_takes_is_refused(target, pipe):
    with pytest.raises(ValueError, match="do not fit"):
        target.sink.accept_from_pipe(pipe[0], START, STOP - START + 1)


def test_after_close_nothing_is_written(target, pipe):
    os.write(pipe[1], b"abc")
    target.sink.close()
    with pytest.raises(LoadFailed, match="not in memory any more"):
        target.accept(START, b"abc")
    with pytest.raises(LoadFailed, match="not in memory any more"):
        target.sink.accept_from_pipe(pipe[0], START, 3)
    assert target.read() == bytes(SIZE)


@pytest.fixture
def full() -> Iterator[PartSink]:
    """A device on which every write fails for lack of space."""
    fd = os.open("/dev/full", os.O_RDWR)
    yield PartSink(OpenFile(fd, "a.safetensors", SIZE), START, STOP)
    os.close(fd)


def test_a_full_file_system_is_a_clear_error_and_nothing_counts(full):
    with pytest.raises(OutOfSpace, match=r"cannot write a\.safetensors at byte 1000: No space"):
        full.accept(START, memoryview(b"abc"))
    assert full.watermark == START


def test_a_file_system_that_fills_up_under_a_pipe_is_a_clear_error(target, pipe, monkeypatch):
    def splice(*_: int, **__: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "splice", splice)
    with pytest.raises(OutOfSpace, match="No space"):
        target.sink.accept_from_pipe(pipe[0], START, 3)
    assert target.sink.watermark == START


def test_a_short_write_is_completed(target, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:2], at))
    target.accept(START, b"abcdefg")
    assert target.read(START, START + 7) == b"abcdefg"
