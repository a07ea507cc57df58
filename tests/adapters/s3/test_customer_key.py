"""A key of the customer is read as it lies, and stands in no error."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

import pytest

from cached.adapters.s3.customer_key import headers_of
from cached.core.errors import CredentialsUnavailable

if TYPE_CHECKING:
    from pathlib import Path

KEY = bytes(range(200, 232))
TEXT = base64.b64encode(KEY)


@pytest.mark.parametrize("content", [KEY, TEXT, TEXT + b"\n", b" " + TEXT + b"\r\n"])
def test_a_key_is_read_raw_or_as_base64(tmp_path: Path, content: bytes):
    path = tmp_path / "key"
    path.write_bytes(content)
    assert headers_of(str(path)) == {
        "x-amz-server-side-encryption-customer-algorithm": "AES256",
        "x-amz-server-side-encryption-customer-key": TEXT.decode(),
        "x-amz-server-side-encryption-customer-key-md5": base64.b64encode(
            hashlib.md5(KEY).digest()
        ).decode(),
    }


def test_32_bytes_are_a_key_even_if_they_look_like_base64(tmp_path: Path):
    (tmp_path / "key").write_bytes(TEXT[:32])
    found = headers_of(str(tmp_path / "key"))
    sent = found["x-amz-server-side-encryption-customer-key"]
    assert base64.b64decode(sent) == TEXT[:32]


@pytest.mark.parametrize(
    "content", [b"", KEY[:31], KEY + b"\n", TEXT[:-4], TEXT * 2, TEXT[:-1] + b"?", b"s3cret" * 999]
)
def test_anything_else_is_refused_without_a_word_of_it(tmp_path: Path, content: bytes):
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(
        CredentialsUnavailable, match="must hold 32 bytes or their base64"
    ) as caught:
        headers_of(str(path))
    assert str(path) in caught.value.message
    assert not caught.value.transient
    assert caught.value.__cause__ is None
    for piece in (TEXT[:8].decode(), "s3cret"):
        assert piece not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(
        CredentialsUnavailable, match=r"cannot read sse_customer_key_file .*/none: No"
    ):
        headers_of(str(tmp_path / "none"))
