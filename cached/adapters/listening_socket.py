"""A Unix socket that listens at its place: refuses a live owner there, replaces a dead one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import time
from typing import TYPE_CHECKING

from cached.core.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_ADDRESS_BYTES = 107  # sun_path holds 108 with its NUL: unix(7)
# Connections that wait to be accepted: few, for whoever comes next waits for all of them. Beyond,
# connect() waits; who does not wait gets EAGAIN.
BACKLOG = 32
KEPT_FOR_US = 16  # one of so many connections is for root and the daemon's own user
KEPT_FROM_ONE = 4  # one of so many is never for that process, or other user, who has all the rest
LOCK_TRIES = 200  # of 10 ms: how long another daemon may take to start beside this socket
OTHER = "choose another with --socket or CACHED_SOCKET"


class ListeningSocket:
    """A bound, listening, non-blocking socket; ``close`` gives its place back.

    Attributes:
        socket: to accept from.
        address: the path, or ``@NAME``.
    """

    __slots__ = ("_identity", "_mode", "address", "socket")

    def __init__(
        self, listener: socket.socket, address: str, mode: int, identity: tuple[int, ...] | None
    ) -> None:
        self.socket = listener
        self.address = address
        self._mode = mode
        self._identity = identity

    def admits(self, uid: int, gid: int) -> bool:
        """Return whether this peer may be served.

        The kernel checks a path's mode at connect. An abstract name has none, so the same
        mode is applied here, to the peer's effective uid and gid.
        """
        if self._identity is not None or uid in {0, os.geteuid()}:
            return True
        return bool(self._mode & (0o020 if gid == os.getegid() else 0o002))

    def has_place(self, uid: int, count: int, of_uid: int, of_process: int, most: int) -> bool:
        """Return whether one more connection may be open.

        Args:
            uid: whose.
            count: how many are open.
            of_uid: how many of them are of this uid.
            of_process: how many of them are of this process.
            most: the limit of all: for root and our own user. Others have so much less that
                those two get in whatever they do. One other user, and one process of anybody,
                has less than all.
        """
        most_of_one = most - most // KEPT_FROM_ONE
        if uid in {0, os.geteuid()}:
            return count < most and of_process < most_of_one
        others = most - most // KEPT_FOR_US
        return count < others and max(of_uid, of_process) < most_of_one

    def close(self) -> None:
        """Stop listening and unlink the path, unless something else has taken it since."""
        self.socket.close()
        if self._identity is None:
            return
        try:
            if _identity(self.address) == self._identity:
                os.unlink(self.address)
        except OSError:
            pass  # it is gone already, or its directory is
        self._identity = None


def listen(address: str, mode: int = 0o660, *, private: str | None = None) -> ListeningSocket:
    """Bind, set the mode, listen, and only then become visible at ``address``.

    Args:
        address: a path, or ``@NAME`` for an abstract socket.
        mode: permission bits of the path; of an abstract name see ``ListeningSocket.admits``.
        private: if the socket lies in this directory, the directory is made if need be, must
            be ours, and gets mode 0700. ``None``: ``/tmp/cached-UID``.

    Returns:
        The socket, owned by the caller, who closes it.

    Raises:
        InvalidConfig: too long, taken, not a socket, or no directory to lie in. Nothing
            that was there has been touched.
    """
    _check_length(address)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if address.startswith("@"):
            _bind_abstract(listener, address)
            return ListeningSocket(listener, address, mode, None)
        directory = os.path.dirname(address) or "."
        folder = _open_directory(directory, private or f"/tmp/cached-{os.geteuid()}")  # noqa: S108 - made 0700, owner checked
        try:
            with _locked(folder, directory, f".{os.path.basename(address)}.lock"):
                _refuse_if_taken(address)
                identity = _bind_path(listener, address, directory, mode)
        finally:
            os.close(folder)
        return ListeningSocket(listener, address, mode, identity)
    except OSError as error:
        listener.close()
        message = f"cannot listen on {address}: {error.strerror or error}"
        raise InvalidConfig(message, hint=OTHER) from error
    except BaseException:
        listener.close()
        raise


def _check_length(address: str) -> None:
    length = len(os.fsencode(address.removeprefix("@")))
    if length > MAX_ADDRESS_BYTES:
        message = (
            f"the socket's address {address} is {length} bytes long, "
            f"the kernel takes at most {MAX_ADDRESS_BYTES}"
        )
        raise InvalidConfig(message, hint="choose a shorter one with --socket or CACHED_SOCKET")
    if address in {"", "@"} or "\0" in address:
        message = f"the socket's address must be a path or @NAME, was {address!r}"
        raise InvalidConfig(message, hint="set it with --socket or CACHED_SOCKET")


def _bind_abstract(listener: socket.socket, address: str) -> None:
    name = b"\0" + os.fsencode(address[1:])
    try:
        listener.bind(name)
    except OSError:
        _refuse_if_alive(name, address)
        raise
    listener.listen(BACKLOG)


def _open_directory(directory: str, private: str) -> int:
    """Return a descriptor of the directory.

    Raises:
        InvalidConfig: it is not there, or it should be private and is not ours.
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if directory != private:
        try:
            return os.open(directory, flags)
        except FileNotFoundError as error:
            message = f"the socket's directory {directory} does not exist"
            raise InvalidConfig(message, hint=f"make it, or {OTHER}") from error
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    try:
        folder = os.open(directory, flags | os.O_NOFOLLOW)
    except (NotADirectoryError, PermissionError) as error:
        # a link that somebody put there, or a directory of theirs
        raise _not_ours(directory, "it cannot be opened as one of ours") from error
    owner = os.fstat(folder).st_uid
    if owner != os.geteuid():
        os.close(folder)
        raise _not_ours(directory, f"it belongs to uid {owner}")
    os.fchmod(folder, 0o700)
    return folder


def _not_ours(directory: str, why: str) -> InvalidConfig:
    message = f"the socket's directory {directory} is not private to uid {os.geteuid()}: {why}"
    return InvalidConfig(message, hint=f"remove it, or {OTHER}")


@contextlib.contextmanager
def _locked(folder: int, directory: str, name: str) -> Iterator[None]:
    """Hold a lock, so that of two daemons that start at once one sees the other.

    It is on a file of ours that nobody else can open, for whoever can open it can lock it: of the
    directory that is everybody who may connect.
    """
    lock = _lock(folder, directory, name)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):  # somebody cleaned up
            os.unlink(name, dir_fd=folder)
        os.close(lock)


def _lock(folder: int, directory: str, name: str) -> int:
    for _ in range(LOCK_TRIES):
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(name, flags, 0o600, dir_fd=folder)
        try:
            _check_owner(lock, f"{directory}/{name}")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(name, dir_fd=folder), os.fstat(lock)):
                return lock
        except BlockingIOError:
            time.sleep(0.01)
        except FileNotFoundError:
            pass  # who had the lock has removed it: make it anew
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    message = f"the socket's directory {directory} is locked by another process"
    raise InvalidConfig(message, hint=f"end the process that has {name} open there, or {OTHER}")


def _check_owner(lock: int, path: str) -> None:
    owner = os.fstat(lock).st_uid
    if owner != os.geteuid():
        message = f"the lock {path} belongs to uid {owner}, not to uid {os.geteuid()}"
        raise InvalidConfig(message, hint=f"remove it, or {OTHER}")


def _refuse_if_taken(path: str) -> None:
    """Return if nothing is at ``path``, or a socket on which nobody listens any more."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        message = f"cannot listen on {path}: something that is not a socket is there"
        raise InvalidConfig(message, hint=f"remove it if it is not needed, or {OTHER}")
    _refuse_if_alive(os.fsencode(path), path)


def _refuse_if_alive(name: bytes, address: str) -> None:
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with probe:
        try:
            probe.connect(name)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:
            who = "a process that does not answer"  # its backlog is full
        else:
            who = _owner(probe)
    message = f"the socket {address} is taken by {who}"
    raise InvalidConfig(message, hint=f"stop it, or {OTHER}")


def _owner(connected: socket.socket) -> str:
    """Name who called ``listen`` at the other end (SO_PEERCRED: socket(7))."""
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid = struct.unpack("iII", raw)[0]
    return f"a process that runs (pid {pid})" if pid else "a process of another container"


def _bind_path(listener: socket.socket, path: str, directory: str, mode: int) -> tuple[int, ...]:
    """Make the socket under a name that nobody knows, then move it to ``path``."""
    temporary = _bind_temporary(listener, directory)
    try:
        os.chmod(temporary, mode)
        listener.listen(BACKLOG)
        identity = _identity(temporary)
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    return identity


def _bind_temporary(listener: socket.socket, directory: str) -> str:
    # No longer than the path may be: the kernel's limit holds for this name as well.
    room = MAX_ADDRESS_BYTES - len(os.fsencode(directory)) - 1
    for _ in range(16):
        temporary = os.path.join(directory, os.urandom(6).hex()[:room])
        try:
            listener.bind(temporary)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return temporary
    raise OSError(errno.EADDRINUSE, f"no free name for the socket in {directory}")


def _identity(path: str) -> tuple[int, ...]:
    found = os.lstat(path)
    # mtime: an inode number may be given out again, chmod and rename do not change it
    return found.st_dev, found.st_ino, found.st_mtime_ns
