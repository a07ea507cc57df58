"""Finding the daemon: one that starts at this moment is waited for; what is wrong is said."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

from cached.client.connection import Connection
from cached.core.errors import DaemonUnavailable

if TYPE_CHECKING:
    from cached.client.deadline import Deadline

_RETRY_S = 0.02  # a worker that starts together with the daemon
_NOT_YET = (FileNotFoundError, ConnectionRefusedError)  # a daemon that starts may mend it
_ERRNO_TEXT = {
    FileNotFoundError: "nothing is there",
    ConnectionRefusedError: "nobody listens on it",
    PermissionError: "this user may not connect to it",
    BlockingIOError: "too many others wait to be accepted",
}


def connect(address: str, deadline: Deadline, *, is_patient: bool = False) -> Connection:
    """Return a connection to the daemon; the caller closes it.

    Args:
        address: a path, or ``@NAME`` for an abstract socket.
        deadline: of the attempts.
        is_patient: try again until the deadline if nobody listens yet.

    Raises:
        DaemonUnavailable: nobody listens there.
    """
    while True:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Where many wait to be accepted the kernel lets them in, one after the other; who only
            # tried would be overtaken by whoever tries more often.
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(deadline.left_s))
            connected.connect("\0" + address[1:] if address.startswith("@") else address)
            connected.getpeername()
            connected.setblocking(False)
            return Connection(connected, address)
        except OSError as error:
            connected.close()
            # EAGAIN: the time is over; ENOTCONN: a signal came while the kernel waited
            can_retry = error.errno in {errno.EAGAIN, errno.ENOTCONN} or (
                is_patient and isinstance(error, _NOT_YET)
            )
            if not can_retry or deadline.has_passed:
                raise _unreachable(address, error) from error
        except BaseException:
            connected.close()
            raise
        deadline.sleep(_RETRY_S)


def _timeval(left_s: float | None) -> bytes:
    """Return a time-out for setsockopt; the kernel takes 0 for none."""
    left_us = 0 if left_s is None else max(1, int(left_s * 1e6))
    return struct.pack("@ll", *divmod(left_us, 1_000_000))


def _unreachable(address: str, error: OSError) -> DaemonUnavailable:
    why = _ERRNO_TEXT.get(type(error), error.strerror or str(error))
    message = f"cannot connect to the daemon at {address}: {why}"
    hint = "start it (cached serve), or name its socket with CACHED_SOCKET"
    if isinstance(error, PermissionError):
        hint = _who_may_connect(address)
    elif isinstance(error, BlockingIOError):
        hint = "try again; if it lasts, the daemon is stopped or overrun: see its log"
    return DaemonUnavailable(message, hint=hint)


def _who_may_connect(address: str) -> str:
    import grp  # only where they are needed
    import pwd
    from contextlib import suppress

    try:
        status = os.stat(address)
    except OSError:
        return "a directory on the way to it is closed to this user: ask whoever runs the daemon"
    owner, group = str(status.st_uid), str(status.st_gid)
    with suppress(KeyError):  # no name for that number
        owner = pwd.getpwuid(status.st_uid).pw_name
    with suppress(KeyError):
        group = grp.getgrgid(status.st_gid).gr_name
    return (
        f"it is of user {owner} and group {group}, with mode {status.st_mode & 0o777:04o}: be one "
        "of these, or start the daemon with another --socket-mode"
    )
