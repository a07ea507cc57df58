"""Where the daemon's socket is, and what else a worker is told: the same rule as the daemon's.

The client reads the environment here and nowhere else. Flags go before the environment, that
before the file (``CACHED_CONFIG``), that before the defaults (docs/configuration.md). The table
of all options is imported only where it is needed: it costs a worker 2 ms.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from cached.core.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cached.core.config import Level

SIDECAR_DIRECTORY = "/cached"
MAX_SOCKET_BYTES = 107  # sun_path holds 108 with its NUL: unix(7)
_OF_RUN = {"CACHED_MODEL_NAME", "CACHED_MODEL_PATH", "CACHED_MODEL_VERSION"}  # of cached run
_USUAL = {"CACHED_SOCKET", "CACHED_CONFIG", "CACHED_MODELS"} | _OF_RUN  # known without the table


def daemon_address(
    given: str | None = None, source: str = "socket", environ: Mapping[str, str] | None = None
) -> str:
    """Return the address of the daemon's socket, checked.

    Args:
        given: as somebody wrote it; ``None``: ``socket_address``.
        source: who gave it.
        environ: the environment; ``None``: of this process.

    Raises:
        InvalidConfig: no socket can have it, or another user may have put one there; or the
            environment or the file holds a name that nobody reads.
    """
    environ = os.environ if environ is None else environ
    unusual = [name for name in environ if name.startswith("CACHED_") and name not in _USUAL]
    if unusual:
        from cached.core.config import check_variables

        check_variables(unusual)
    if given is not None:
        return checked_address(given, source)
    address = socket_address(environ)
    check_owner(address)
    return address


def socket_address(environ: Mapping[str, str] | None = None, uid: int | None = None) -> str:
    """Return the address of the daemon's socket: a path, or ``@NAME``.

    The first that applies: ``CACHED_SOCKET``; ``socket`` in the file that ``CACHED_CONFIG``
    names; on Lambda ``@cached-UID``; ``/cached/cached.sock`` where ``/cached`` is a directory;
    ``$XDG_RUNTIME_DIR/cached.sock``; ``/tmp/cached-UID/cached.sock``.

    Args:
        environ: the environment; ``None``: of this process.
        uid: of the user; ``None``: of this process.

    Raises:
        InvalidConfig: the file that ``CACHED_CONFIG`` names cannot be read, or what was given
            is no address.
    """
    environ = os.environ if environ is None else environ
    uid = os.getuid() if uid is None else uid
    given = environ.get("CACHED_SOCKET", "").strip()
    if given:
        return checked_address(given, "CACHED_SOCKET")
    for level in _file(environ):
        if "socket" in level.options:
            return checked_address(*level.options["socket"])
    return default_address(environ, uid)


def checked_address(given: object, source: str) -> str:
    """Return an address that was given, a relative path made absolute.

    Args:
        given: as it was written.
        source: who gave it.

    Raises:
        InvalidConfig: no socket can have it.
    """
    address = given if isinstance(given, str) and given.strip() else ""
    if address:
        address = absolute_address(address)
    is_text = not any(letter < " " or letter == "\x7f" for letter in address)
    if not 0 < len(os.fsencode(address)) <= MAX_SOCKET_BYTES or address == "@" or not is_text:
        message = (
            f"socket must be a path of at most {MAX_SOCKET_BYTES} bytes, or @NAME (abstract), "
            f"was {given!r:.200} (from {source})"
        )
        raise InvalidConfig(message, hint="name a shorter path, for example /tmp/cached.sock")
    return address


def absolute_address(address: str) -> str:
    """Return an address, a relative path made absolute; ``~`` is the user's home."""
    if address.startswith(("/", "@")):
        return address
    return os.path.abspath(os.path.expanduser(address))


def default_address(environ: Mapping[str, str], uid: int) -> str:
    """Return the address where nobody chose one."""
    if environ.get("AWS_LAMBDA_RUNTIME_API"):
        return f"@cached-{uid}"
    if os.path.isdir(SIDECAR_DIRECTORY):
        return f"{SIDECAR_DIRECTORY}/cached.sock"
    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return f"{runtime}/cached.sock"
    return f"/tmp/cached-{uid}/cached.sock"  # noqa: S108 - 0700, and its owner is checked


def check_owner(address: str) -> None:
    """Refuse a socket in ``/tmp/cached-UID`` that another user could have put there.

    Raises:
        InvalidConfig: the directory is not ours, or others may write it.
    """
    directory = os.path.dirname(address)
    if not directory.startswith("/tmp/cached-"):  # noqa: S108 - that is what is checked
        return
    try:
        status = os.lstat(directory)
    except FileNotFoundError:
        return  # no daemon has been there: connecting says so
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid in {os.getuid(), 0}
    if not is_ours or status.st_mode & 0o022:
        message = f"{directory} belongs to uid {status.st_uid} and has mode {status.st_mode:04o}"
        hint = "another user may have put a socket there: name the right one with CACHED_SOCKET"
        raise InvalidConfig(message, hint=hint)


def levels(environ: Mapping[str, str] | None = None) -> list[Level]:
    """Return what the environment and the file give, the highest first.

    Args:
        environ: the environment; ``None``: of this process.

    Raises:
        InvalidConfig: a name that nobody reads, or a file that cannot be read.
    """
    environ = os.environ if environ is None else environ
    from cached.core.config import from_environment

    return [from_environment(environ), *_file(environ)]


def from_file(path: str, source: str) -> Level:
    """Return the level of a TOML file.

    Args:
        path: of the file.
        source: who named it.

    Raises:
        InvalidConfig: it cannot be read, is not TOML or holds a key that nobody reads.
    """
    import tomllib  # only where there is a file: it costs 4 ms

    from cached.core.config import from_document

    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror} (from {source})"
        raise InvalidConfig(message, hint="name a readable TOML file") from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        message = f"{path} is not TOML: {error} (from {source})"
        raise InvalidConfig(message, hint="toml.io describes the format") from error
    return from_document(document, path)


def _file(environ: Mapping[str, str]) -> list[Level]:
    """Return the level of the file that the environment names; nothing if it names none."""
    path = environ.get("CACHED_CONFIG")
    return [from_file(path, "CACHED_CONFIG")] if path else []
