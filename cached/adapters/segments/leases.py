"""Whether anybody else has a file open or mapped: fcntl(2), F_SETLEASE.

The kernel grants a write lease only to the file's one and only user. It takes 3 us, needs no
privilege but the file's ownership, and works on tmpfs, disks and memfds. A memfd must be opened
anew for it: its first descriptor is not counted as a writer, and never gets one.
"""

from __future__ import annotations

import errno
import fcntl
import signal


def take(fd: int) -> bool:
    """Take the lease of a file; False: somebody else has it open or mapped.

    Until ``give_back`` or the descriptor's end, whoever opens the file waits, also this process.
    Where the kernel cannot tell, nobody is assumed to have it: who had a lease of ours has gone.
    """
    try:
        # Should somebody open the file while we have the lease: a signal that does nothing.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return error.errno != errno.EAGAIN
    return True


def give_back(fd: int) -> None:
    """Give the lease back, if there is one."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        if error.errno not in {errno.EAGAIN, errno.EINVAL, errno.EACCES}:
            raise


def is_held(fd: int) -> bool:
    """Return whether anybody else has a file open or mapped."""
    if not take(fd):
        return True
    give_back(fd)
    return False
