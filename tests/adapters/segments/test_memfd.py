"""Sealed memory: nobody changes it once it is published, and nobody needs a tmpfs for it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cached.adapters.segments import MemfdSegments
from cached.adapters.segments.memfd import SEALS, check_sealing
from cached.core.errors import InvalidConfig, LoadFailed, OutOfSpace
from cached.core.objects import FileRef, VersionRef
from tests.adapters.segments.versions import (
    DATA,
    OF,
    descriptors,
    fill,
    manifest_of,
    part_of,
    paths,
    read,
)

if TYPE_CHECKING:
    from tests.adapters.segments.conftest import Opened

ROOT = Path(__file__).parents[3]
NEWER = VersionRef("llm", "ffff", 1)


@pytest.fixture
def kind() -> str:
    return "memfd"


def test_a_new_file_may_be_opened_by_its_owner_alone_and_not_for_writing(segments):
    segments.create(OF, manifest_of(DATA))
    fd = segments.reader(FileRef(OF, 2))
    assert os.fstat(fd).st_mode & 0o7777 == 0o400
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == 0
    os.close(fd)


def test_what_is_published_can_be_changed_by_nobody(segments):
    manifest = fill(segments)
    part = part_of(OF, manifest, 2)
    sink = segments.sink(part)
    directory = segments.publish(OF)
    fd = segments.reader(FileRef(OF, 2))
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == SEALS
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR) if os.geteuid() == 0 else fd
    for attempt in (
        lambda: os.pwrite(own, b"x", 0),
        lambda: os.ftruncate(own, 1),
        lambda: os.ftruncate(own, 20_000),
        lambda: mmap.mmap(own, 0, access=mmap.ACCESS_WRITE),
        lambda: fcntl.fcntl(own, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ):
        with pytest.raises(OSError, match=r"not permitted|Permission denied|Bad file|Invalid"):
            attempt()
    with pytest.raises(LoadFailed):
        sink.accept(0, memoryview(b"x"))  # not even by the daemon
    assert Path(directory, "sub/dir/b c+é.bin").read_bytes() == DATA["sub/dir/b c+é.bin"]
    os.close(fd)
    if own != fd:
        os.close(own)


def test_a_file_that_somebody_maps_for_writing_is_quarantined_for_good(root, segments):
    fill(segments)
    inside = next(
        fd
        for fd in map(int, os.listdir("/proc/self/fd"))
        if is_memfd(fd) and os.fstat(fd).st_size == 10_000
    )
    mapped = mmap.mmap(inside, 0)  # as a process of this user could through /proc
    with pytest.raises(LoadFailed, match=r"b c\+é\.bin is quarantined: .* mapped for writing"):
        segments.publish(OF)
    mapped.close()
    with pytest.raises(LoadFailed, match="quarantined"):
        segments.publish(OF)
    assert paths(root) == set()
    with pytest.raises(LoadFailed, match="not published"):
        segments.switch(OF)
    data = {"copy": DATA["sub/dir/b c+é.bin"]}
    fill(segments, NEWER, data, {0: FileRef(OF, 2)})
    with pytest.raises(LoadFailed, match="quarantined"):
        segments.publish(NEWER)
    assert segments.free(OF)
    assert segments.free(NEWER)


def is_memfd(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:cached:")
    except OSError:
        return False


def test_a_refusal_of_the_seal_for_another_reason_is_told(segments, monkeypatch):
    fill(segments)

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", refuse)
        with pytest.raises(LoadFailed, match=f"cannot publish {OF}"):
            segments.publish(OF)
    assert segments.publish(OF)


def test_paths_are_links_to_the_memory_of_this_process(root, segments):
    fill(segments)
    directory = segments.publish(OF)
    for path, body in DATA.items():
        link = os.readlink(f"{directory}/{path}")
        assert link.startswith(f"/proc/{os.getpid()}/fd/")
        assert Path(directory, path).read_bytes() == body
    done = subprocess.run(
        ("cat", f"{directory}/sub/dir/b c+é.bin"), capture_output=True, check=True
    )
    assert done.stdout == DATA["sub/dir/b c+é.bin"]


def test_a_publication_that_failed_half_way_can_be_tried_again(root, segments, monkeypatch):
    fill(segments)
    real = os.symlink

    def refuse(source: str, target: str) -> None:
        if target.endswith("z.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", refuse)
        with pytest.raises(OutOfSpace):
            segments.publish(OF)
    directory = segments.publish(OF)
    assert Path(directory, "z.safetensors").read_bytes() == DATA["z.safetensors"]
    assert segments.free(OF)
    assert paths(root) == set()


def test_links_go_when_it_is_closed(root):
    segments = MemfdSegments(root)
    fill(segments)
    segments.publish(OF)
    segments.switch(OF)
    fd = segments.reader(FileRef(OF, 0))
    segments.close()
    assert os.listdir(root) == ["lock"]
    assert os.pread(fd, 9, 0) == b"{}"
    os.close(fd)


def test_a_purge_takes_nothing_from_the_daemon_that_comes_next(root, monkeypatch):
    segments = MemfdSegments(root)
    real, others = os.rmdir, []

    def rmdir(path: str, **more: int) -> None:
        real(path, **more)
        if path == root:  # at this moment the next one starts
            others.append(MemfdSegments(root))
            fill(others[0])
            others[0].publish(OF)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", rmdir)
        segments.purge()
    assert os.listdir(f"{root}/models/{OF.name}")
    others[0].close()


def test_links_of_a_dead_daemon_are_swept_and_nothing_of_it_is_found(root, opened: Opened):
    first = opened()
    fill(first)
    first.publish(OF)
    first.switch(OF)
    fd = first.reader(FileRef(OF, 0))
    before = descriptors()
    second = opened()
    assert descriptors() == before - len(DATA)
    assert second.found() == []
    assert paths(root) == set()
    assert os.pread(fd, 9, 0) == b"{}"
    os.close(fd)


def test_what_a_daemon_with_files_left_is_swept_without_following_links(root, opened: Opened):
    os.makedirs(f"{root}/models/llm/1")
    os.symlink(root + "/../precious", f"{root}/models/llm/1/link")
    Path(root, "..", "precious").touch()
    opened()
    assert paths(root) == set()
    assert Path(root, "..", "precious").exists()


def test_a_kernel_without_sealed_memory_is_refused_with_what_to_do(root, monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    check_sealing()
    before = descriptors()
    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(InvalidConfig, match=r"no sealed memory .*; choose tmpfs or file"):
        MemfdSegments(root)
    assert descriptors() == before


LONELY = """
import os, sys
from cached.adapters.segments import open_segments
from tests.adapters.segments.versions import DATA, OF, fill, read
from cached.adapters.segments.opening import file_system
assert file_system("/dev/shm") != "tmpfs" and os.listdir("/dev/shm") == []
print("hidden")
segments = open_segments("auto", sys.argv[1])
fill(segments)
directory = segments.publish(OF)
segments.switch(OF)
assert [read(segments, index) for index in range(len(DATA))] == list(DATA.values())
for path, body in DATA.items():
    with open(f"{sys.argv[1]}/models/llm/current/{path}", "rb") as file:
        assert file.read() == body
print(segments.kind, segments.free(OF), os.listdir("/dev/shm"))
"""


def test_it_works_where_there_is_no_tmpfs(tmp_path):
    """As on Lambda: /dev/shm is no tmpfs, has nothing in it, and cannot be written."""
    script = (
        'mkdir "$1/none" && mount --bind "$1/none" /dev/shm && '
        "mount -o remount,bind,ro /dev/shm || exit 77; "
        'exec "$2" -c "$3" "$1/root"'
    )
    command = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    done = subprocess.run(
        (*command, str(tmp_path), sys.executable, LONELY),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"NOT PROVEN HERE: /dev/shm cannot be hidden: {done.stderr.strip()}")
    assert done.stdout.splitlines() == ["hidden", "memfd True []"], done.stderr


def test_a_reader_is_not_counted_once_it_is_closed(segments):
    fill(segments)
    segments.publish(OF)
    for _ in range(3):
        assert read(segments, 0) == b"{}"
    assert segments.free(OF, if_unused=True)
