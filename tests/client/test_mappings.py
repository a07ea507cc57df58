"""A lease ends with its last holding, whoever drops it; a file is mapped once and only read."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.client.mappings import File, Lease, private_mapping
from cached.core.errors import LoadFailed, ModelClosed
from tests.fakes.local_daemon import open_descriptors

if TYPE_CHECKING:
    from pathlib import Path


class Owner:
    pass


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    return os.open(path, os.O_RDONLY)


@given(st.lists(st.integers(0, 4), max_size=20))
def test_a_lease_ends_once_when_nobody_holds_it(drops: list[int]):
    ends: list[None] = []
    lease = Lease(lambda: ends.append(None))
    holdings = [None, *(lease.hold() for _ in range(4))]
    dropped = set()
    for at in drops:
        lease.release(holdings[at])
        dropped.add(at)
        assert len(ends) == (len(dropped) == len(holdings))
    for holding in holdings:
        lease.release(holding)
    assert len(ends) == 1


def test_a_lease_lasts_as_long_as_its_last_owner():
    ends: list[int] = []
    lease = Lease(lambda: ends.append(1))
    lease.add(lambda: ends.append(2))
    first, second = Owner(), Owner()
    end_first = lease.hold_for(first)
    lease.hold_for(second)
    lease.release(None)
    end_first()
    end_first()
    assert ends == []
    gc.disable()
    try:
        del second
    finally:
        gc.enable()
    assert sorted(ends) == [1, 2]


def test_a_call_of_the_parent_does_not_hold_the_lease_of_a_child():
    ends: list[None] = []
    lease = Lease(lambda: ends.append(None))
    owner = Owner()
    lease.hold_for(owner)
    call = lease.hold()  # of a thread that the child does not have
    lease.release(None)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            lease.release(lease.hold())
            is_kept = ends == []
            del owner
            status = 0 if is_kept and ends == [None] else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    del owner
    assert ends == []
    lease.release(call)
    assert ends == [None]


def test_a_lease_that_has_ended_cannot_be_held():
    lease = Lease(lambda: None)
    lease.release(None)
    with pytest.raises(ModelClosed, match="open it again"):
        lease.hold()


def test_a_file_is_mapped_read_only_and_its_descriptor_closed(descriptor: int):
    ends: list[None] = []
    lease = Lease(lambda: ends.append(None))
    file = File("file", 10, None)
    file.map(descriptor, lease)
    lease.release(None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    view = file.view(2, 5)
    assert bytes(view) == b"234"
    assert view.readonly
    file.drop()
    assert ends == []
    with pytest.raises(ModelClosed):
        file.view(0, 1)
    with pytest.raises(ModelClosed):
        file.base(bytes)
    assert bytes(view) == b"234"
    del view
    assert len(ends) == 1


def test_an_empty_file_has_no_mapping(tmp_path: Path):
    (tmp_path / "empty").write_bytes(b"")
    file = File("empty", 0, None)
    file.map(os.open(tmp_path / "empty", os.O_RDONLY), Lease(lambda: None))
    assert file.mapping is None
    assert bytes(file.view(0, 0)) == b""


def test_the_base_of_a_file_is_made_once(descriptor: int):
    file = File("file", 10, None)
    file.map(descriptor, Lease(lambda: None))
    assert file.base(memoryview) is file.base(memoryview)


def test_a_private_mapping_keeps_writes_to_itself(descriptor: int):
    other = os.dup(descriptor)
    lease = Lease(lambda: None)
    file = File("file", 10, None)
    file.map(descriptor, lease)
    private = private_mapping(other, file, lease)
    private[0:1] = b"x"
    assert bytes(private[:2]) == b"x1"
    assert bytes(file.view(0, 2)) == b"01"


@pytest.mark.parametrize(
    "map_it", [File.map, lambda file, fd, lease: private_mapping(fd, file, lease)]
)
def test_what_cannot_be_mapped_is_a_typed_error_and_leaves_nothing_open(descriptor, map_it):
    before = open_descriptors()
    file = File("short.bin", 1 << 40, None)
    with pytest.raises(LoadFailed, match=r"cannot map short.bin \(1099511627776 bytes\)"):
        map_it(file, descriptor, Lease(lambda: None))
    del before[str(descriptor)]
    assert open_descriptors() == before
