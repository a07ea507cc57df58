"""Whether this process can open a model by path; and if not, why, and what helps."""

from __future__ import annotations

import os

from cached.core.errors import NotPermitted

_PROCESSES = "/proc/"


def can_open(path: str) -> bool:
    """Return whether a file can be opened from here."""
    return _refusal(path) is None


def check(name: str, path: str) -> None:
    """Refuse a file of a model's directory that cannot be opened from here.

    Args:
        name: of the model.
        path: of one of its files.

    Raises:
        NotPermitted: it cannot be; the text says why and what to do.
    """
    error = _refusal(path)
    if error is None:
        return
    target = _target(path)
    if target.startswith(_PROCESSES):
        message = f"{name} is in sealed memory, and {path} leads to {target}: {error.strerror}"
        hint = (
            "this process runs as another user than the daemon, or sees other processes: read "
            "tensors or buffers instead, or start the daemon with --segments tmpfs"
        )
    else:
        message = f"{name} cannot be opened by path from here: {path}: {error.strerror}"
        hint = (
            "the daemon's segment root must be mounted at the same place in this container, and "
            "open to this user (--socket-mode); or read tensors or buffers instead"
        )
    raise NotPermitted(message, hint=hint) from error


def _refusal(path: str) -> OSError | None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error
    return None


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""  # no link, or nothing is there
