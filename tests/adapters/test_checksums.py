"""Sums of files' bytes agree with the textbook's, in whatever pieces they are read."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cached.adapters import checksums
from cached.adapters.checksums import Checksums
from cached.core.errors import LoadFailed
from cached.core.objects import FileRef, VersionRef
from tests.reference.crc import crc

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = random.Random(7).randbytes(5000)
OF = VersionRef("m", "1", 1)
ALGORITHMS = ["crc32", "sha256", "sha1", "crc64nvme", "crc32c"]


def plain(algorithm: str, data: bytes) -> bytes:
    return crc(algorithm, data) if "crc" in algorithm else hashlib.new(algorithm, data).digest()


@pytest.fixture
def fd(tmp_path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture(params=ALGORITHMS)
def algorithm(request) -> str:
    if request.param not in Checksums().can:
        pytest.skip(f"{request.param} NOT TESTED: awscrt is not installed")
    return str(request.param)


@given(span=st.tuples(st.integers(0, 5000), st.integers(0, 5000)), buffer=st.integers(1, 6000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_a_range_is_summed_in_whatever_pieces_it_is_read(algorithm, fd, span, buffer):
    start, stop = sorted(span)
    sums = Checksums()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checksums, "BUFFER_BYTES", buffer)
        value = sums.of_range(algorithm, fd, start, stop)

    assert value == plain(algorithm, DATA[start:stop])


@given(cuts=st.lists(st.integers(1, 4999), max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_running_sum_tells_at_each_step_what_all_so_far_gives(fd, cuts):
    sums = Checksums()
    file = FileRef(OF, 0)
    at = 0
    for stop in sorted({*cuts, 5000}):
        assert sums.extend(file, "sha256", fd, at, stop) == plain("sha256", DATA[:stop])
        at = stop
    assert sums.extend(file, "sha1", fd, 0, 10) == plain("sha1", DATA[:10]), "0 begins anew"


def test_sums_of_several_files_do_not_mix(fd):
    sums = Checksums()
    one, other = FileRef(OF, 0), FileRef(OF, 1)
    sums.extend(one, "sha256", fd, 0, 100)
    sums.extend(other, "sha256", fd, 0, 50)

    assert sums.extend(one, "sha256", fd, 100, 200) == plain("sha256", DATA[:200])
    sums.forget(OF)
    with pytest.raises(KeyError):
        sums.extend(other, "sha256", fd, 50, 60)


def test_a_file_that_is_shorter_is_refused(fd):
    with pytest.raises(LoadFailed, match="ends at byte 5000, 5001 were"):
        Checksums().of_range("crc32", fd, 0, 5001)


def test_a_running_sum_goes_on_after_a_read_that_failed(fd):
    sums = Checksums()
    file = FileRef(OF, 0)
    sums.extend(file, "sha256", fd, 0, 4000)
    with pytest.raises(LoadFailed, match="ends at byte 5000, 5001 were"):
        sums.extend(file, "sha256", fd, 4000, 5001)

    assert sums.extend(file, "sha256", fd, 4000, 5000) == plain("sha256", DATA)


def test_what_is_forgotten_while_it_is_summed_stays_forgotten(fd, monkeypatch):
    sums = Checksums()
    file = FileRef(OF, 0)
    sums.extend(file, "sha256", fd, 0, 100)
    preadv = os.preadv

    def forgotten(*arguments: Any) -> int:
        sums.forget(OF)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", forgotten)
    sums.extend(file, "sha256", fd, 100, 200)
    with pytest.raises(KeyError):
        sums.extend(file, "sha256", fd, 200, 300)


def test_only_the_files_of_one_version_are_forgotten(fd):
    sums = Checksums()
    kept = FileRef(OF._replace(load=2), 0)
    sums.extend(kept, "sha256", fd, 0, 100)
    sums.forget(OF)

    assert sums.extend(kept, "sha256", fd, 100, 200) == plain("sha256", DATA[:200])


def test_a_file_that_cannot_be_read_fails_the_load(tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(LoadFailed, match="cannot read byte 7 back: Is a directory"):
        Checksums().of_range("crc32", directory, 7, 8)
    os.close(directory)


def package(folder: Path, checksums: str | None) -> ModuleSpec:
    """An awscrt with this module, that cannot be imported."""
    (folder / "__init__.py").write_text("")
    if checksums is not None:
        (folder / "checksums.py").write_text(checksums)
    return ModuleSpec("awscrt", None, origin=str(folder / "__init__.py"))


@pytest.mark.parametrize(
    ("source", "offered"),
    [
        ("\ndef crc32c(input): ...\ndef crc64nvme(input): ...\n", {"crc32c", "crc64nvme"}),
        ("\ndef crc32(input): ...\ndef crc32c(input): ...\n", {"crc32c"}),
        ("", set()),
        (None, set()),
    ],
    ids=["new", "old", "empty", "no module"],
)
def test_an_old_awscrt_is_asked_only_for_what_it_has(monkeypatch, tmp_path, source, offered):
    spec = package(tmp_path, source)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    assert Checksums().can == offered | {"crc32", "sha256", "sha1"}


def test_an_awscrt_that_cannot_be_imported_fails_the_load(monkeypatch, fd):
    monkeypatch.setitem(sys.modules, "awscrt", None)
    with pytest.raises(LoadFailed, match="cannot be imported") as caught:
        Checksums().of_range("crc32c", fd, 0, 9)

    assert "remove it" in caught.value.hint


def test_awscrt_is_imported_only_when_it_is_needed():
    code = (
        "import sys\n"
        "from cached.adapters.checksums import Checksums\n"
        "Checksums()\n"
        "assert not [name for name in sys.modules if name.startswith(('awscrt', 'email'))]\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=15)


def test_without_awscrt_the_rest_is_computed(monkeypatch, fd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sums = Checksums()

    assert sums.can == {"crc32", "sha256", "sha1"}
    assert sums.of_range("crc32", fd, 0, 9) == plain("crc32", DATA[:9])


def test_memory_stays_as_small_as_the_buffer(tmp_path):
    path = tmp_path / "big"
    with open(path, "wb") as file:
        file.truncate(64 << 20)
    fd = os.open(path, os.O_RDONLY)
    sums = Checksums()
    tracemalloc.start()
    sums.of_range("crc32", fd, 0, 64 << 20)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    os.close(fd)

    assert peak_bytes < 2 * checksums.BUFFER_BYTES


def test_threads_do_not_share_a_buffer(fd):
    sums = Checksums()
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(
            at
            for at in range(50)
            if sums.of_range("crc32", fd, at, 5000) != plain("crc32", DATA[at:])
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
