"""What the kernel says of a running process."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

KIB = 1024


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process, all threads, ended ones included.

    By its CPU clock, which counts nanoseconds; /proc/PID/stat counts hundredths of a second.
    """
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3), CPUCLOCK_SCHED


def pss_bytes(pid: int) -> int:
    """Return the process's share of memory: each page divided by the processes that map it."""
    return _sum(pid, "smaps_rollup", ("Pss:",))


def private_bytes(pid: int) -> int:
    """Return the memory that only this process maps."""
    return _sum(pid, "smaps_rollup", ("Private_Clean:", "Private_Dirty:"))


def rss_bytes(pid: int) -> int:
    """Return the resident memory, shared pages included."""
    return _sum(pid, "status", ("VmRSS:",))


def peak_rss_bytes(pid: int) -> int:
    """Return the highest resident memory since the start or ``forget_peak_rss``; 0 at the end."""
    return _sum(pid, "status", ("VmHWM:",))


def forget_peak_rss(pid: int) -> None:
    """Let ``peak_rss_bytes`` begin anew (proc(5), clear_refs, since Linux 4.0)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def touch_memory(size_bytes: int) -> None:
    """Take so much memory and give it back, so that who takes it next gets pages that are there.

    Free pages of a virtual machine may have gone back to its host (free page reporting). Their
    return costs the guest up to 1 s/GiB of CPU, of whoever happens to write to them first.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, size_bytes, flags=flags).close()


def _sum(pid: int, file: str, names: tuple[str, ...]) -> int:
    text = Path(f"/proc/{pid}/{file}").read_text()
    return sum(int(line.split()[1]) * KIB for line in text.splitlines() if line.startswith(names))
