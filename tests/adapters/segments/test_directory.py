"""Files survive the daemon: the next one goes on with them, or sweeps them, and is never wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cached.adapters.segments import DirectorySegments
from cached.core import adoption
from cached.core.adoption import adopt
from cached.core.errors import LoadFailed
from cached.core.ledger import Ledger
from cached.core.loads import Limits
from cached.core.objects import FileRef, Left, Manifest, ModelRef, Range, VersionRef
from cached.core.shelf import Shelf
from tests.adapters.segments.versions import (
    DATA,
    OF,
    descriptors,
    fill,
    manifest_of,
    part_of,
    paths,
    put,
    read,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from tests.adapters.segments.conftest import Opened

MIB = 1 << 20
LARGE = {"a.bin": bytes(range(256)) * (7 * MIB // 512), "b/c.bin": b"c" * 10}  # 3.5 MiB
HALF = VersionRef("half", "1")
NEWER = VersionRef("llm", "ffff", 7)


@pytest.fixture(params=["tmpfs", "file"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def segments(opened: Opened) -> DirectorySegments:
    store = opened()
    assert isinstance(store, DirectorySegments)
    return store


def half(segments: DirectorySegments, of: VersionRef = HALF) -> Manifest:
    """Make a version of which [0, 1.5 MiB) and [2 MiB, 3.5 MiB) are there."""
    manifest = manifest_of(LARGE, of.version)
    segments.create(of, manifest)
    body = LARGE["a.bin"]
    for part_id, (start, stop) in enumerate([(0, MIB), (MIB, 3 * MIB // 2), (2 * MIB, len(body))]):
        part = part_of(of, manifest, 0, start, stop)._replace(part_id=part_id)
        put(segments, part, body[start:stop])
    return manifest


def only(store: DirectorySegments) -> Left:
    (left,) = store.found()
    return left


def test_files_are_private_until_they_are_published(root, segments):
    segments.create(OF, manifest_of(DATA))
    for path in DATA:
        assert os.stat(f"{root}/filling/1/{path}").st_mode & 0o777 == 0o600
    assert os.stat(f"{root}/about").st_mode & 0o777 == 0o700
    directory = segments.publish(OF)
    for path in DATA:
        assert os.stat(f"{directory}/{path}").st_mode & 0o777 == 0o444


def test_a_file_whose_length_was_changed_is_not_published(root, segments):
    fill(segments)
    os.truncate(f"{root}/filling/1/config.json", 1)
    with pytest.raises(LoadFailed, match=r"config\.json must have 2 bytes, has 1"):
        segments.publish(OF)
    assert not os.path.exists(f"{root}/models/llm")


def test_what_is_in_the_way_of_making_files_is_an_error_and_can_be_freed(root, segments):
    os.mkdir(f"{root}/filling/1")
    with pytest.raises(LoadFailed, match=f"cannot make the files of {OF}.*File exists"):
        segments.create(OF, manifest_of(DATA))
    assert segments.free(OF)
    assert paths(root) == set()


def test_a_root_that_was_cleared_from_outside_is_no_obstacle_to_freeing(root, segments):
    fill(segments)
    directory = Path(segments.publish(OF))
    for path in DATA:
        (directory / path).unlink()
    assert segments.free(OF)
    assert paths(root) == set()


FULL = """
import os, sys
from cached.adapters.segments import DirectorySegments
from cached.core.errors import OutOfSpace
from cached.core.objects import *
objects = (StoredObject("a", "a", 3 << 20, "e"), StoredObject("b", "b", 3 << 20, "e"))
segments, of = DirectorySegments(sys.argv[1]), VersionRef("m", "1")
segments.create(of, Manifest("s3://b/", "1", objects))
print("ready")
for index, stored in enumerate(objects):
    part = Part(index, FileRef(of, index), "s3://b/", stored, 0, 3 << 20)
    sink = segments.sink(part)
    try:
        sink.accept(0, memoryview(bytes(3 << 20)))
    except OutOfSpace as error:
        print(error.message)
    print(sink.watermark)
    segments.release_sink(part)
print(segments.free(of), os.statvfs(sys.argv[1]).f_bavail * 4096 >= 4000 << 10)
"""


def test_a_real_tmpfs_that_is_too_small_is_told_and_given_back(tmp_path):
    script = 'mount -t tmpfs -o size=4m cached-test "$1" && exec "$2" -c "$3" "$1"'
    command = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    done = subprocess.run(
        (*command, str(tmp_path), sys.executable, FULL),
        capture_output=True,
        text=True,
        check=False,
    )
    if "ready" not in done.stdout and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"NOT PROVEN HERE: no tmpfs can be mounted: {done.stderr.strip()}")
    ready, first, message, second, freed = done.stdout.splitlines()
    assert ready == "ready"
    assert first == str(3 << 20)
    assert message.startswith("cannot write b at byte 0: No space")
    assert second == "0"
    assert freed == "True True"


# Adoption.


def test_a_complete_version_is_adopted_as_it_is(root, opened, segments):
    manifest = fill(segments)
    directory = segments.publish(OF)
    segments.switch(OF)
    before = paths(root)
    inode = os.stat(f"{directory}/config.json").st_ino

    second = opened()
    left = only(second)
    facts = [os.stat(f"{directory}/{path}") for path in DATA]
    assert left._replace(size_bytes=0) == Left(
        of=OF._replace(load=1),
        manifest=manifest,
        path=directory,
        is_published=True,
        is_current=True,
        size_bytes=0,
        is_trusted=True,
        inodes=tuple((found.st_dev, found.st_ino) for found in facts),
        there=tuple((Range(0, len(data)),) if data else () for data in DATA.values()),
    )
    used = sum(os.stat(f"{directory}/{path}").st_blocks * 512 for path in DATA)
    assert left.size_bytes == used > 0
    open_before = descriptors()
    there = second.create(left.of, manifest)
    assert there == [(0, (0, 2)), (2, (0, 10_000)), (3, (0, len(DATA["z.safetensors"])))]
    assert descriptors() == open_before + len(DATA)
    assert second.publish(left.of) == directory
    second.switch(left.of)
    assert paths(root) == before
    assert os.stat(f"{directory}/config.json").st_ino == inode
    for index, (path, body) in enumerate(DATA.items()):
        assert read(second, index, left.of) == body
        assert os.stat(f"{directory}/{path}").st_mode & 0o777 == 0o444
    assert second.free(left.of)
    assert paths(root) == set()
    assert descriptors() == open_before


def test_what_is_wrong_in_an_adopted_file_can_be_written_and_stays_read_only_to_others(
    opened, segments
):
    """Complete files are open to be read; one that a check finds wrong is fetched anew in place."""
    manifest = fill(segments)
    directory = Path(segments.publish(OF))
    file = directory / "sub/dir/b c+é.bin"
    file.chmod(0o600)
    file.write_bytes(b"wrong" * 2000)
    file.chmod(0o444)

    second = opened()
    left = only(second)
    second.create(left.of, manifest)
    reader = second.reader(FileRef(left.of, 2))
    open_before = descriptors()
    put(second, part_of(left.of, manifest, 2), DATA["sub/dir/b c+é.bin"])
    assert descriptors() == open_before
    assert os.pread(reader, 20_000, 0) == DATA["sub/dir/b c+é.bin"]
    assert file.stat().st_mode & 0o777 == 0o444
    assert not second.free(left.of, if_unused=True)
    os.close(reader)
    assert second.free(left.of, if_unused=True)


def test_a_half_version_goes_on_where_it_was_to_the_megabyte(root, opened, segments):
    manifest = half(segments)
    for turn in range(2):  # the second time as the next daemon's next daemon
        second = opened()
        left = only(second)
        assert left.of == HALF._replace(load=1)
        assert not left.is_published
        assert not left.is_current
        assert left.size_bytes >= 2 * MIB
        there = second.create(left.of, left.manifest)
        assert there == [(0, Range(0, MIB)), (0, Range(2 * MIB, 7 * MIB // 2))], turn
        for _, span in there:
            assert read(second, 0, left.of)[slice(*span)] == LARGE["a.bin"][slice(*span)]
    body = LARGE["a.bin"][MIB : 2 * MIB]
    second = opened()
    left = only(second)
    second.create(left.of, manifest)
    put(second, part_of(left.of, manifest, 0, MIB, 2 * MIB), body)
    third = opened()
    left = only(third)
    assert third.create(left.of, manifest) == [(0, Range(0, 7 * MIB // 2))]
    put(third, part_of(left.of, manifest, 1), LARGE["b/c.bin"])
    directory = third.publish(left.of)
    for path, data in LARGE.items():
        assert Path(directory, path).read_bytes() == data


def test_where_the_system_refuses_to_write_anew_it_is_adopted_all_the_same(
    opened, segments, monkeypatch
):
    manifest = fill(segments)
    segments.publish(OF)
    second = opened()

    def refuse(fd: int, mode: int) -> None:
        raise PermissionError(fd, mode)

    monkeypatch.setattr(os, "fchmod", refuse)
    second.create(only(second).of, manifest)
    with pytest.raises(LoadFailed, match="cannot write"):
        put(second, part_of(only(second).of, manifest, 2), DATA["sub/dir/b c+é.bin"])


def test_what_is_fetched_anew_after_a_mismatch_is_not_there_for_the_next_daemon(opened, segments):
    manifest = half(segments)
    part = part_of(HALF, manifest, 0, 5 * MIB // 2, 3 * MIB)._replace(part_id=9)
    segments.sink(part).accept(part.start, memoryview(b"??"))
    second = opened()
    of = only(second).of
    end = (0, Range(3 * MIB, 7 * MIB // 2))
    assert second.create(of, manifest) == [(0, Range(0, MIB)), end]
    second.sink(part_of(of, manifest, 0, 0, 10)).accept(0, memoryview(b"??"))
    third = opened()
    assert third.create(only(third).of, manifest) == [end]


def test_what_cannot_be_taken_out_of_the_map_is_not_fetched_anew(segments, monkeypatch):
    manifest = half(segments)
    part = part_of(HALF, manifest, 0, 0, MIB)._replace(part_id=9)

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(LoadFailed, match=r"cannot fetch a.bin anew: Input/output error"):
            segments.sink(part)
    segments.sink(part).accept(0, memoryview(b"??"))


def test_an_adopted_version_counts_while_a_worker_of_the_dead_daemon_maps_it(opened, segments):
    fill(segments)
    segments.publish(OF)
    fd = segments.reader(FileRef(OF, 2))
    second = opened()
    left = only(second)
    second.create(left.of, left.manifest)
    assert not second.free(left.of, if_unused=True)
    assert not second.free(left.of)
    assert os.pread(fd, 10, 0) == DATA["sub/dir/b c+é.bin"][:10]
    os.close(fd)
    assert second.free(left.of)


def test_what_is_left_can_be_freed_without_adopting_it_and_counts_until_nobody_maps_it(
    root, opened, segments
):
    fill(segments)
    segments.publish(OF)
    fd = segments.reader(FileRef(OF, 2))
    visible = paths(root)
    second = opened()
    before = descriptors()
    left = only(second)
    assert not second.free(left.of, if_unused=True)
    assert (paths(root), descriptors()) == (visible, before)
    assert not second.free(left.of)
    assert paths(root) == set()
    assert not second.free(left.of)
    os.close(fd)
    assert second.free(left.of)
    assert descriptors() == before - 1


def test_what_was_not_freed_because_it_is_used_can_still_be_adopted(opened, segments):
    fill(segments)
    segments.publish(OF)
    fd = segments.reader(FileRef(OF, 2))
    second = opened()
    left = only(second)
    assert not second.free(left.of, if_unused=True)
    assert len(second.create(left.of, left.manifest)) == 3
    os.close(fd)


def test_numbers_of_what_is_left_and_of_what_is_new_never_meet(root, opened, segments):
    for load in range(3):
        half(segments, HALF._replace(load=load))
    second = opened()
    assert [left.of.load for left in second.found()] == [1, 2, 3]
    half(second, HALF._replace(load=4))
    assert sorted(os.listdir(f"{root}/filling")) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("number", [10**15 - 1, 10**14, 10**16])
def test_after_a_number_that_we_never_give_what_is_new_is_adopted_all_the_same(
    root, opened, segments, number: int
):
    half(segments, HALF)
    for name in ("filling/1", "about/1.json", "about/1.map"):
        os.rename(f"{root}/{name}", f"{root}/{name.replace('1', str(number), 1)}")
    second = opened()
    half(second, HALF._replace(version="new", load=2))
    third = opened()
    assert "new" in {left.of.version for left in third.found() if left.manifest}
    half(third, HALF._replace(version="newer", load=3))
    assert {"new", "newer"} <= {left.of.version for left in opened().found() if left.manifest}


def test_what_two_versions_share_is_adopted_as_one_file(root, opened, segments):
    fill(segments)
    segments.publish(OF)
    newer = fill(segments, NEWER, {"copy": DATA["sub/dir/b c+é.bin"]}, {0: FileRef(OF, 2)})
    second = opened()
    by_name = {left.of.version: left.of for left in second.found()}
    before = descriptors()
    second.create(by_name["ffff"], newer)
    second.create(by_name[OF.version], manifest_of(DATA))
    assert descriptors() == before + len(DATA) + 1  # the map of what is not published yet
    assert second.free(by_name[OF.version])
    assert read(second, 0, by_name["ffff"]) == DATA["sub/dir/b c+é.bin"]
    assert Path(second.publish(by_name["ffff"]), "copy").stat().st_nlink == 1
    assert second.free(by_name["ffff"])
    assert paths(root) == set()


def test_what_was_shared_while_it_was_filled_is_told_to_the_next_daemon(opened, segments):
    half(segments)
    data = {"copy": LARGE["a.bin"]}
    newer = manifest_of(data, NEWER.version)
    segments.create(NEWER, newer, {0: FileRef(HALF, 0)})
    second = opened()
    (of,) = (left.of for left in second.found() if left.of.version == "ffff")
    assert second.create(of, newer) == [(0, (0, MIB)), (0, (2 * MIB, 7 * MIB // 2))]


def test_a_shared_file_that_was_published_with_another_version_is_all_there(opened, segments):
    manifest = half(segments)
    newer = manifest_of({"copy": LARGE["a.bin"]}, NEWER.version)
    segments.create(NEWER, newer, {0: FileRef(HALF, 0)})
    body = LARGE["a.bin"][MIB : 2 * MIB]
    put(segments, part_of(HALF, manifest, 0, MIB, 2 * MIB)._replace(part_id=7), body)
    put(segments, part_of(HALF, manifest, 1), LARGE["b/c.bin"])
    segments.publish(HALF)
    second = opened()
    (of,) = (left.of for left in second.found() if left.of.version == "ffff")
    assert second.create(of, newer) == [(0, (0, 7 * MIB // 2))]
    assert Path(second.publish(of), "copy").read_bytes() == LARGE["a.bin"]


def test_a_shared_file_that_is_left_does_not_keep_its_neighbour_from_being_freed(opened, segments):
    fill(segments)
    segments.publish(OF)
    fill(segments, NEWER, {"copy": DATA["sub/dir/b c+é.bin"]}, {0: FileRef(OF, 2)})
    segments.publish(NEWER)
    second = opened()
    newer, older = (left.of for left in sorted(second.found(), reverse=True))
    second.create(newer, manifest_of({"copy": DATA["sub/dir/b c+é.bin"]}, "ffff"))
    assert second.free(older)
    assert read(second, 0, newer) == DATA["sub/dir/b c+é.bin"]
    assert second.free(newer)


PAGE = 4096
OLDER = VersionRef("llm", "eeee")
LEFT = {
    OLDER: {"shared": b"s" * 8 * PAGE, "own": b"o" * 4 * PAGE},
    NEWER: {"own": b"n" * 2 * PAGE, "shared": b"s" * 8 * PAGE},
}


def in_memory(root: str) -> int:
    """Return what the file system holds of all versions."""
    files = [path.stat() for path in Path(root, "models").rglob("*") if path.is_file()]
    return sum({one.st_ino: one.st_blocks * 512 for one in files}.values())


def two_that_share(segments: DirectorySegments, current: VersionRef) -> None:
    """Leave two versions that have their large file in common."""
    fill(segments, OLDER, LEFT[OLDER])
    segments.publish(OLDER)
    fill(segments, NEWER, LEFT[NEWER], {1: FileRef(OLDER, 0)})
    segments.publish(NEWER)
    segments.switch(current)


@pytest.mark.parametrize("kind", ["tmpfs"])
@pytest.mark.parametrize("case", [(OLDER, 12, 2), (NEWER, 10, 4)])
def test_what_goes_on_and_what_goes_count_a_shared_file_once(
    root, opened, segments, case, monkeypatch
):
    current, goes_on, goes = case
    monkeypatch.setattr(adoption, "_adds_up", lambda manifest: True)  # their ids are made up
    two_that_share(segments, current)
    second = opened()
    assert sum(left.size_bytes for left in second.found()) == in_memory(root) == 14 * PAGE
    shelf = Shelf((ModelRef("llm", "s3://b/m/"),), Ledger(budget_bytes=goes_on * PAGE))
    (load,) = adopt(shelf, Limits(), second.found(), 0.0)
    assert load.of.version == current.version
    (going,) = shelf.retired
    ledger = shelf.ledger
    assert (ledger.size_of(load.of), ledger.size_of(going)) == (goes_on * PAGE, goes * PAGE)
    assert second.free(going)
    ledger.release(going)
    assert ledger.used_bytes == in_memory(root) == goes_on * PAGE
    second.create(load.of, load.manifest)
    assert second.free(load.of)
    assert in_memory(root) == 0


@pytest.mark.parametrize("current", [OLDER, NEWER])
def test_versions_that_go_on_together_count_a_shared_file_once(
    root, opened, segments, current, monkeypatch
):
    monkeypatch.setattr(adoption, "_adds_up", lambda manifest: True)  # their ids are made up
    two_that_share(segments, current)
    second = opened()
    shelf = Shelf((ModelRef("llm", "s3://b/m/"),), Ledger(budget_bytes=14 * PAGE))
    first, beside = adopt(shelf, Limits(), second.found(), 0.0)
    shelf.models["llm"].current = first
    shelf.models["llm"].kept.append(beside)
    assert first.of.version == current.version
    assert (first.is_aside, beside.is_aside) == (False, True)
    assert not shelf.retired
    assert shelf.ledger.used_bytes == in_memory(root) == 14 * PAGE
    for load in (first, beside):
        second.create(load.of, load.manifest, load.shared)
    for load in (first, beside):
        assert second.free(load.of)
        shelf.forget(load)
        shelf.models["llm"].current = None
        assert shelf.ledger.used_bytes == in_memory(root)


def test_what_was_passed_over_is_told_for_the_current_version_alone(root, opened, segments):
    two_that_share(segments, NEWER)
    segments.switch(OLDER, ("ffff", "dddd"))
    second = opened()
    told = {left.of.version: (left.is_current, left.passed_over) for left in second.found()}
    assert told == {"eeee": (True, ("ffff", "dddd")), "ffff": (False, ())}

    older = next(left for left in second.found() if left.is_current)
    assert older.manifest is not None
    second.create(older.of, older.manifest)
    second.switch(older.of)
    assert [left.passed_over for left in opened().found()] == [(), ()]
    assert not list(Path(root, "about").glob("*.over"))


def test_what_was_passed_over_goes_with_its_version(root, segments):
    fill(segments)
    segments.publish(OF)
    segments.switch(OF, ("ffff",))
    assert segments.free(OF)
    assert paths(root) == set()


CHECKED = ("crc64nvme", "", "length", "crc64nvme")


def test_by_what_a_version_was_checked_is_told_to_the_next_daemon(root, opened, segments):
    manifest = fill(segments)
    segments.publish(OF, CHECKED)
    second = opened()
    left = only(second)
    assert left.checked_by == CHECKED
    second.create(left.of, manifest)
    second.publish(left.of)  # it says nothing new
    third = opened()
    assert only(third).checked_by == CHECKED
    third.create(left.of, manifest)
    third.publish(left.of, ("sha256",) * len(CHECKED))
    fourth = opened()
    assert only(fourth).checked_by == ("sha256",) * len(CHECKED)
    assert fourth.free(left.of)
    assert paths(root) == set()


def test_a_version_of_which_nobody_wrote_by_what_it_was_checked_is_adopted_as_well(
    root, opened, segments
):
    fill(segments)
    segments.publish(OF, CHECKED)
    os.unlink(f"{root}/about/1.checked")
    left = only(opened())
    assert (left.checked_by, left.is_published) == ((), True)
    assert left.manifest is not None


def test_where_there_is_no_room_to_tell_of_checks_a_version_is_published(
    opened, segments, monkeypatch
):
    fill(segments)
    with monkeypatch.context() as patch:
        patch.setattr("cached.adapters.segments.directory._put", no_room)
        assert segments.publish(OF, CHECKED)
    assert only(opened()).checked_by == ()


def no_room(path: str, data: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def test_versions_are_numbered_in_the_order_in_which_they_were_made(opened, segments):
    made = [VersionRef("llm", version) for version in ("c", "a", "b")]
    for of in made:
        fill(segments, of)
        segments.publish(of)
    numbers = {left.of.load: left.of.version for left in opened().found()}
    assert numbers == {1: "c", 2: "a", 3: "b"}


def test_what_goes_counts_no_more_for_a_shared_file_that_went_on_later(opened, segments):
    two_that_share(segments, NEWER)
    fd = segments.reader(FileRef(NEWER, 1))  # of a worker of the dead daemon
    second = opened()
    before = descriptors()
    by_version = {left.of.version: left for left in second.found()}
    older, newer = (by_version[of.version] for of in (OLDER, NEWER))
    assert not second.free(older.of)
    second.create(newer.of, newer.manifest)
    assert second.free(older.of)
    assert read(second, 1, newer.of) == LEFT[NEWER]["shared"]
    assert not second.free(newer.of)
    os.close(fd)
    assert second.free(newer.of)
    assert descriptors() == before - 1


def test_after_a_start_of_the_machine_content_is_not_trusted(root, opened, segments):
    fill(segments)
    segments.publish(OF)
    edit(root, boot_id="another")
    left = only(opened())
    assert left.manifest is not None
    assert not left.is_trusted


@pytest.mark.parametrize(
    "other",
    [
        {**DATA, "config.json": b"{ }"},
        {"config.json": b"{}"},
        {**DATA, "more": b""},
        {path: DATA[path] for path in reversed(DATA)},
    ],
    ids=["a size", "fewer", "more", "order"],
)
def test_another_manifest_than_the_described_one_is_not_adopted_and_can_be_freed(
    root, opened, segments, other
):
    fill(segments)
    segments.publish(OF)
    second = opened()
    before = descriptors()
    left = only(second)
    with pytest.raises(LoadFailed, match="cannot be adopted: it is not what was described; free"):
        second.create(left.of, manifest_of(other))
    assert descriptors() == before
    assert second.free(left.of)
    assert paths(root) == set()


@pytest.mark.parametrize("change", ["length", "mode", "link", "gone"])
def test_what_changed_since_the_start_is_not_adopted(root, opened, segments, change):
    fill(segments)
    directory = segments.publish(OF)
    second = opened()
    left = only(second)
    spoil(f"{directory}/config.json", change)
    before = descriptors()
    with pytest.raises(LoadFailed, match=r"cannot adopt|cannot be adopted"):
        second.create(left.of, left.manifest)
    assert descriptors() == before
    assert second.free(left.of)
    assert paths(root) == set()


@pytest.mark.parametrize("which", ["sub/dir", "sub", "."])
def test_a_link_on_the_way_to_a_file_is_not_followed(root, opened, segments, tmp_path, which):
    fill(segments)
    directory = segments.publish(OF)
    second = opened()
    left = only(second)
    way, elsewhere = os.path.normpath(f"{directory}/{which}"), tmp_path / "elsewhere"
    shutil.move(way, elsewhere)
    os.symlink(elsewhere, way)
    kept = sorted(elsewhere.rglob("*"))
    before = descriptors()
    with pytest.raises(LoadFailed, match=r"cannot adopt .*Not a directory"):
        second.create(left.of, left.manifest)
    assert descriptors() == before
    assert second.free(left.of)
    assert paths(root) == set()
    assert sorted(elsewhere.rglob("*")) == kept


def test_directories_get_the_mode_of_today(root, opened, segments):
    fill(segments)
    directory = segments.publish(OF)
    second = opened(dir_mode=0o755)
    left = only(second)
    second.create(left.of, left.manifest)
    for path in (f"{root}/models", f"{root}/models/llm", directory, f"{directory}/sub/dir"):
        assert os.stat(path).st_mode & 0o777 == 0o755


def edit(root: str, **changes: object) -> None:
    """Change a description as it lies there."""
    (path,) = Path(root, "about").glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil(path: str, how: str) -> None:
    if how == "length":
        os.truncate(path, 1)
    elif how == "mode":
        os.chmod(path, 0o644)
    else:
        os.unlink(path)
        if how == "link":
            os.symlink("/etc/passwd", path)


# Cut after every step, by SIGKILL.

STEPS = (
    *("mkdir", "chmod", "open", "ftruncate", "pwrite", "write", "link", "rename", "replace"),
    *("symlink", "unlink", "rmdir", "fchmod"),
)


def ways(files: Collection[object]) -> tuple[str, ...]:
    return ("crc32",) * len(files)


def first_life(root: str) -> None:
    """What a daemon does: every kind of step."""
    store = DirectorySegments(root)
    for left in store.found():
        store.free(left.of)
    manifest = half(store)
    put(store, part_of(HALF, manifest, 1), LARGE["b/c.bin"])
    fill(store, OF)
    store.publish(OF, ways(DATA))
    store.switch(OF)
    fill(store, NEWER, {"config.json": b"[]", "copy": LARGE["b/c.bin"]}, {1: FileRef(HALF, 1)})
    store.publish(NEWER)
    store.switch(NEWER)
    store.free(OF)
    store.free(HALF)
    store.free(NEWER)
    store.close()


def prepare(root: str) -> None:
    """Leave a version of each state: half, published, current, without a description."""
    store = DirectorySegments(root)
    half(store)
    for of, data in ((OF, DATA), (NEWER, CONTENT["llm", "ffff"])):
        fill(store, of, data)
        store.publish(of)
        store.switch(of)
    broken = VersionRef("llm", OF.version, 9)
    store.create(broken, manifest_of(DATA))
    os.unlink(f"{root}/about/4.json")
    store.close()


def second_life(root: str) -> None:
    """What a daemon does with what another one left."""
    store = DirectorySegments(root)
    for left in store.found():
        if left.manifest is None:
            store.free(left.of)
            continue
        store.create(left.of, left.manifest)
        if not left.is_published:
            for index, body in enumerate(CONTENT[left.of.name, left.of.version].values()):
                put(store, part_of(left.of, left.manifest, index), body)
        store.publish(left.of, ways(left.manifest.objects))
        store.switch(left.of)
    for left in store.found():
        store.free(left.of)
    store.close()


def cut(root: str, step: int, life: Callable[[str], None]) -> bool:
    """Let a process live until a step is done; return whether it came so far."""
    pid = os.fork()
    if not pid:
        left = step

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **named: object) -> object:
                nonlocal left
                result = real(*args, **named)
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        code = 1
        try:
            life(root)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in {0, -signal.SIGKILL}
    return code != 0


CONTENT = {
    ("half", "1"): LARGE,
    ("llm", OF.version): DATA,
    ("llm", "ffff"): {"config.json": b"[]", "copy": LARGE["b/c.bin"]},
}


def check_left(store: DirectorySegments, left: Left) -> None:
    """See that what is said to be there is there; adopt it if it can be."""
    if left.manifest is None:
        assert store.free(left.of)
        return
    data = CONTENT[left.of.name, left.of.version]
    assert left.checked_by in {(), ways(data)}
    for index, span in store.create(left.of, left.manifest):
        body = list(data.values())[index]
        assert read(store, index, left.of)[slice(*span)] == body[slice(*span)]
    if left.is_published:
        for path, body in data.items():
            assert Path(left.path, path).read_bytes() == body
    assert store.free(left.of)


def nothing(root: str) -> None:
    """Leave what is there: nothing."""


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside threads, 3.12
@pytest.mark.parametrize(
    ("before", "life", "steps"), [(nothing, first_life, 80), (prepare, second_life, 40)]
)
def test_a_daemon_that_is_killed_after_any_step_leaves_nothing_wrong(root, before, life, steps):
    step, adopted, broken = 1, 0, 0
    before(root)
    while cut(root, step, life):
        store = DirectorySegments(root)
        for home in Path(root, "models").iterdir():
            assert not (home / "current").is_symlink() or (home / "current").is_dir()
            assert not os.path.lexists(home / ".current")
        for left in store.found():
            adopted += left.manifest is not None
            broken += left.manifest is None
            check_left(store, left)
        assert paths(root) == set(), step
        store.close()
        step += 1
        before(root)
    assert step > steps
    assert adopted > steps // 2
    assert broken > 10
