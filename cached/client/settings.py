"""Where the daemon's socket is, and which models there are: the same rule for daemon and client.

The client reads the environment here and nowhere else. Flags go before the environment, that
before the file (``CACHED_CONFIG``), that before the defaults (docs/configuration.md).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from cached.core.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

SIDECAR_DIRECTORY = "/cached"
MAX_SOCKET_BYTES = 107  # sun_path holds 108 with its NUL: unix(7)
_STORE = {  # and the variables of the AWS SDKs that are read where ours is not set
    "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "ca_bundle": ("AWS_CA_BUNDLE",),
    "addressing_style": (),
}
_TRUE = {"1", "true", "yes", "on"}


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
    configured = _file(environ).get("socket")
    if configured is not None:
        return checked_address(configured, environ["CACHED_CONFIG"])
    return default_address(environ, uid)


def checked_address(given: object, source: str) -> str:
    """Return an address that was given, a relative path made absolute.

    Args:
        given: as it was written.
        source: who gave it.

    Raises:
        InvalidConfig: no socket can have it.
    """
    address = given if isinstance(given, str) else ""
    if address and not address.startswith(("/", "@")):
        address = os.path.abspath(os.path.expanduser(address))
    if not 0 < len(os.fsencode(address)) <= MAX_SOCKET_BYTES or address == "@":
        message = (
            f"socket must be a path of at most {MAX_SOCKET_BYTES} bytes, or @NAME (abstract), "
            f"was {given!r:.200} (from {source})"
        )
        raise InvalidConfig(message, hint="name a shorter path, for example /tmp/cached.sock")
    return address


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


def model_uri(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Return where a model is stored, if the environment or the file says so.

    Args:
        name: of the model.
        environ: the environment; ``None``: of this process.
    """
    environ = os.environ if environ is None else environ
    for pair in environ.get("CACHED_MODELS", "").split():
        key, _, uri = pair.partition("=")
        if key == name and uri:
            return uri
    models = _file(environ).get("models")
    entry = models.get(name) if isinstance(models, dict) else None
    found = entry.get("uri") if isinstance(entry, dict) else None
    return found if isinstance(found, str) else None


def store_settings(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the settings of the store for a worker that reads it without a daemon.

    Returns:
        ``endpoint_url``, ``region``, ``ca_bundle``, ``addressing_style`` as far as they are
        set; ``anonymous``, ``allow_insecure_endpoint`` only where they are true.
    """
    environ = os.environ if environ is None else environ
    file = _file(environ)
    found: dict[str, str] = {}
    for key, more in _STORE.items():
        names = (f"CACHED_{key.upper()}", *more)
        value: object = next((environ[name] for name in names if environ.get(name)), file.get(key))
        if isinstance(value, str) and value:
            found[key] = value
    for key in ("anonymous", "allow_insecure_endpoint"):
        switch = environ.get(f"CACHED_{key.upper()}", file.get(key))
        if str(switch).lower() in _TRUE:
            found[key] = "true"
    return found


def _file(environ: Mapping[str, str]) -> dict[str, object]:
    path = environ.get("CACHED_CONFIG")
    if not path:
        return {}
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError) as error:
        message = f"cannot read {path}: {error}"
        raise InvalidConfig(message, hint="CACHED_CONFIG must name a TOML file") from error
