"""The token that allows changes over HTTP: in a file that only the daemon's user can read."""

from __future__ import annotations

import hmac
import os
import stat

from cached.core.errors import InvalidConfig

MIN_BYTES = 16  # 128 bits, were they random: nobody guesses it over the network
MAX_BYTES = 4096
_SCHEME = b"bearer "


class TokenFile:
    """Read at each use, so that it can be replaced while the daemon runs. Any thread.

    Args:
        path: of the file; white space around the token does not count.

    Raises:
        InvalidConfig: it cannot be read, others may read it, or it holds no token.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._read()

    def allows(self, authorization: str) -> bool:
        """Return whether the header says ``Bearer`` and the token.

        Takes as long for a token that is nearly right as for any other.

        Args:
            authorization: the header, as it came.

        Raises:
            InvalidConfig: the file is not as it was at the start; nobody is allowed.
        """
        given = authorization.encode("utf-8", "replace")
        is_bearer = given[: len(_SCHEME)].lower() == _SCHEME  # RFC 6750, RFC 9110 section 11.1
        return hmac.compare_digest(given[len(_SCHEME) :].strip(), self._read()) and is_bearer

    def _read(self) -> bytes:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
            raise self._refusal(why) from error
        try:
            status = os.fstat(fd)
            token = os.read(fd, MAX_BYTES + 1).strip() if stat.S_ISREG(status.st_mode) else b""
        finally:
            os.close(fd)
        if not stat.S_ISREG(status.st_mode):
            raise self._refusal("is no file")
        if status.st_mode & 0o077:
            why = f"has mode {status.st_mode & 0o777:04o}: others may read or change it"
            raise self._refusal(why)
        if not MIN_BYTES <= len(token) <= MAX_BYTES:
            why = f"must hold {MIN_BYTES} to {MAX_BYTES} bytes, holds {len(token)}"
            raise self._refusal(why)
        return token

    def _refusal(self, why: str) -> InvalidConfig:
        hint = f"make one: (umask 077; openssl rand -hex 32 > {self._path})"
        return InvalidConfig(f"http_token_file {self._path} {why}", hint=hint)
