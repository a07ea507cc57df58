"""How much memory there is: of the control group, the segments' file system and the kernel.

Sources: kernel documentation, admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst ("Memory
Interface Files"), filesystems/proc.rst (meminfo, smaps_rollup), filesystems/tmpfs.rst.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

UNLIMITED_BYTES: Final = 1 << 60  # cgroup v1 says 2^63 less a page; nothing real comes near


class _Files(NamedTuple):
    """What one version of the cgroup interface calls its files."""

    limit: str
    usage: str
    reclaimable: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


class SystemMemory:
    """Reads what is left; the ``MemoryProbe`` port.

    Nothing is kept between calls. What cannot be read does not limit.

    Args:
        root: a directory on the file system of the segments; need not exist yet.
        kind: of the segments: ``tmpfs``; ``memfd``: no file system limits them; ``file``: nothing
            but the disk does, for the page cache gives way.
        proc: where procfs is mounted.
        cgroup: where the cgroup file systems are mounted.
    """

    __slots__ = ("_cgroup", "_kind", "_proc", "_root")

    def __init__(
        self,
        root: str,
        kind: str = "tmpfs",
        *,
        proc: str = "/proc",
        cgroup: str = "/sys/fs/cgroup",
    ) -> None:
        self._root = os.path.abspath(root)
        self._kind = kind
        self._proc = proc
        self._cgroup = cgroup

    def available_bytes(self) -> int:
        """Return what new segments may take right now, before headroom; 0 at least."""
        left = [] if self._kind == "memfd" else self._file_system()
        if self._kind != "file":
            left += [limit - used for limit, used in self._groups()]
            left += _kibibytes(f"{self._proc}/meminfo", "MemAvailable:")
        return max(0, min(left, default=UNLIMITED_BYTES))

    def private_bytes(self) -> int:
        """Return the private memory of this process; without smaps_rollup, all but the shared."""
        private = _kibibytes(f"{self._proc}/self/smaps_rollup", "Private_Clean:", "Private_Dirty:")
        if private:
            return sum(private)
        pages = _text(f"{self._proc}/self/statm").split()  # size resident shared ...
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGESIZE") if pages else 0

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Yield limit and unreclaimable usage of every group that this process is in."""
        for line in _text(f"{self._proc}/self/cgroup").splitlines():
            hierarchy, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if hierarchy == "0":
                yield from self._limited("", path, _V2)
                yield from self._limited("unified", path, _V2)  # beside v1 ("hybrid")
            elif "memory" in controllers.split(","):
                yield from self._limited("memory", path, _V1)

    def _limited(self, mount: str, path: str, files: _Files) -> Iterator[tuple[int, int]]:
        """Yield what limits a group and all above it.

        In a container the path may be that of the host, while the group itself is mounted as the
        top: directories that are not there are passed over on the way up.
        """
        names = [name for name in path.split("/") if name and name != ".."]
        for depth in range(len(names), -1, -1):
            directory = os.path.join(self._cgroup, mount, *names[:depth])
            limit = _text(f"{directory}/{files.limit}").strip()
            usage = _text(f"{directory}/{files.usage}").strip()
            if limit.isdigit() and usage.isdigit() and int(limit) < UNLIMITED_BYTES:
                counted = _text(f"{directory}/memory.stat").split()
                facts = dict(zip(counted[::2], counted[1::2], strict=False))
                reclaimable = int(facts.get(files.reclaimable, "0"))
                yield int(limit), max(0, int(usage) - reclaimable)

    def _file_system(self) -> list[int]:
        """Return the free bytes of the segments' file system; nothing if it has no limit."""
        directory = self._root
        while not os.path.isdir(directory) and directory != "/":
            directory = os.path.dirname(directory)
        found = os.statvfs(directory)
        if not found.f_blocks:  # a tmpfs mounted with size=0
            return []
        return [found.f_bavail * found.f_frsize]


def _kibibytes(path: str, *keys: str) -> list[int]:
    """Return the values of these lines ("Key:  12 kB"), in bytes; those that are there."""
    lines = (line.split() for line in _text(path).splitlines())
    return [int(words[1]) * 1024 for words in lines if words and words[0] in keys]


def _text(path: str) -> str:
    """Return a small file's text; empty if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
