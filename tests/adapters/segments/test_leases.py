"""The kernel says whether anybody else has a file."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from typing import TYPE_CHECKING

import pytest

from cached.adapters.segments.leases import Leases, is_held

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
    assert not is_held(fd)
    other = again(fd)
    assert is_held(fd)
    mapped = mmap.mmap(other, 0, access=mmap.ACCESS_READ)
    os.close(other)
    assert is_held(fd)
    mapped.close()
    assert not is_held(fd)


def test_a_lease_is_there_until_it_is_given_back(fd):
    with Leases() as leases:
        assert leases.take(fd)
        assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK


def test_who_comes_to_open_a_file_waits_and_is_noticed(fd):
    opened: list[int] = []
    other = threading.Thread(target=lambda: opened.append(again(fd)))
    with Leases() as leases:
        assert leases.take(fd)
        assert not leases.are_contested()
        other.start()
        while not leases.are_contested():
            os.sched_yield()
        assert not opened
    other.join()
    os.close(opened[0])


def test_who_does_not_want_to_wait_is_noticed_too(fd):
    with Leases() as leases:
        assert leases.take(fd)
        with pytest.raises(BlockingIOError):
            os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK)
        assert leases.are_contested()
    assert not is_held(fd)


def test_a_lease_that_has_ended_by_itself_can_be_given_back(fd):
    with Leases() as leases:
        assert leases.take(fd)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        assert leases.are_contested()


def test_a_question_leaves_no_lease_behind(fd):
    assert not is_held(fd)
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK


def test_where_the_kernel_cannot_tell_nobody_holds_it(fd, monkeypatch):
    def refuse(*_: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with Leases() as leases:
        assert leases.take(fd)
        assert not leases.are_contested()
    assert not is_held(fd)


def test_the_first_descriptor_of_a_memfd_tells_nothing():
    """Why the store opens it anew."""
    fd = os.memfd_create("target")
    assert is_held(fd)
    os.close(fd)
