"""The directory that holds the segments: who owns it, what lies in it, what its refusals mean."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from cached.core.errors import InvalidConfig, LoadFailed, OutOfSpace
from cached.core.objects import VersionRef

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cached.core.errors import CachedError

_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM}
_NO_DESCRIPTOR: Final = {errno.EMFILE, errno.ENFILE}
_LOCK_MODE: Final = 0o600  # whoever can open the file can lock it, for as long as he likes
_OTHER_ROOT: Final = "name another directory with --segment-root"


class Left(NamedTuple):
    """A version that lies in a root.

    Attributes:
        path: its directory.
        is_published: complete; else it was being filled.
        size_bytes: of its files.
    """

    of: VersionRef
    path: str
    is_published: bool
    size_bytes: int


def claim(root: str, dir_mode: int) -> int:
    """Make a root if it is not there, and lock it for the life of this process.

    Returns:
        The descriptor that holds the lock: closing it gives the root up.

    Raises:
        InvalidConfig: another process has it, or it is not this user's directory.
    """
    try:
        if not os.path.lexists(root):
            os.makedirs(root, dir_mode)
            os.chmod(root, dir_mode)
        _check_owner(root)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(f"{root}/lock", flags, _LOCK_MODE)
        os.fchmod(fd, _LOCK_MODE)  # of a file that was there already
    except OSError as error:
        raise unusable(root, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.read(fd, 20).decode("ascii", "replace").strip()
        os.close(fd)
        message = f"segment root {root} is in use by another daemon, pid {pid or 'unknown'}"
        raise InvalidConfig(message, hint=f"stop that one, or {_OTHER_ROOT}") from error
    if not _is_still(f"{root}/lock", fd):
        os.close(fd)
        return claim(root, dir_mode)  # a daemon that ended has just removed it: make it anew
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _is_still(path: str, fd: int) -> bool:
    """Return whether the path still names the file that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _check_owner(root: str) -> None:
    """Refuse what another user made in a place that everybody can write, such as /dev/shm."""
    for found in (os.lstat(root), os.stat(root)):
        if found.st_uid not in {0, os.geteuid()}:
            message = f"segment root {root} belongs to uid {found.st_uid}, not to this user or root"
            raise InvalidConfig(message, hint=_OTHER_ROOT)
    if not os.path.isdir(root):
        message = f"segment root {root} is not a directory"
        raise InvalidConfig(message, hint=_OTHER_ROOT)


def unusable(root: str, error: OSError) -> InvalidConfig:
    """Return the refusal of a root that the system does not let us use."""
    message = f"cannot use segment root {root}: {error.strerror}"
    return InvalidConfig(message, hint=f"make it writable, or {_OTHER_ROOT}")


def survey(root: str) -> list[Left]:
    """Return the versions that lie in a root, whoever put them there."""
    found = []
    for entry in _directories(f"{root}/filling"):
        name, _, version = entry.name.rpartition("@")
        of = VersionRef(name, version.partition("~")[0])
        found.append(Left(of, entry.path, is_published=False, size_bytes=_size(entry.path)))
    for home in _directories(f"{root}/models"):
        for entry in _directories(home.path):
            of = VersionRef(home.name, entry.name)
            found.append(Left(of, entry.path, is_published=True, size_bytes=_size(entry.path)))
    return found


def _directories(path: str) -> Iterator[os.DirEntry[str]]:
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            yield from sorted(
                (entry for entry in entries if entry.is_dir(follow_symlinks=False)),
                key=lambda entry: entry.name,
            )


def _size(directory: str) -> int:
    return sum(
        os.lstat(os.path.join(where, name)).st_size
        for where, _, names in os.walk(directory)
        for name in names
    )


def make_directory(path: str, mode: int) -> None:
    """Make a directory with exactly this mode, whatever the umask."""
    os.mkdir(path, mode)
    os.chmod(path, mode)


def remove_tree(path: str) -> None:
    """Remove a directory and all below; follow no link. Nothing there is fine."""
    if not os.path.isdir(path):
        return
    with os.scandir(path) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(entry.path)
        else:
            os.unlink(entry.path)
    os.rmdir(path)


def translated(error: OSError, action: str) -> CachedError:
    """Return what the system's refusal means for a load.

    Args:
        error: of the system.
        action: "cannot ..." with names and numbers.
    """
    message = f"{action}: {error.strerror}"
    if error.errno in _FULL:
        hint = "give the file system of the segments more room, or lower the memory budget"
        return OutOfSpace(message, hint=hint)
    if error.errno in _NO_DESCRIPTOR:
        return LoadFailed(message, hint="raise the daemon's limit of open files (ulimit -n)")
    return LoadFailed(message, hint="check the segment root: who may write it, and what is there")


def gone(what: str) -> LoadFailed:
    """Return the refusal of something to do with a version that was freed."""
    message = f"{what} is not in memory any more"
    return LoadFailed(message, hint="open the model again")
