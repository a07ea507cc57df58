"""What every store of segments promises, whatever the memory is made of.

A version is made, filled, published, shared, made current and freed in its root, and never
anywhere else.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cached.adapters.segments import store
from cached.adapters.segments.leases import Leases
from cached.core.errors import (
    CachedError,
    HeaderError,
    InvalidConfig,
    LoadFailed,
    ObjectRefused,
    OutOfSpace,
)
from cached.core.header import Header
from cached.core.objects import FileRef, Range, VersionRef
from tests.adapters.segments.versions import (
    DATA,
    HEADER,
    OF,
    STORES,
    descriptors,
    fill,
    manifest_of,
    part_of,
    paths,
    put,
    read,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.adapters.segments import Segments
    from cached.core.objects import Part

NEWER = VersionRef("llm", "ffff", 1)
NEWER_DATA = {"config.json": b"[]", "copy.bin": DATA["sub/dir/b c+é.bin"]}
BIG = "sub/dir/b c+é.bin"
SHARED = {1: FileRef(OF, 2)}  # the large file, under another name


def test_a_new_root_is_empty_and_private_while_filling(root, segments):
    assert paths(root) == set()
    assert segments.found() == []
    assert os.stat(f"{root}/filling").st_mode & 0o777 == 0o700
    assert os.stat(f"{root}/models").st_mode & 0o777 == 0o750


def test_new_files_have_their_length_and_take_no_memory_until_they_are_written(segments):
    assert segments.create(OF, manifest_of(DATA)) == []
    for index, body in enumerate(DATA.values()):
        assert read(segments, index) == bytes(len(body))
        fd = segments.reader(FileRef(OF, index))
        assert os.fstat(fd).st_blocks == 0
        os.close(fd)


def test_a_published_version_lies_as_its_author_laid_it_out(root, segments):
    fill(segments)
    directory = segments.publish(OF)
    segments.switch(OF)
    assert directory == f"{root}/models/llm/{OF.version}"
    for path, body in DATA.items():
        for base in (directory, f"{root}/models/llm/current"):
            assert Path(base, path).read_bytes() == body
        assert os.stat(f"{directory}/{path}").st_mode & 0o222 == 0
    for below in (f"{root}/models/llm", directory, f"{directory}/sub", f"{directory}/sub/dir"):
        assert os.stat(below).st_mode & 0o777 == 0o750
    assert os.readlink(f"{root}/models/llm/current") == OF.version
    assert os.listdir(f"{root}/filling") == []


def test_publishing_again_changes_nothing(root, segments):
    fill(segments)
    directory = segments.publish(OF)
    before = paths(root)
    assert segments.publish(OF) == directory
    assert paths(root) == before


def test_what_is_not_published_is_never_current(root, segments):
    fill(segments)
    with pytest.raises(LoadFailed, match="it is not published"):
        segments.switch(OF)
    assert not os.path.lexists(f"{root}/models/llm/current")


def test_directories_can_be_open_to_all(kind, root):
    segments = STORES[kind](root, dir_mode=0o755)
    fill(segments)
    assert os.stat(segments.publish(OF) + "/sub").st_mode & 0o777 == 0o755
    assert os.stat(f"{root}/models").st_mode & 0o777 == 0o755
    segments.close()


def test_current_changes_only_when_it_is_switched_and_can_be_switched_back(root, segments):
    current = Path(f"{root}/models/llm/current/config.json")
    fill(segments)
    segments.publish(OF)
    segments.switch(OF)
    fill(segments, NEWER, NEWER_DATA)
    segments.publish(NEWER)
    assert current.read_bytes() == b"{}"
    segments.switch(NEWER)
    assert current.read_bytes() == b"[]"
    segments.switch(OF)
    assert current.read_bytes() == b"{}"
    assert Path(root, "models/llm/ffff/config.json").read_bytes() == b"[]"
    assert segments.free(OF)
    assert not os.path.lexists(current.parent)
    segments.switch(NEWER)
    assert current.read_bytes() == b"[]"
    assert segments.free(NEWER)
    assert paths(root) == set()


def test_another_user_of_current_sees_one_version_or_the_other_but_never_none(root, segments):
    for of, data in ((OF, DATA), (NEWER, NEWER_DATA)):
        fill(segments, of, data)
        segments.publish(of)
    segments.switch(OF)
    seen: set[str] = set()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            seen.add(os.readlink(f"{root}/models/llm/current"))
        seen.add("looked to the end")

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(200):
        segments.switch(NEWER)
        segments.switch(OF)
    is_over.set()
    looking.join()
    assert "looked to the end" in seen


def test_another_load_of_a_version_is_another_than_the_one_that_failed(root, segments):
    again = OF._replace(load=1)
    fill(segments)
    held = segments.reader(FileRef(OF, 0))
    fill(segments, again, {"config.json": b"[]"})
    directory = Path(segments.publish(again))
    segments.switch(again)
    assert not segments.free(OF)
    assert Path(root, "models/llm/current/config.json").read_bytes() == b"[]"
    assert os.pread(held, 10, 0) == b"{}"
    assert read(segments, 0, again) == b"[]"
    os.close(held)
    assert segments.free(OF)
    assert (directory / "config.json").exists()


def test_a_link_that_a_killed_daemon_left_half_made_is_no_obstacle(root, segments):
    fill(segments)
    os.mkdir(f"{root}/models/llm")
    os.symlink("elsewhere", f"{root}/models/llm/.current")
    segments.publish(OF)
    segments.switch(OF)
    assert os.readlink(f"{root}/models/llm/current") == OF.version
    assert not os.path.lexists(f"{root}/models/llm/.current")


def test_a_directory_that_is_in_the_way_of_publishing_is_an_error(root, segments):
    fill(segments)
    os.makedirs(f"{root}/models/llm/{OF.version}/full")
    with pytest.raises(LoadFailed, match=f"cannot publish {OF}"):
        segments.publish(OF)


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "../../etc", "/etc", "a\0b", "a\nb", "x" * 256]
)
def test_a_hostile_name_is_refused_and_makes_nothing(root, segments, name):
    for of in (VersionRef(name, "1"), VersionRef("llm", name)):
        with pytest.raises(ObjectRefused):
            segments.create(of, manifest_of(DATA))
    with pytest.raises(ObjectRefused):
        segments.create(OF, manifest_of({name: b"", "../x": b""}))
    assert paths(root) == set()


@pytest.mark.parametrize("version", ["current", ".current"])
def test_the_name_of_the_link_is_no_version(segments, version):
    with pytest.raises(ObjectRefused, match="that name is taken"):
        segments.create(VersionRef("llm", version), manifest_of(DATA))


def failing(number: int) -> Callable[..., None]:
    def fail(*_: int, **__: int) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_part_has_one_sink_until_it_is_released(segments):
    manifest = manifest_of(DATA)
    segments.create(OF, manifest)
    part = part_of(OF, manifest, 2)
    sink = segments.sink(part)
    sink.accept(0, memoryview(DATA["sub/dir/b c+é.bin"])[:100])
    again = segments.sink(part._replace(attempt=1))
    assert again is sink
    assert again.watermark == 100
    segments.release_sink(part)
    assert segments.sink(part) is not sink


def test_what_is_freed_takes_no_more_bytes(segments):
    manifest = manifest_of(DATA)
    segments.create(OF, manifest)
    part = part_of(OF, manifest, 0)
    sink = segments.sink(part)
    segments.free(OF)
    with pytest.raises(LoadFailed, match="not in memory any more"):
        sink.accept(0, memoryview(b"{}"))
    segments.release_sink(part)
    with pytest.raises(LoadFailed, match=f"{OF} is not in memory any more"):
        segments.sink(part)
    with pytest.raises(LoadFailed):
        segments.reader(FileRef(OF, 0))
    with pytest.raises(LoadFailed):
        segments.read_header(FileRef(OF, 3), 100)
    with pytest.raises(LoadFailed):
        segments.publish(OF)


def test_every_reader_is_read_only_with_a_description_of_its_own(segments):
    fill(segments)
    first, second = (segments.reader(FileRef(OF, 2)) for _ in range(2))
    os.lseek(first, 100, os.SEEK_SET)
    assert os.lseek(second, 0, os.SEEK_CUR) == 0
    for fd in (first, second):
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        os.close(fd)


def test_a_reader_works_before_and_after_publication(segments):
    fill(segments)
    before = segments.reader(FileRef(OF, 0))
    segments.publish(OF)
    after = segments.reader(FileRef(OF, 0))
    for fd in (before, after):
        assert os.pread(fd, 10, 0) == b"{}"
        os.close(fd)


def test_bytes_that_come_later_show_in_a_map_made_before(segments):
    manifest = manifest_of(DATA)
    segments.create(OF, manifest)
    fd = segments.reader(FileRef(OF, 2))
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as mapped:
        os.close(fd)
        assert mapped[:3] == bytes(3)
        segments.sink(part_of(OF, manifest, 2)).accept(0, memoryview(b"abc"))
        assert mapped[:3] == b"abc"


def test_a_header_is_read_once_it_is_there(segments):
    fill(segments)
    file = FileRef(OF, 3)
    found = segments.read_header(file, len(HEADER))
    assert isinstance(found, Header)
    assert list(found.tensors) == ["a"]
    assert segments.read_header(file, len(HEADER) - 1) == len(HEADER)
    assert segments.read_header(file, 8) == len(HEADER)
    assert segments.read_header(file, 7) == 8


def test_a_header_that_cannot_be_read_for_want_of_a_descriptor_is_refused_with_what_to_do(
    segments, monkeypatch
):
    def none_left(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    fill(segments)
    monkeypatch.setattr(os, "dup", none_left)
    with pytest.raises(LoadFailed, match=r"cannot read z\.safetensors .*; raise .* \(ulimit -n\)"):
        segments.read_header(FileRef(OF, 3), 100)


def test_a_file_that_is_no_safetensors_file_is_refused(segments):
    fill(segments)
    for index in (1, 2):
        with pytest.raises(HeaderError):
            segments.read_header(FileRef(OF, index), 10_000)


def test_an_unknown_version_is_free(segments):
    assert segments.free(OF)


def test_a_freed_version_leaves_no_path_and_no_descriptor(root, segments):
    before = descriptors()
    fill(segments)
    assert descriptors() <= before + len(DATA) + 1  # the map, where there is one
    segments.publish(OF)
    assert descriptors() == before + len(DATA)
    assert segments.free(OF)
    assert descriptors() == before
    assert paths(root) == set()


def test_a_version_counts_until_its_last_descriptor_is_closed(root, segments):
    fill(segments)
    segments.publish(OF)
    before = descriptors()
    fd = segments.reader(FileRef(OF, 2))
    assert not segments.free(OF)
    assert paths(root) == set()
    assert descriptors() == before - len(DATA) + 2  # the reader's, and ours of that file
    assert os.pread(fd, 10, 0) == DATA["sub/dir/b c+é.bin"][:10]
    assert not segments.free(OF)
    os.close(fd)
    assert segments.free(OF)


MAP = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
os.close(fd)
print("mapped", flush=True)
sys.stdin.read()
print(mapped[:5].hex())
"""


def mapping(path: str) -> subprocess.Popen[str]:
    """Return a process that maps a file by its path."""
    process = subprocess.Popen(
        (sys.executable, "-I", "-S", "-c", MAP, path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "mapped\n"
    return process


def test_a_version_counts_while_a_process_that_knows_only_the_path_maps_it(segments):
    fill(segments)
    directory = segments.publish(OF)
    with mapping(f"{directory}/sub/dir/b c+é.bin") as worker:
        assert not segments.free(OF)
        assert not segments.free(OF)
        printed, _ = worker.communicate("")
    assert printed == DATA["sub/dir/b c+é.bin"][:5].hex() + "\n"
    assert segments.free(OF)


def test_a_version_is_free_as_soon_as_a_process_that_mapped_it_is_killed(segments):
    fill(segments)
    directory = segments.publish(OF)
    with mapping(f"{directory}/z.safetensors") as worker:
        assert not segments.free(OF)
        worker.kill()
    assert segments.free(OF)


def test_where_the_kernel_cannot_tell_a_version_is_taken_as_free(segments, monkeypatch):
    fill(segments)
    monkeypatch.setattr(fcntl, "fcntl", failing(errno.EINVAL))
    assert segments.free(OF)


def test_what_cannot_be_unlinked_is_an_error_and_can_be_freed_later(root, segments, monkeypatch):
    fill(segments)
    segments.publish(OF)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing(errno.EBUSY))
        with pytest.raises(LoadFailed, match=r"cannot remove .*busy"):
            segments.free(OF)
    assert read(segments, 0) == b"{}"
    assert segments.free(OF)
    assert paths(root) == set()


def test_freeing_beside_threads_that_write_and_read_harms_no_other_file(segments):
    other = VersionRef("other", "1")
    bystander = random.Random(2).randbytes(50_000)
    for turn in range(20):
        data = {"a": bytes(50_000), "b.safetensors": HEADER + b"hello"}
        manifest = manifest_of(data)
        segments.create(OF, manifest)
        part = part_of(OF, manifest, 0)._replace(part_id=turn)
        threads = [
            threading.Thread(target=write_until_freed, args=(segments, part)),
            threading.Thread(target=read_until_freed, args=(segments, FileRef(OF, 1))),
        ]
        for thread in threads:
            thread.start()
        while not segments.free(OF):
            pass
        fill(segments, other, {"bystander": bystander})  # takes the numbers of the descriptors
        for thread in threads:
            thread.join()
        assert read(segments, 0, other) == bystander
        assert segments.free(other)


def test_what_has_a_shorter_life_than_its_version_leaks_no_descriptor(segments):
    fill(segments)
    segments.publish(OF)
    before = descriptors()
    for _ in range(3):
        os.close(segments.reader(FileRef(OF, 2)))
        segments.read_header(FileRef(OF, 3), 1000)
        fd = segments.reader(FileRef(OF, 0))
        assert not segments.free(OF, if_unused=True)
        os.close(fd)
    assert descriptors() == before


def test_what_was_opened_before_is_read_after_the_version_is_freed(segments):
    fill(segments)
    segments.publish(OF)
    fd = segments.reader(FileRef(OF, 2))
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as mapped:
        assert not segments.free(OF)
        assert mapped[:] == DATA[BIG]
        assert os.fstat(fd).st_size == len(DATA[BIG])
    os.close(fd)
    assert segments.free(OF)


@pytest.mark.parametrize("use", ["descriptor", "map", "path"])
def test_what_somebody_uses_is_not_freed_if_it_must_be_unused(root, segments, use):
    fill(segments)
    directory = segments.publish(OF)
    segments.switch(OF)
    before, visible = descriptors(), paths(root)
    if use == "path":
        with mapping(f"{directory}/{BIG}") as worker:
            assert not segments.free(OF, if_unused=True)
            worker.communicate("")
    else:
        fd = segments.reader(FileRef(OF, 2))
        mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ) if use == "map" else None
        if mapped is not None:
            os.close(fd)
        assert not segments.free(OF, if_unused=True)
        if mapped is None:
            os.close(fd)
        else:
            mapped.close()
    assert paths(root) == visible
    assert descriptors() == before
    assert Path(f"{root}/models/llm/current/config.json").read_bytes() == b"{}"
    assert read(segments, 2) == DATA[BIG]
    assert segments.free(OF, if_unused=True)
    assert paths(root) == set()
    assert descriptors() == before - len(DATA)
    with pytest.raises(LoadFailed):
        segments.reader(FileRef(OF, 0))


def test_what_cannot_be_unlinked_while_it_is_unused_stays_as_it_was(segments, monkeypatch):
    fill(segments)
    directory = segments.publish(OF)
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing(errno.EBUSY))
        with pytest.raises(LoadFailed, match="cannot remove"):
            segments.free(OF, if_unused=True)
    assert descriptors() == before
    assert Path(directory, BIG).read_bytes() == DATA[BIG]
    assert read(segments, 2) == DATA[BIG]  # nobody waits for a lease
    assert segments.free(OF, if_unused=True)


def came(leases: Leases, path: str, got: list[bytes]) -> threading.Thread:
    """Have somebody open a file by its path; return once he waits for a lease."""
    thread = threading.Thread(target=lambda: got.append(Path(path).read_bytes()))
    thread.start()
    while not leases.are_contested():
        os.sched_yield()
    return thread


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Leases]:
    """All sets of leases, as they are made."""
    made: list[Leases] = []

    class Noted(Leases):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(store, "Leases", Noted)
    return made


def test_whoever_comes_by_path_before_an_unused_version_is_out_of_sight_keeps_it(
    root, segments, monkeypatch, taken
):
    fill(segments)
    directory = segments.publish(OF)
    segments.switch(OF)
    before, visible = descriptors(), paths(root)
    got: list[bytes] = []
    threads: list[threading.Thread] = []
    real = os.rename

    def rename(source: str, target: str) -> None:
        if not threads:
            threads.append(came(taken[-1], f"{directory}/{BIG}", got))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        assert not segments.free(OF, if_unused=True)
    threads[0].join()
    assert got == [DATA[BIG]]
    assert (descriptors(), paths(root)) == (before, visible)
    assert Path(f"{root}/models/llm/current", BIG).read_bytes() == DATA[BIG]
    assert segments.publish(OF) == directory
    assert read(segments, 2) == DATA[BIG]
    assert segments.free(OF, if_unused=True)
    assert paths(root) == set()


def test_what_cannot_be_shown_again_is_served_on_by_descriptor_and_can_be_freed(
    root, segments, monkeypatch, taken
):
    fill(segments)
    directory = segments.publish(OF)
    fill(segments, NEWER, NEWER_DATA)
    segments.publish(NEWER)
    threads: list[threading.Thread] = []
    real = os.rename

    def rename(source: str, target: str) -> None:
        if threads:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        threads.append(came(taken[-1], f"{directory}/{BIG}", []))
        real(source, target)

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(LoadFailed, match=r"cannot remove .*Read-only"):
            segments.free(OF, if_unused=True)
    threads[0].join()
    assert descriptors() == before
    assert read(segments, 2) == DATA[BIG]
    assert segments.free(OF, if_unused=True)
    assert segments.free(NEWER, if_unused=True), "what is in the way is removed"
    assert not Path(root, "models").exists() or not os.listdir(f"{root}/models")


def test_where_there_is_no_place_to_move_it_a_version_is_removed_where_it_lies(root, segments):
    fill(segments)
    segments.publish(OF)
    os.rmdir(f"{root}/filling")
    assert segments.free(OF, if_unused=True)
    assert not os.listdir(f"{root}/models")


def test_the_daemon_never_waits_for_a_lease_of_its_own(segments):
    """The kernel tells the holder of a lease of everybody who waits for it: SIGURG."""
    data = {f"{number}": b"x" for number in range(50)}
    fill(segments, OF, data)
    segments.publish(OF)
    waits: list[int] = []
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            os.close(segments.reader(FileRef(OF, 0)))

    fd = segments.reader(FileRef(OF, 49))  # comes last
    before = signal.signal(signal.SIGURG, lambda number, _: waits.append(number))
    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(300):
        assert not segments.free(OF, if_unused=True)
    ends.set()
    asking.join()
    signal.signal(signal.SIGURG, before)
    os.close(fd)
    assert not waits


def test_who_asks_while_an_unused_version_goes_is_told_at_once(segments, monkeypatch):
    fill(segments)
    segments.publish(OF)
    asked: list[str] = []
    real = os.unlink

    def unlink(path: str, **named: int) -> None:
        with pytest.raises(LoadFailed, match="not in memory any more"):
            segments.reader(FileRef(OF, 2))  # would wait for the lease, 45 s
        asked.append(path)
        real(path, **named)

    monkeypatch.setattr(os, "unlink", unlink)
    assert segments.free(OF, if_unused=True)
    assert asked


def test_a_shared_file_is_the_same_memory_and_there_at_once(segments):
    fill(segments)
    segments.publish(OF)
    before = descriptors()
    there = segments.create(NEWER, manifest_of(NEWER_DATA, NEWER.version), SHARED)
    assert there == [(1, Range(0, 10_000))]
    fds = [segments.reader(FileRef(OF, 2)), segments.reader(FileRef(NEWER, 1))]
    assert os.path.sameopenfile(*fds)
    for fd in fds:
        os.close(fd)
    assert descriptors() <= before + 1 + 1  # the file of its own, and the map
    put(segments, part_of(NEWER, manifest_of(NEWER_DATA, NEWER.version), 0), b"[]")
    directory = segments.publish(NEWER)
    assert Path(directory, "copy.bin").read_bytes() == DATA[BIG]
    assert descriptors() == before + 1


def test_what_is_published_is_all_there_though_a_part_has_not_ended(segments):
    data = {"a": b"abc", "b": b"de"}
    again = manifest_of(data, NEWER.version)
    segments.create(NEWER, again)
    for index, body in enumerate(data.values()):
        segments.sink(part_of(NEWER, again, index)).accept(0, memoryview(body))
    segments.publish(NEWER)
    third = VersionRef("llm", "3", 2)
    there = segments.create(third, manifest_of({"b": b"de"}, "3"), {0: FileRef(NEWER, 1)})
    assert there == [(0, (0, 2))]


def test_of_a_file_that_is_still_being_filled_what_came_is_shared(segments):
    manifest = manifest_of(DATA)
    segments.create(OF, manifest)
    put(segments, part_of(OF, manifest, 2, 0, 4000), DATA[BIG][:4000])
    put(segments, part_of(OF, manifest, 2, 6000)._replace(part_id=9), DATA[BIG][6000:])
    newer = manifest_of(NEWER_DATA, NEWER.version)
    there = segments.create(NEWER, newer, SHARED)
    assert there == [(1, Range(0, 4000)), (1, Range(6000, 10_000))]
    put(segments, part_of(NEWER, newer, 1, 4000, 6000), DATA[BIG][4000:6000])
    assert read(segments, 2) == DATA[BIG]
    put(segments, part_of(NEWER, newer, 0), b"[]")
    segments.publish(NEWER)
    assert read(segments, 1, NEWER) == DATA[BIG]
    for index in (0, 1, 3):
        put(segments, part_of(OF, manifest, index), list(DATA.values())[index])
    segments.publish(OF)
    assert read(segments, 2) == DATA[BIG]


@pytest.mark.parametrize("first", ["older", "newer"])
def test_a_shared_file_lives_until_the_last_version_that_has_it_is_free(root, segments, first):
    before = descriptors()
    fill(segments)
    segments.publish(OF)
    fill(segments, NEWER, NEWER_DATA, SHARED)
    segments.publish(NEWER)
    fd = segments.reader(FileRef(OF, 2))  # of a worker that uses the older one
    gone, stays, index = (OF, NEWER, 1) if first == "older" else (NEWER, OF, 2)
    assert segments.free(gone), "only what is not shared decides"
    assert read(segments, index, stays) == DATA[BIG]
    assert Path(root, "models", stays.name, stays.version).is_dir()
    assert not segments.free(stays, if_unused=True)
    assert not segments.free(stays)
    assert os.pread(fd, 3, 0) == DATA[BIG][:3]
    os.close(fd)
    assert segments.free(stays)
    assert paths(root) == set()
    assert descriptors() == before


def test_a_use_of_what_is_shared_keeps_no_version_from_being_freed_if_unused(segments):
    fill(segments)
    segments.publish(OF)
    fill(segments, NEWER, NEWER_DATA, SHARED)
    segments.publish(NEWER)
    fd = segments.reader(FileRef(OF, 2))
    assert segments.free(OF, if_unused=True)
    assert read(segments, 1, NEWER) == DATA[BIG]
    os.close(fd)
    assert segments.free(NEWER)


def test_a_file_is_shared_on_after_its_first_version_is_gone(segments):
    fill(segments)
    segments.publish(OF)
    fill(segments, NEWER, NEWER_DATA, SHARED)
    segments.free(OF)
    third, data = VersionRef("llm", "3", 2), {"third/name": DATA[BIG]}
    there = segments.create(third, manifest_of(data, "3"), {0: FileRef(NEWER, 1)})
    assert there == [(0, Range(0, 10_000))]
    assert Path(segments.publish(third), "third/name").read_bytes() == DATA[BIG]


def test_a_version_that_is_here_is_not_made_again(segments):
    fill(segments)
    with pytest.raises(LoadFailed, match=f"{OF}, load 0, is here already; free it"):
        segments.create(OF, manifest_of(DATA))
    assert read(segments, 0) == b"{}"


def test_what_is_gone_cannot_be_shared_and_another_size_neither(root, segments):
    fill(segments)
    with pytest.raises(ValueError, match="another size"):
        segments.create(NEWER, manifest_of(NEWER_DATA, NEWER.version), {1: FileRef(OF, 0)})
    segments.free(OF)
    with pytest.raises(LoadFailed, match=f"{OF} is not in memory any more"):
        segments.create(NEWER, manifest_of(NEWER_DATA, NEWER.version), SHARED)
    assert paths(root) == set()


def test_files_that_cannot_be_made_leave_no_descriptor_and_what_they_share(
    root, segments, monkeypatch
):
    fill(segments)
    segments.publish(OF)
    before = descriptors(), paths(root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", failing(errno.ENOSPC))
        with pytest.raises(OutOfSpace, match=f"cannot make the files of {NEWER}"):
            segments.create(NEWER, manifest_of({**NEWER_DATA, "z": b"z"}, NEWER.version), SHARED)
    assert descriptors() == before[0]
    with pytest.raises(LoadFailed):
        segments.reader(FileRef(NEWER, 0))
    assert segments.free(NEWER)
    assert (descriptors(), paths(root)) == before
    assert read(segments, 2) == DATA[BIG]
    assert segments.free(OF)


def test_closing_leaves_no_descriptor_and_takes_no_more_bytes(kind, root):
    before = descriptors()
    segments = STORES[kind](root)
    manifest = fill(segments)
    sink = segments.sink(part_of(OF, manifest, 0))
    fill(segments, NEWER, NEWER_DATA, SHARED)
    segments.publish(NEWER)
    segments.close()
    assert descriptors() == before
    with pytest.raises(LoadFailed):
        sink.accept(0, memoryview(b"xx"))


def test_a_purge_leaves_nothing(kind, root):
    segments = STORES[kind](root)
    fill(segments)
    segments.publish(OF)
    segments.switch(OF)
    fill(segments, NEWER, NEWER_DATA)
    fd = segments.reader(FileRef(OF, 2))
    segments.purge()
    assert not os.path.lexists(root)
    assert os.pread(fd, 10, 0) == DATA[BIG][:10]
    os.close(fd)


def test_two_daemons_cannot_have_one_root(kind, root, segments):
    before = descriptors()
    with pytest.raises(
        InvalidConfig, match=f"{root} is in use by another daemon, pid {os.getpid()}"
    ):
        STORES[kind](root)
    assert descriptors() == before


def test_a_root_that_cannot_be_used_is_refused_and_given_up(kind, root, monkeypatch):
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", failing(errno.EROFS))
        with pytest.raises(InvalidConfig, match=r"cannot use segment root .*Read-only"):
            STORES[kind](root)
    assert descriptors() == before
    STORES[kind](root).close()


def write_until_freed(segments: Segments, part: Part) -> None:
    try:
        sink = segments.sink(part)
        for at in range(0, 50_000, 10):
            sink.accept(at, memoryview(b"x" * 10))
    except LoadFailed:
        pass


def read_until_freed(segments: Segments, file: FileRef) -> None:
    try:
        for _ in range(1000):
            os.close(segments.reader(file))
            segments.read_header(file, 1000)
    except CachedError:
        pass
