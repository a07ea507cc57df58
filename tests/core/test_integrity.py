"""What is summed, in which order; what is released when; what is wrong is fetched once more."""

from __future__ import annotations

import base64
import hashlib
import itertools
import random
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.core import integrity
from cached.core.checksums import summary
from cached.core.digests import Digests, FileDigests
from cached.core.errors import LoadFailed
from cached.core.integrity import Integrity, Wrong
from cached.core.objects import Manifest, Range, StoredObject
from cached.core.parts import Planner
from tests.fakes.world import manifest

CAN = frozenset({"crc32", "sha256"})
SIZE = 1000
BYTES = random.Random(1).randbytes(SIZE)


def crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4)


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def text(algorithm: str, value: bytes, more: str = "") -> str:
    return f"{algorithm}:{base64.b64encode(value).decode()}{more}"


class File:
    """One file that comes range by range, and is summed as it is asked."""

    def __init__(self, data: bytes = BYTES, **more: object) -> None:
        listing = manifest(StoredObject("k/a", "a", len(data), '"1"'))
        self.listing: Manifest = listing
        self.data = bytearray(data)
        self.planner = Planner(listing)
        options = {"verify": "checksum", "can": CAN} | more
        self.integrity = Integrity(listing, self.planner, **options)  # type: ignore[arg-type]

    def come(self, start: int, stop: int) -> None:
        self.planner.done(0, start, stop)

    def sum_all(self) -> list[Wrong | None]:
        """Do every check that is due, until none is; return what each of them told."""
        told = []
        while due := self.integrity.due(0):
            for piece in due:
                start = 0 if piece.is_running else piece.start
                data = bytes(self.data[start : piece.stop])
                value = crc(data) if piece.algorithm == "crc32" else sha(data)
                told.append(self.integrity.checked(0, piece.start, piece.stop, value))
        return told

    def described(self, checksum: str | None) -> str:
        return self.integrity.described(0, checksum)


@given(
    cuts=st.lists(st.integers(1, SIZE - 1), max_size=6),
    order=st.randoms(),
    passed=st.lists(st.booleans(), min_size=7, max_size=7),
    wrong=st.none() | st.integers(0, SIZE - 1),
)
def test_a_crc_may_come_of_what_passed_or_be_read_back_each_byte_once(cuts, order, passed, wrong):
    file = File()
    file.described(WAYS["crc"])
    right = bytes(file.data)
    if wrong is not None:
        file.data[wrong] ^= 1
    spans = list(itertools.pairwise(sorted({0, *cuts, SIZE})))
    order.shuffle(spans)
    told: list[Wrong | None] = []
    for (start, stop), has_passed in zip(spans, passed, strict=False):
        file.come(start, stop)
        if has_passed:
            assert file.integrity.passing(0) == "crc32"
            assert file.integrity.claim(0, start, stop)
            assert not file.integrity.claim(0, start, stop)
            told.append(file.integrity.checked(0, start, stop, crc(bytes(file.data[start:stop]))))
        told += file.sum_all()

    assert [each for each in told if each is not None] == [again(0, SIZE)] * (wrong is not None)
    assert file.integrity.is_complete == (wrong is None)
    file.data[:] = right
    if wrong is not None:
        file.come(0, SIZE)
        assert file.integrity.claim(0, 0, SIZE)
        assert file.integrity.checked(0, 0, SIZE, crc(right)) is None
    assert file.integrity.is_complete


def test_what_was_asked_for_in_part_is_not_claimed():
    file = File()
    file.come(0, 10)
    file.described(WAYS["crc"])
    assert [(due.start, due.stop) for due in file.integrity.due(0)] == [(0, 10)]
    assert not file.integrity.claim(0, 5, 20)
    assert file.integrity.claim(0, 10, 20)


@pytest.mark.parametrize("way", ["sha", "composite crc"])
def test_other_sums_are_read_back(way):
    file = File()
    file.described(WAYS[way])
    assert file.integrity.passing(0) == ""
    assert not file.integrity.claim(0, 0, 300)


WAYS = {
    "crc": text("crc32", crc(BYTES)),
    "sha": text("sha256", sha(BYTES)),
    "composite crc": text(
        "crc32", crc(b"".join(crc(BYTES[at : at + 300]) for at in range(0, SIZE, 300))), "-4@300"
    ),
    "composite sha": text(
        "sha256", sha(b"".join(sha(BYTES[at : at + 512]) for at in range(0, SIZE, 512))), "-2@512"
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@given(cuts=st.lists(st.integers(1, SIZE - 1), max_size=6), order=st.randoms(), late=st.booleans())
def test_right_bytes_are_found_right_in_whatever_order_they_come(way, cuts, order, late):
    file = File()
    if not late:
        file.described(way)
    edges = sorted({0, *cuts, SIZE})
    spans = list(itertools.pairwise(edges))
    order.shuffle(spans)
    for start, stop in spans:
        file.come(start, stop)
        file.sum_all()
    if late:
        file.described(way)
        file.sum_all()

    assert file.integrity.is_complete
    assert file.planner.is_complete


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@given(at=st.integers(0, SIZE - 1))
def test_a_wrong_byte_is_found_fetched_once_more_and_found_right_then(way, at):
    file = File()
    file.described(way)
    file.data[at] ^= 1
    file.come(0, SIZE)

    told = file.sum_all()
    was_complete = file.planner.is_complete or file.integrity.is_complete
    file.data[at] ^= 1
    file.come(0, SIZE)
    file.sum_all()

    assert [each for each in told if each is not None] == [again(0, SIZE)]
    assert not was_complete
    assert file.integrity.is_complete
    assert file.planner.is_complete


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_second_time_it_fails(way):
    file = File()
    file.described(way)
    file.data[7] ^= 1
    file.come(0, SIZE)
    file.sum_all()
    file.come(0, SIZE)

    assert file.sum_all()[-1] == Wrong(Range(0, SIZE), is_final=True)


def again(start: int, stop: int) -> Wrong:
    return Wrong(Range(start, stop), is_final=False)


def digests_of(data: bytes, block_bytes: int) -> Digests:
    blocks = [sha(data[at : at + block_bytes]) for at in range(0, len(data), block_bytes)]
    return Digests(block_bytes, {"a": FileDigests(len(data), sha(data), tuple(blocks))})


@given(
    block_bytes=st.integers(1, 400),
    steps=st.lists(
        st.tuples(st.booleans(), st.integers(0, SIZE), st.integers(0, SIZE)), max_size=12
    ),
)
def test_each_block_is_due_once_when_all_of_it_came_and_again_when_it_was_wrong(block_bytes, steps):
    file = File(verify="digest")
    file.integrity.listed(digests_of(BYTES, block_bytes), file.listing)
    blocks = {
        Range(at, min(at + block_bytes, SIZE)): False  # whether it was asked for
        for at in range(0, SIZE, block_bytes)
    }
    came: set[int] = set()
    wrong: set[Range] = set()
    for is_wrong, *edges in steps:
        start, stop = sorted(edges)
        first = start - start % block_bytes
        block = Range(first, min(first + block_bytes, SIZE))
        if is_wrong and blocks.get(block) and block not in wrong:
            wrong.add(block)  # the second time the load would fail
            assert file.integrity.checked(0, block.start, block.stop, b"wrong") == again(*block)
            came -= set(range(*block))
            blocks[block] = False
        else:
            file.come(start, stop)
            came |= set(range(start, stop))
        due = {Range(piece.start, piece.stop) for piece in file.integrity.due(0)}
        naive = {each for each, asked in blocks.items() if not asked and came >= set(range(*each))}

        assert due == naive
        blocks |= dict.fromkeys(due, True)


def test_blocks_that_came_before_cost_nothing_when_more_come():
    count = 5000  # 40 GiB in blocks of 8 MiB
    size_bytes = count * 8
    listing = manifest(StoredObject("k/a", "a", size_bytes, '"1"'))
    planner = Planner(listing)
    checks = Integrity(listing, planner, verify="digest", can=CAN)
    checks.listed(Digests(8, {"a": FileDigests(size_bytes, b"", (b"",) * count)}), listing)
    began_s = time.process_time()
    for at in range(0, size_bytes, 8):
        planner.done(0, at, at + 8)
        assert len(checks.due(0)) == 1

    assert time.process_time() - began_s < 2, "0.05 s; looking at all of them each time: 10 s"


def test_nothing_is_complete_before_the_store_has_told():
    file = File()
    file.come(0, SIZE)

    assert file.integrity.wants_look(0)
    assert not file.integrity.is_complete
    file.described(None)
    assert file.integrity.is_complete


@pytest.mark.parametrize(
    "checksum", [None, text("crc64nvme", bytes(8)), "md5:AA==", "nonsense", "crc32:!"]
)
def test_what_this_host_cannot_compute_is_passed_over_and_said(checksum):
    file = File()
    file.come(0, SIZE)

    assert file.described(checksum) == ""
    assert file.integrity.is_complete
    assert summary(file.integrity.checked_by) == "length"


def test_the_algorithm_is_told():
    file = File()

    assert file.described(WAYS["sha"]) == "sha256"
    assert summary(file.integrity.checked_by) == "sha256"


def test_with_a_checksum_bytes_may_be_read_as_soon_as_they_are_there():
    file = File()
    file.come(0, 10)

    assert file.integrity.releases(0, 0, 10)
    assert not file.integrity.releases(0, 0, 11)


def test_wrong_bytes_are_not_there_any_more():
    file = File()
    file.described(WAYS["crc"])
    file.data[7] ^= 1
    file.come(0, SIZE)
    file.sum_all()

    assert not file.integrity.releases(0, 0, 1)


def test_off_checks_nothing():
    file = File(verify="off")
    file.come(0, SIZE)

    assert not file.integrity.wants_look(0)
    assert file.integrity.due(0) == []
    assert file.integrity.is_complete


def test_a_file_of_no_bytes_needs_no_look():
    assert not File(b"").integrity.wants_look(0)


def test_a_shared_file_was_checked_before():
    file = File(checked={0: "crc32"})
    file.come(0, SIZE)

    assert not file.integrity.wants_look(0)
    assert file.integrity.is_complete
    assert file.integrity.checked_by == ("crc32",)


def test_long_files_are_summed_in_pieces_so_that_others_get_their_turn(monkeypatch):
    monkeypatch.setattr(integrity, "PIECE_BYTES", 64)
    for way in ("crc", "sha"):
        file = File()
        file.described(WAYS[way])
        file.come(0, SIZE)
        first = file.integrity.due(0)

        assert max(piece.stop - piece.start for piece in first) == 64
        assert len(first) == (16 if way == "crc" else 1)


def test_untrusted_bytes_are_released_when_they_were_found_right():
    file = File(trusted=False)
    file.come(0, SIZE)
    before = file.integrity.releases(0, 0, 1)
    file.described(WAYS["crc"])
    file.sum_all()

    assert not before
    assert file.integrity.releases(0, 0, SIZE)
    assert file.integrity.is_complete


def test_untrusted_bytes_without_a_checksum_are_fetched_anew():
    file = File(trusted=False)
    file.come(0, SIZE)
    file.described(None)

    assert not file.planner.is_complete
    file.come(0, SIZE)
    assert file.integrity.releases(0, 0, SIZE)
    assert file.integrity.is_complete


class Digested(File):
    """Two files: the list, and one of three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.listing = manifest(
            StoredObject("k/a", "a", SIZE, '"1"'),
            StoredObject("k/cached.manifest.json", "cached.manifest.json", 99, '"2"'),
        )
        self.planner = Planner(self.listing)
        self.integrity = Integrity(self.listing, self.planner, verify="digest", can=CAN)

    def list(self, size_bytes: int = SIZE, path: str = "a") -> None:
        blocks = tuple(sha(BYTES[at : at + 400]) for at in range(0, SIZE, 400))
        digests = Digests(400, {path: FileDigests(size_bytes, sha(BYTES), blocks)})
        self.integrity.listed(digests, self.listing)


def test_with_digests_bytes_may_be_read_only_after_their_block_matched():
    file = Digested()
    file.come(0, 500)
    file.planner.done(1, 0, 99)
    before = file.integrity.releases(0, 0, 1)
    file.list()
    unchecked = file.integrity.releases(0, 0, 1)
    file.sum_all()

    assert not before
    assert not unchecked
    assert list(file.integrity.released(0)) == [Range(0, 400)]
    assert file.integrity.releases(1, 0, 99)
    file.come(500, SIZE)
    file.sum_all()
    assert file.integrity.is_complete
    assert summary(file.integrity.checked_by) == "digest"


def test_only_the_block_that_is_wrong_is_fetched_once_more():
    file = Digested()
    file.list()
    file.data[450] ^= 1
    file.come(0, SIZE)
    told = file.sum_all()

    assert [each for each in told if each is not None] == [again(400, 800)]
    assert list(file.integrity.released(0)) == [Range(0, 400), Range(800, SIZE)]
    file.come(400, 800)
    assert file.sum_all() == [Wrong(Range(400, 800), is_final=True)]


@pytest.mark.parametrize("wrong", [{"size_bytes": SIZE + 1}, {"path": "b"}])
def test_a_list_that_is_of_another_model_is_refused(wrong):
    file = Digested()

    with pytest.raises(LoadFailed) as caught:
        file.list(**wrong)

    assert "cached digest" in caught.value.hint


def test_the_list_is_known_by_its_name():
    file = Digested()

    assert file.integrity.list_index == 1
    assert file.integrity.wants_list
    file.list()
    assert not file.integrity.wants_list
