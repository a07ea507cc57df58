"""The back end is what the operator says or what the root allows; what cannot be is refused."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import pytest

from cached.adapters.segments import opening
from cached.adapters.segments.opening import KINDS, file_system, open_segments
from cached.core.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def shm() -> Iterator[str]:
    """A directory on a tmpfs."""
    if file_system("/dev/shm") != "tmpfs" or not os.access("/dev/shm", os.W_OK):
        pytest.skip("NOT PROVEN HERE: /dev/shm is no tmpfs to write to")
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cached-test-") as path:
        yield path


@pytest.fixture
def disk(tmp_path: Path) -> str:
    if file_system(str(tmp_path)) == "tmpfs":
        pytest.skip("NOT PROVEN HERE: temporary files lie on a tmpfs")
    return str(tmp_path)


def opened_as(kind: str, root: str) -> str:
    segments = open_segments(kind, root)
    segments.purge()
    return segments.kind


def test_on_a_tmpfs_files_are_taken_and_elsewhere_sealed_memory(shm, disk):
    assert opened_as("auto", f"{shm}/deep/root") == "tmpfs"
    assert opened_as("auto", f"{disk}/deep/root") == "memfd"


def test_a_tmpfs_that_cannot_be_written_is_not_taken(shm, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert opened_as("auto", f"{shm}/root") == "memfd"


def test_a_kind_can_be_forced(shm, disk):
    assert opened_as("tmpfs", f"{shm}/root") == "tmpfs"
    assert opened_as("file", f"{disk}/root") == "file"
    assert opened_as("memfd", f"{shm}/root") == "memfd"
    assert opened_as("memfd", f"{disk}/root") == "memfd"


def test_a_kind_that_is_not_possible_is_refused_with_why_and_what_to_do(shm, disk):
    with pytest.raises(InvalidConfig, match=rf"on a tmpfs: {disk}/r lies on \w+; name a directory"):
        open_segments("tmpfs", f"{disk}/r")
    with pytest.raises(InvalidConfig, match=rf"on a disk: {shm}/r lies on a tmpfs; name a dir"):
        open_segments("file", f"{shm}/r")
    with pytest.raises(InvalidConfig, match="one of auto, tmpfs, memfd, file, was 'disk'"):
        open_segments("disk", f"{disk}/r")
    assert os.listdir(disk) == os.listdir(shm) == []


@pytest.mark.parametrize("kind", KINDS)
def test_directories_have_the_mode_that_was_asked_for(kind, shm, disk):
    root = f"{disk if kind == 'file' else shm}/root"
    segments = open_segments(kind, root, dir_mode=0o755)
    assert os.stat(f"{root}/models").st_mode & 0o777 == 0o755
    segments.purge()


def table(path: str, *types: str) -> str:
    """A table of mounts in which the file system of a path has a type."""
    device = os.stat(path).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    lines = [f"36 35 {name} / /mnt rw,noatime shared:1 - {kind} /dev/x rw\n" for kind in types]
    with tempfile.NamedTemporaryFile("w", delete=False) as file:
        file.write("35 1 999:999 / / rw - ext4 /dev/y rw\nbroken\n\n" + "".join(lines))
    return file.name


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs", "devtmpfs", "overlay"])
def test_the_type_of_a_file_system_is_read_from_the_table_of_mounts(tmp_path, kind):
    mounts = table(str(tmp_path), kind)
    assert file_system(str(tmp_path), mounts) == kind
    os.unlink(mounts)


def test_what_is_not_in_the_table_is_not_known(tmp_path):
    mounts = table(str(tmp_path))
    assert file_system(str(tmp_path), mounts) == ""
    os.unlink(mounts)
    assert file_system(str(tmp_path), mounts) == ""


@pytest.mark.parametrize("kind", ["ramfs", "devtmpfs", ""])
def test_what_only_resembles_a_tmpfs_is_none(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(opening, "file_system", lambda _: kind)
    assert opened_as("auto", f"{tmp_path}/root") == "memfd"
