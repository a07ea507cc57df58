"""Whether anybody else has a file open or mapped: fcntl(2), F_SETLEASE.

The kernel grants a write lease only to the file's one and only user. It takes 3 us, needs no
privilege but the file's ownership, and works on tmpfs, disks and memfds. A memfd must be opened
anew for it: its first descriptor is not counted as a writer, and never gets one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import signal
from typing import Self


class Leases:
    """Write leases of files; whoever opens one of them waits, also this process.

    The end of ``with`` gives them back. It comes soon, and before the descriptors are closed: the
    kernel ends a lease that somebody waits for only after /proc/sys/fs/lease-break-time, 45 s.
    """

    __slots__ = ("_fds",)

    def __init__(self) -> None:
        self._fds: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give all back; who waits goes on."""
        for fd in self._fds:
            with contextlib.suppress(BlockingIOError):  # it has ended by itself
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def take(self, fd: int) -> bool:
        """Take the lease of one file more; False: somebody else has it open or mapped.

        Where the kernel cannot tell, nobody is assumed to have it: who had a lease of ours has
        gone.
        """
        try:
            # Should somebody open the file while we have the lease: a signal that does nothing.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            return error.errno != errno.EAGAIN
        self._fds.append(fd)
        return True

    def are_contested(self) -> bool:
        """Return whether somebody has come to open one of the files since its lease was taken."""
        return any(fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_WRLCK for fd in self._fds)


def is_held(fd: int) -> bool:
    """Return whether anybody else has a file open or mapped."""
    with Leases() as leases:
        return not leases.take(fd)
