"""The key of objects that are encrypted by a customer's own key (SSE-C), read where it is kept.

It never stands in the configuration, a log or an error: only the name of its file does.
"""

from __future__ import annotations

import binascii
import hashlib

from cached.core.errors import CredentialsUnavailable

KEY_BYTES = 32  # AES-256: the only algorithm of SSE-C
MAX_FILE_BYTES = 1024
_HEADER = "x-amz-server-side-encryption-customer-"


def headers_of(path: str) -> dict[str, str]:
    """Return the headers that a GET, HEAD or PUT of such an object needs.

    Names and values: "Specifying server-side encryption with customer-provided keys" in the
    Amazon S3 user guide.

    Args:
        path: of a file that holds the key: 32 bytes as they are, or their base64.

    Raises:
        CredentialsUnavailable: there is no such file, or something else is in it.
    """
    key = _key(path)
    digest = hashlib.md5(key, usedforsecurity=False).digest()
    return {
        f"{_HEADER}algorithm": "AES256",
        f"{_HEADER}key": binascii.b2a_base64(key, newline=False).decode(),
        f"{_HEADER}key-md5": binascii.b2a_base64(digest, newline=False).decode(),
    }


def _key(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES)
    except OSError as error:
        message = f"cannot read sse_customer_key_file {path}: {error.strerror}"
        hint = "name a file that the daemon's user can read"
        raise CredentialsUnavailable(message, hint=hint) from error
    if len(content) == KEY_BYTES:
        return content
    try:
        key = binascii.a2b_base64(content.strip(), strict_mode=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        message = (
            f"sse_customer_key_file {path} must hold {KEY_BYTES} bytes or their base64, "
            f"holds {len(content)} bytes of something else"
        )
        hint = "make one with: openssl rand -base64 32"
        raise CredentialsUnavailable(message, hint=hint) from None
    return key
