"""A version knows what is there of its files, and notices when somebody changed one."""

from __future__ import annotations

import os

import pytest

from cached.adapters.segments.description import Marks
from cached.adapters.segments.part_sink import OpenFile
from cached.adapters.segments.version import Version, check_length, close_marks, what_is_there
from cached.core.errors import LoadFailed
from tests.adapters.segments.versions import descriptors


def test_what_is_there_is_told_by_file_in_order():
    version = Version()
    version.files = [OpenFile(-1, name, 10) for name in "abc"]
    version.files[2].there.add(5, 10)
    version.files[0].there.add(7, 8)
    version.files[0].there.add(0, 3)
    assert what_is_there(version) == [(0, (0, 3)), (0, (7, 8)), (2, (5, 10))]


def test_a_map_is_closed_where_there_is_one():
    before = descriptors()
    version = Version()
    close_marks(version)
    version.marks = Marks(os.memfd_create("map"), [1])
    close_marks(version)
    close_marks(version)
    assert descriptors() == before


def test_another_length_is_noticed():
    fd = os.memfd_create("file")
    os.ftruncate(fd, 10)
    check_length(OpenFile(fd, "a", 10))
    with pytest.raises(LoadFailed, match="a must have 9 bytes, has 10; something else writes"):
        check_length(OpenFile(fd, "a", 9))
    os.close(fd)
