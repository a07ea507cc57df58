"""What the misbehaving store holds, and its XML."""

from __future__ import annotations

import base64
import hashlib
import os
import zlib
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

BLOCK_BYTES = 1 << 20


class Stored(NamedTuple):
    """One version of an object, its file open."""

    descriptor: int
    size_bytes: int
    etag: str
    checksums: Mapping[str, str]


def stored(path: str, algorithms: Sequence[str]) -> Stored:
    """Return a file as an object, with these checksums; who asked closes its descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    size_bytes = os.fstat(descriptor).st_size
    etag = hashlib.md5(f"{path} {size_bytes}".encode(), usedforsecurity=False).hexdigest()
    sums = {name: base64.b64encode(digest(name, path)).decode() for name in algorithms}
    return Stored(descriptor, size_bytes, f'"{etag}"', sums)


def digest(algorithm: str, path: str) -> bytes:
    """Return the checksum of a file as S3 writes it before base64: big-endian.

    Raises:
        KeyError: there is no such algorithm.
    """
    buffer = memoryview(bytearray(BLOCK_BYTES))
    sha256 = hashlib.sha256()
    value = 0
    step = None if algorithm == "sha256" else _steps()[algorithm]
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if step is None:
                sha256.update(buffer[:count])
            else:
                value = step(bytes(buffer[:count]), value)
    return sha256.digest() if step is None else value.to_bytes(8 if "64" in algorithm else 4, "big")


def _steps() -> dict[str, Callable[[bytes, int], int]]:
    from awscrt import checksums

    return {
        "crc32": zlib.crc32,
        "crc32c": checksums.crc32c,
        "crc64nvme": checksums.crc64nvme,
    }


def listing(bucket: str, query: str, objects: Mapping[str, Stored]) -> str:
    """Return the one page of ListObjectsV2."""
    prefix = parse_qs(query).get("prefix", [""])[0]
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{found.size_bytes}</Size>"
        f"<ETag>{escape(found.etag)}</ETag><StorageClass>STANDARD</StorageClass>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for key, found in sorted(objects.items())
        if key.startswith(prefix)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
        f"<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
    )


def error_body(code: str) -> str:
    """Return the body of a refusal."""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
    )
