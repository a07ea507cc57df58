"""The kernel says whether anybody else has a file."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from cached.adapters.segments import leases

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def fd() -> Iterator[int]:
    """Of a memfd, as the tables ask about it: opened anew."""
    first = os.memfd_create("target")
    os.ftruncate(first, 10)
    fd = again(first)
    yield fd
    for one in (first, fd):
        os.close(one)


def again(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)


def test_a_file_is_held_by_who_has_it_open_or_mapped(fd):
    assert not leases.is_held(fd)
    other = again(fd)
    assert leases.is_held(fd)
    mapped = mmap.mmap(other, 0, access=mmap.ACCESS_READ)
    os.close(other)
    assert leases.is_held(fd)
    mapped.close()
    assert not leases.is_held(fd)


def test_a_lease_is_there_until_it_is_given_back(fd):
    assert leases.take(fd)
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK
    leases.give_back(fd)
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    leases.give_back(fd)


def test_a_question_leaves_no_lease_behind(fd):
    assert not leases.is_held(fd)
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK


def test_where_the_kernel_cannot_tell_nobody_holds_it(fd, monkeypatch):
    def refuse(*_: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert leases.take(fd)
    leases.give_back(fd)
    assert not leases.is_held(fd)


def test_the_first_descriptor_of_a_memfd_tells_nothing():
    """Why the store opens it anew."""
    fd = os.memfd_create("target")
    assert leases.is_held(fd)
    os.close(fd)
