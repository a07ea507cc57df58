"""A directory in memory for one process, which does not outlive it.

Its lock (flock, which forks share) tells whether anybody still needs it: what a killed process
left behind is removed by the next one that makes a directory, so that memory cannot fill up.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile

PREFIX = "cached-fallback-"
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a directory of our own is made in it


class PrivateDirectory:
    """Made empty; ``remove`` it once, else the end of the process does. A child of fork does not.

    Args:
        parent: ``None``: shared memory where there is one, else where temporary files go.

    Attributes:
        path: of the directory.
    """

    __slots__ = ("_lock_fd", "_pid", "path")

    def __init__(self, parent: str | None = None) -> None:
        parent = parent or _parent()
        _sweep(parent)
        self.path, self._lock_fd = _locked_directory(parent)
        self._pid = os.getpid()
        atexit.register(self.remove)

    def remove(self) -> None:
        """Remove it and all below; again: do nothing; in a child of fork: let go of it."""
        atexit.unregister(self.remove)
        if self._lock_fd < 0:
            return
        if os.getpid() == self._pid:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = -1


def _parent() -> str:
    can_share = os.path.isdir(SHARED_MEMORY) and os.access(SHARED_MEMORY, os.W_OK)
    return SHARED_MEMORY if can_share else tempfile.gettempdir()


def _locked_directory(parent: str) -> tuple[str, int]:
    while True:
        path = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
        lock_fd = _try_lock(path)
        if lock_fd is not None and os.path.isdir(path):
            return path, lock_fd
        if lock_fd is not None:  # another process swept it before it was locked
            os.close(lock_fd)


def _sweep(parent: str) -> None:
    """Remove the directories of this user's processes that ended without doing so."""
    with os.scandir(parent) as entries:
        found = [entry.path for entry in entries if entry.name.startswith(PREFIX)]
    for path in found:
        with contextlib.suppress(OSError):  # of another user, or just removed
            if os.lstat(path).st_uid != os.getuid():
                continue
            lock_fd = _try_lock(path)
            if lock_fd is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock_fd)


def _try_lock(path: str) -> int | None:
    """Return a descriptor that holds the lock of a directory; None: somebody else holds it."""
    try:
        lock_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock_fd)
        return None
    return lock_fd
