"""Every way of reading back sums the same bytes, whole files and ends of them."""

from __future__ import annotations

import os
import zlib

import pytest

from bench import checksum


@pytest.mark.parametrize("name", checksum.WAYS)
@pytest.mark.parametrize("size_bytes", [1, checksum.MAPPED_BYTES, checksum.MAPPED_BYTES + 70_000])
def test_each_way_sums_all_of_a_file(name: str, size_bytes: int):
    data = os.urandom(size_bytes)
    fd = os.memfd_create("test")
    os.write(fd, data)
    try:
        assert checksum.WAYS[name](fd, size_bytes, zlib.crc32) == zlib.crc32(data)
    finally:
        os.close(fd)


def test_every_way_has_a_row():
    rows = list(checksum.read_back(checksum.MIB, 2, zlib.crc32))
    assert [(row["subject"], row["n"]) for row in rows] == [(name, 2) for name in checksum.WAYS]


def test_ways_that_do_not_agree_are_no_result(monkeypatch):
    monkeypatch.setitem(checksum.WAYS, "mmap", lambda fd, size_bytes, update: -1)
    with pytest.raises(ValueError, match="different sums"):
        list(checksum.read_back(checksum.MIB, 1, zlib.crc32))
