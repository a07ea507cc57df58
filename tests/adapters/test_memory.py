"""What there is to take is the least of what group, file system and kernel have left."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import pytest

from cached.adapters.memory import SystemMemory

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
V1_UNLIMITED = 9223372036854771712


class Machine:
    """Fixture trees in place of /proc and /sys/fs/cgroup, and a file system of 64 GiB."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.patch = monkeypatch
        self.write(
            "proc/meminfo", "MemTotal: 33554432 kB\nMemFree: 1 kB\nMemAvailable: 16777216 kB\n"
        )
        self.write("proc/self/cgroup", "0::/\n")
        self.file_system(64 * GIB, 32 * GIB)
        self.memory = SystemMemory(
            str(path / "root"), proc=str(path / "proc"), cgroup=str(path / "cgroup")
        )

    def write(self, path: str, text: str) -> None:
        file = self.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def file_system(self, total: int, free: int) -> None:
        real = os.statvfs(self.path)
        fields = [4096, 4096, total // 4096, free // 4096, free // 4096, *real[5:]]
        self.patch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))

    def v2(self, group: str, limit: int | str, usage: int, inactive: int = 0) -> None:
        self.write(f"cgroup/{group}/memory.max", f"{limit}\n")
        self.write(f"cgroup/{group}/memory.current", f"{usage}\n")
        self.write(f"cgroup/{group}/memory.stat", f"anon 7\ninactive_file {inactive}\nfile 9\n")

    def v1(self, group: str, limit: int, usage: int, inactive: int = 0) -> None:
        self.write(f"cgroup/memory/{group}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"cgroup/memory/{group}/memory.usage_in_bytes", f"{usage}\n")
        self.write(
            f"cgroup/memory/{group}/memory.stat",
            f"inactive_file 1\ntotal_inactive_file {inactive}\n",
        )

    def available(self) -> float:
        """Return what is available, in GiB."""
        return self.memory.available_bytes() / GIB


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_without_limits_the_kernel_has_the_last_word(machine):
    assert machine.available() == 16


def test_a_small_file_system_is_the_limit(machine):
    machine.file_system(8 * GIB, 3 * GIB)
    assert machine.available() == 3


def test_a_tmpfs_without_a_size_does_not_limit(machine):
    machine.file_system(0, 0)
    assert machine.available() == 16


def test_a_container_of_cgroup_v2_sees_its_group_at_the_top(machine):
    machine.v2(".", 4 * GIB, 3 * GIB, inactive=2 * GIB)
    assert machine.available() == 3


def test_the_tightest_group_on_the_way_up_is_the_limit(machine):
    machine.write("proc/self/cgroup", "0::/kubepods/pod1/daemon\n")
    machine.v2("kubepods/pod1/daemon", "max", 1 * GIB)
    machine.v2("kubepods/pod1", 6 * GIB, 5 * GIB)
    machine.v2("kubepods", 12 * GIB, 12 * GIB - GIB // 2)
    assert machine.available() == 0.5


def test_a_group_that_is_over_its_limit_leaves_nothing(machine):
    machine.v2(".", 4 * GIB, 5 * GIB)
    assert machine.available() == 0


def test_page_cache_that_exceeds_the_usage_leaves_no_more_than_the_limit(machine):
    machine.v2(".", 4 * GIB, 1 * GIB, inactive=2 * GIB)
    assert machine.available() == 4


def test_cgroup_v1_is_read_by_its_own_names(machine):
    machine.write("proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n")
    machine.v1("docker/abc", 4 * GIB, 3 * GIB, inactive=1 * GIB)
    machine.v1(".", V1_UNLIMITED, 9 * GIB)
    assert machine.available() == 2


def test_a_path_of_the_host_that_is_not_mounted_leads_to_the_top(machine):
    machine.write("proc/self/cgroup", "4:memory:/docker/not-visible-here\n")
    machine.v1(".", 2 * GIB, 1 * GIB)
    assert machine.available() == 1


def test_cgroup_v2_beside_v1_is_read_where_it_is_mounted(machine):
    machine.v2("unified", 2 * GIB, 1 * GIB)
    assert machine.available() == 1


def test_a_path_out_of_the_tree_stays_in_it(machine):
    machine.write("proc/self/cgroup", "0::/../../other\n")
    machine.v2(".", 2 * GIB, 1 * GIB)
    assert machine.available() == 1


def test_what_cannot_be_read_does_not_limit(machine):
    for name in ("proc/meminfo", "proc/self/cgroup"):
        (machine.path / name).unlink()
    assert machine.available() == 32


@pytest.mark.parametrize(("kind", "available"), [("tmpfs", 3), ("memfd", 4), ("file", 5)])
def test_what_limits_depends_on_what_the_segments_are(machine, kind, available):
    machine.memory = SystemMemory(
        str(machine.path / "root"),
        kind,
        proc=str(machine.path / "proc"),
        cgroup=str(machine.path / "cgroup"),
    )
    machine.file_system(9 * GIB, (3 if kind == "tmpfs" else 5) * GIB)
    machine.v2(".", 6 * GIB, 2 * GIB)
    assert machine.available() == available


def test_private_memory_is_what_smaps_says(machine):
    machine.write(
        "proc/self/smaps_rollup",
        "55e-7ff ---p 00000000 00:00 0 [rollup]\nRss: 99 kB\nShared_Clean: 50 kB\n"
        "Private_Clean:  4 kB\nPrivate_Dirty: 12 kB\n",
    )
    assert machine.memory.private_bytes() == 16 * 1024


def test_without_smaps_private_memory_is_all_but_the_shared(machine):
    machine.write("proc/self/statm", "1000 300 100 1 0 200 0\n")
    assert machine.memory.private_bytes() == 200 * mmap.PAGESIZE


def test_without_procfs_private_memory_is_not_known(machine):
    assert machine.memory.private_bytes() == 0


def test_this_machine_has_some_memory(tmp_path):
    memory = SystemMemory(str(tmp_path / "not" / "made" / "yet"))
    assert 0 < memory.available_bytes() < 1 << 50
    assert 1 << 20 < memory.private_bytes() < 1 << 40
