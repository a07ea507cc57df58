"""The directory that holds the segments: who owns it, and what the system's refusals mean."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING, Final

from cached.core.errors import InvalidConfig, LoadFailed, OutOfSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cached.core.errors import CachedError

_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM}
_NO_DESCRIPTOR: Final = {errno.EMFILE, errno.ENFILE}
_LOCK_MODE: Final = 0o600  # whoever can open the file can lock it, for as long as he likes
_WAY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
SUBDIRECTORIES: Final = ("about", "filling", "models")
_LOOK: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHER_ROOT: Final = "name another directory with --segment-root"


def claim(root: str, dir_mode: int) -> int:
    """Make a root if it is not there, and lock it for the life of this process.

    Returns:
        The descriptor that holds the lock: closing it gives the root up.

    Raises:
        InvalidConfig: another process has it, or it, or a directory of ours in it, is not this
            user's.
    """
    try:
        if not os.path.lexists(root):
            os.makedirs(root, dir_mode)
            os.chmod(root, dir_mode)
        _check_owner(root)
        _check_directories(root)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(f"{root}/lock", flags, _LOCK_MODE)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            message = f"{root}/lock is no regular file"
            raise InvalidConfig(message, hint=f"remove it, or {_OTHER_ROOT}")
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


def _check_directories(root: str) -> None:
    """Refuse a root in which another user has made a directory of ours: he could change it.

    A root may be open to everybody, as a volume of Kubernetes is.
    """
    for name in SUBDIRECTORIES:
        with contextlib.suppress(FileNotFoundError):
            _check_ours(root, name, os.lstat(f"{root}/{name}"))


def _check_ours(root: str, name: str, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode) and found.st_uid != os.geteuid():
        message = f"{root}/{name} belongs to uid {found.st_uid}, not to uid {os.geteuid()}"
        raise InvalidConfig(message, hint=f"remove it, or {_OTHER_ROOT}")


def take_directory(root: str, name: str, mode: int) -> None:
    """Make one of our directories in a root if it is not there; give it its mode.

    Raises:
        InvalidConfig: another user has put his in its place meanwhile.
    """
    path = f"{root}/{name}"
    if not is_directory(path):
        remove(path)
        make_directory(path, mode)
    fd = os.open(path, _LOOK)
    try:
        _check_ours(root, name, os.fstat(fd))
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def unusable(root: str, error: OSError) -> InvalidConfig:
    """Return the refusal of a root that the system does not let us use."""
    message = f"cannot use segment root {root}: {error.strerror}"
    return InvalidConfig(message, hint=f"make it writable, or {_OTHER_ROOT}")


def make_directory(path: str, mode: int) -> None:
    """Make a directory with exactly this mode, whatever the umask."""
    os.mkdir(path, mode)
    os.chmod(path, mode)


def make_parents(directory: str, path: str, mode: int) -> None:
    """Make the directories between a directory and a file that is to lie below it."""
    at = path.find("/")
    while at >= 0:
        with contextlib.suppress(FileExistsError):
            make_directory(f"{directory}/{path[:at]}", mode)
        at = path.find("/", at + 1)


@contextlib.contextmanager
def parent_of(root: str, path: str) -> Iterator[tuple[int, str]]:
    """Lend a descriptor of the directory that a file lies in, and its name; follow no link.

    Args:
        root: a directory; it may be a link itself.
        path: below it, with no link on the way.

    Raises:
        OSError: of the system; ENOTDIR if there is a link on the way.
    """
    directory = os.open(root, _WAY)
    try:
        *parents, name = path.split("/")
        for parent in parents:
            below = os.open(parent, _WAY | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = below
        yield directory, name
    finally:
        os.close(directory)


def is_directory(path: str) -> bool:
    """Return whether a path is a directory itself, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def remove(path: str) -> None:
    """Remove whatever is there, and all below; follow no link. Nothing there is fine."""
    if not is_directory(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    top = os.open(path, _LOOK)
    try:
        while found := _listed(top):
            for entry in found:
                _take_apart(top, entry)
    finally:
        os.close(top)
    os.rmdir(path)


def _take_apart(top: int, entry: os.DirEntry[str]) -> None:
    """Remove what lies in a directory; if that is one too, what lies in this comes to the top.

    So no path grows too long for the system, and no directory waits with a descriptor, however
    deep the tree is.
    """
    if not entry.is_dir(follow_symlinks=False):
        os.unlink(entry.name, dir_fd=top)
        return
    directory = os.open(entry.name, _LOOK, dir_fd=top)
    try:
        for below in _listed(directory):
            if below.is_dir(follow_symlinks=False):
                _move_up(directory, below, top)
            else:
                os.unlink(below.name, dir_fd=directory)
    finally:
        os.close(directory)
    os.rmdir(entry.name, dir_fd=top)


def _move_up(directory: int, entry: os.DirEntry[str], top: int) -> None:
    """Move a directory to the top, under a name that nothing has there; an empty one goes."""
    try:
        os.rmdir(entry.name, dir_fd=directory)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        name = f".removed-{entry.inode()}"
        os.rename(entry.name, name, src_dir_fd=directory, dst_dir_fd=top)


def _listed(directory: int) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as found:
        return list(found)


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
