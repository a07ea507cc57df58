"""A version is made, filled, published and freed in its root, and never anywhere else."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cached.adapters.segments import TmpfsSegments
from cached.core.errors import (
    CachedError,
    HeaderError,
    InvalidConfig,
    LoadFailed,
    ObjectRefused,
)
from cached.core.header import Header, write
from cached.core.objects import FileRef, Manifest, Part, StoredObject, VersionRef

if TYPE_CHECKING:
    from collections.abc import Callable

OF = VersionRef("llm", "0123456789abcdef")
HEADER = write([("a", "U8", (5,))])
DATA = {
    "config.json": b"{}",
    "empty": b"",
    "sub/dir/b c+é.bin": random.Random(1).randbytes(10_000),
    "z.safetensors": HEADER + b"hello",
}


def manifest_of(data: dict[str, bytes], version: str = OF.version) -> Manifest:
    objects = [StoredObject(path, path, len(body), '"e"') for path, body in data.items()]
    return Manifest("s3://b/m/", version, tuple(objects))


def part_of(of: VersionRef, manifest: Manifest, index: int) -> Part:
    stored = manifest.objects[index]
    return Part(index, FileRef(of, index), manifest.uri, stored, 0, stored.size_bytes)


def fill(segments: TmpfsSegments, of: VersionRef = OF, data: dict[str, bytes] = DATA) -> Manifest:
    """Make a version with all its bytes."""
    manifest = manifest_of(data, of.version)
    segments.create(of, manifest)
    for index, body in enumerate(data.values()):
        part = part_of(of, manifest, index)
        segments.sink(part).accept(0, memoryview(body))
        segments.release_sink(part)
    return manifest


def read(segments: TmpfsSegments, index: int, of: VersionRef = OF) -> bytes:
    fd = segments.reader(FileRef(of, index))
    with open(fd, "rb") as file:
        return file.read()


def paths(root: str) -> set[str]:
    return {str(path.relative_to(root)) for path in Path(root).rglob("*")} - {"lock"}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_new_root_is_empty_and_private_while_filling(root, segments):
    assert paths(root) == {"filling", "models"}
    assert os.stat(f"{root}/filling").st_mode & 0o777 == 0o700
    assert os.stat(f"{root}/models").st_mode & 0o777 == 0o750
    assert segments.swept == []


def test_new_files_have_their_length_and_take_no_memory_until_they_are_written(root, segments):
    segments.create(OF, manifest_of(DATA))
    for index, (path, body) in enumerate(DATA.items()):
        found = os.stat(f"{root}/filling/{OF}~0/{path}")
        assert found.st_size == len(body)
        assert found.st_blocks == 0
        assert found.st_mode & 0o777 == 0o600
        assert read(segments, index) == bytes(len(body))


def test_a_published_version_lies_as_its_author_laid_it_out_and_is_read_only(root, segments):
    fill(segments)
    directory = segments.publish(OF)
    assert directory == f"{root}/models/llm/{OF.version}"
    for path, body in DATA.items():
        for base in (directory, f"{root}/models/llm/current"):
            assert Path(base, path).read_bytes() == body
        assert os.stat(f"{directory}/{path}").st_mode & 0o777 == 0o444
    for below in (f"{root}/models/llm", directory, f"{directory}/sub", f"{directory}/sub/dir"):
        assert os.stat(below).st_mode & 0o777 == 0o750
    assert os.readlink(f"{root}/models/llm/current") == OF.version
    assert os.listdir(f"{root}/filling") == []


def test_directories_can_be_open_to_all(root):
    segments = TmpfsSegments(root, dir_mode=0o755)
    fill(segments)
    assert os.stat(segments.publish(OF) + "/sub").st_mode & 0o777 == 0o755
    assert os.stat(f"{root}/models").st_mode & 0o777 == 0o755
    segments.close()


def test_a_newer_version_becomes_current_beside_the_older(root, segments):
    newer = VersionRef("llm", "ffff")
    fill(segments)
    older_directory = segments.publish(OF)
    fill(segments, newer, {"config.json": b"[]"})
    segments.publish(newer)
    assert Path(f"{root}/models/llm/current/config.json").read_bytes() == b"[]"
    assert Path(older_directory, "config.json").read_bytes() == b"{}"
    assert segments.free(OF)
    assert Path(f"{root}/models/llm/current/config.json").read_bytes() == b"[]"
    assert segments.free(newer)
    assert paths(root) == {"filling", "models"}


def test_another_load_of_a_version_is_another_than_the_one_that_failed(root, segments):
    again = OF._replace(load=1)
    fill(segments)
    held = segments.reader(FileRef(OF, 0))
    fill(segments, again, {"config.json": b"[]"})
    directory = Path(segments.publish(again))
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
    assert os.readlink(f"{root}/models/llm/current") == OF.version
    assert not os.path.lexists(f"{root}/models/llm/.current")


def test_a_file_whose_length_was_changed_is_not_published(root, segments):
    fill(segments)
    os.truncate(f"{root}/filling/{OF}~0/config.json", 1)
    with pytest.raises(LoadFailed, match=r"config\.json must have 2 bytes, has 1"):
        segments.publish(OF)
    assert not os.path.exists(f"{root}/models/llm")


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
    assert paths(root) == {"filling", "models"}


@pytest.mark.parametrize("version", ["current", ".current"])
def test_the_name_of_the_link_is_no_version(segments, version):
    with pytest.raises(ObjectRefused, match="that name is taken"):
        segments.create(VersionRef("llm", version), manifest_of(DATA))


def test_what_is_in_the_way_of_making_files_is_an_error_and_can_be_freed(root, segments):
    os.mkdir(f"{root}/filling/{OF}~0")
    with pytest.raises(LoadFailed, match=f"cannot make the files of {OF}.*File exists"):
        segments.create(OF, manifest_of(DATA))
    assert segments.free(OF)
    assert paths(root) == {"filling", "models"}


def failing(number: int) -> Callable[..., None]:
    def fail(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    return fail


FULL = """
import os, sys
from cached.adapters.segments import TmpfsSegments
from cached.core.errors import OutOfSpace
from cached.core.objects import *
objects = (StoredObject("a", "a", 3 << 20, "e"), StoredObject("b", "b", 3 << 20, "e"))
segments, of = TmpfsSegments(sys.argv[1]), VersionRef("m", "1")
segments.create(of, Manifest("s3://b/", "1", objects))
print("ready")
for index, stored in enumerate(objects):
    sink = segments.sink(Part(index, FileRef(of, index), "s3://b/", stored, 0, 3 << 20))
    try:
        sink.accept(0, memoryview(bytes(3 << 20)))
    except OutOfSpace as error:
        print(error.message)
    print(sink.watermark)
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
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    ready, first, message, second, freed = done.stdout.splitlines()
    assert ready == "ready"
    assert first == str(3 << 20)
    assert message.startswith("cannot write b at byte 0: No space")
    assert second == "0"
    assert freed == "True True"


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
    assert descriptors() == before + len(DATA)
    segments.publish(OF)
    assert descriptors() == before + len(DATA)
    assert segments.free(OF)
    assert descriptors() == before
    assert paths(root) == {"filling", "models"}


def test_a_version_counts_until_its_last_descriptor_is_closed(root, segments):
    fill(segments)
    before = descriptors()
    fd = segments.reader(FileRef(OF, 2))
    assert not segments.free(OF)
    assert paths(root) == {"filling", "models"}
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
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing(errno.EBUSY))
        with pytest.raises(LoadFailed, match=r"cannot remove .*busy"):
            segments.free(OF)
    assert segments.free(OF)
    assert paths(root) == {"filling", "models"}


def test_a_root_that_was_cleared_from_outside_is_no_obstacle_to_freeing(root, segments):
    fill(segments)
    directory = Path(segments.publish(OF))
    for path in DATA:
        (directory / path).unlink()
    assert segments.free(OF)


def test_what_a_dead_daemon_left_is_swept(root):
    first = TmpfsSegments(root)
    fill(first)
    first.publish(OF)
    fill(first, VersionRef("half", "1"), {"a": b"abc"})
    fd = first.reader(FileRef(OF, 0))
    first.close()
    Path(root, "models", "stray").touch()
    Path(root, "precious").touch()

    second = TmpfsSegments(root)
    left = {(str(one.of), one.is_published, one.size_bytes) for one in second.swept}
    size = sum(map(len, DATA.values()))
    assert left == {(str(OF), True, size), ("half@1", False, 3)}
    assert paths(root) == {"filling", "models", "precious"}
    assert os.pread(fd, 10, 0) == b"{}"
    os.close(fd)
    second.close()


def test_two_daemons_cannot_have_one_root(root, segments):
    before = descriptors()
    with pytest.raises(
        InvalidConfig, match=f"{root} is in use by another daemon, pid {os.getpid()}"
    ):
        TmpfsSegments(root)
    assert descriptors() == before


def test_a_root_that_cannot_be_swept_is_refused_and_given_up(root, monkeypatch):
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", failing(errno.EROFS))
        with pytest.raises(InvalidConfig, match=r"cannot use segment root .*Read-only"):
            TmpfsSegments(root)
    assert descriptors() == before
    TmpfsSegments(root).close()


def test_closing_leaves_the_files_and_no_descriptor(root):
    before = descriptors()
    segments = TmpfsSegments(root)
    manifest = fill(segments)
    sink = segments.sink(part_of(OF, manifest, 0))
    segments.close()
    assert descriptors() == before
    assert Path(f"{root}/filling/{OF}~0/config.json").read_bytes() == b"{}"
    with pytest.raises(LoadFailed):
        sink.accept(0, memoryview(b"xx"))


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


def write_until_freed(segments: TmpfsSegments, part: Part) -> None:
    try:
        sink = segments.sink(part)
        for at in range(0, 50_000, 10):
            sink.accept(at, memoryview(b"x" * 10))
    except LoadFailed:
        pass


def read_until_freed(segments: TmpfsSegments, file: FileRef) -> None:
    try:
        for _ in range(1000):
            os.close(segments.reader(file))
            segments.read_header(file, 1000)
    except CachedError:
        pass
