"""What the head of a reply says of an object, and whether it is the reply that was asked for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cached.core.errors import BadReply, ObjectChanged, ObjectRefused
from cached.core.objects import ObjectFacts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cached.adapters.s3.connections import Head
    from cached.core.objects import Part, StoredObject

CHECK_STORE = "check that the endpoint is an S3-compatible server"
_MUST_DO_RANGES = "the store, and any proxy before it, must support Range and If-Match"
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_ETAG = re.compile(r"[\x20-\x7e\x80-\xff]+")  # what a header can hold: RFC 9110, 8.8.3
_LENGTH = re.compile(r"[0-9]{1,18}")
# Metadata of the Amazon S3 Encryption Client, all its versions: the object is ciphertext.
_ENCRYPTED = re.compile(
    r"x-amz-meta-x-amz-(key|key-v2|iv|cek-alg|wrap-alg|matdesc|tag-len|c|3|w|m|d|i|t)"
)
_ALGORITHMS = ("crc64nvme", "crc32c", "crc32", "sha256", "sha1")  # the cheapest first
_SUM = re.compile(r"([A-Za-z0-9+/]{2,86}={0,2})(?:-([1-9][0-9]{0,4}))?")
_ENCRYPTION = "x-amz-server-side-encryption"


class _Sum(NamedTuple):
    """A checksum that the store told.

    Attributes:
        value: base64.
        parts: of the upload, if it is of their checksums; 0: not told; ``None``: it is of the
            whole object.
    """

    algorithm: str
    value: str
    parts: int | None


def check_part(url: str, part: Part, start: int, head: Head) -> None:
    """Raise unless the reply is exactly what was asked for; its length is checked later.

    Raises:
        ObjectChanged: it is of another version of the object.
        ObjectRefused: the object's client encrypted it.
        BadReply: another range, or none.
    """
    check_object(url, part.stored, head)
    size_bytes = part.stored.size_bytes
    if head.status == 200:
        if start == 0 and part.stop == size_bytes:
            return  # all of it was asked for
        message = f"the store answered 200 and all of {url} instead of a range"
        raise BadReply(message, hint=_MUST_DO_RANGES)
    told = head.headers.get("content-range", "")
    match = _RANGE.fullmatch(told)
    wanted = (start, part.stop - 1, size_bytes)
    if head.status != 206 or match is None or tuple(map(int, match.groups())) != wanted:
        message = (
            f"asked for bytes {start}-{part.stop - 1}/{size_bytes} of {url}, "
            f"got {head.status} with {told[:80]!r}"
        )
        raise BadReply(message, hint=_MUST_DO_RANGES)


def check_object(url: str, stored: StoredObject, head: Head) -> None:
    """Raise unless a reply is of this very version of an object, and of its plain bytes.

    Raises:
        ObjectChanged: it is of another version.
        ObjectRefused: the object's client encrypted it, or the reply has no strong ETag.
    """
    check_plain(url, head)
    etag = pinning(head.headers.get("etag", ""), url)
    if etag != stored.etag:
        message = f"{url} has the ETag {etag} now, had {stored.etag}"
        raise ObjectChanged(message, hint="open the model again for its new version")


def check_plain(url: str, head: Head) -> None:
    """Raise ObjectRefused if the object is ciphertext that only its client can read."""
    name = next((name for name in head.headers if _ENCRYPTED.fullmatch(name)), None)
    if name is not None:
        message = f"{url} was encrypted by its client ({name.removeprefix('x-amz-meta-')})"
        hint = "weights must be readable as they lie: encrypt them with SSE-S3 or SSE-KMS instead"
        raise ObjectRefused(message, hint=hint)


def pinning(etag: str, url: str) -> str:
    """Return an ETag that If-Match works with.

    Raises:
        ObjectRefused: there is none, or a weak one.
        BadReply: it cannot be an ETag.
    """
    if not etag:
        _unpinned(f"the store tells no ETag of {url}")
    if etag.startswith("W/"):
        _unpinned(f"the store tells only a weak ETag of {url}: {etag[:80]}")
    if not _ETAG.fullmatch(etag):
        message = f"the store tells an ETag of {url} that no header can hold: {etag[:80]!r}"
        raise BadReply(message, hint=CHECK_STORE)
    return etag


def _unpinned(message: str) -> NoReturn:
    hint = "without a strong ETag a replaced object goes unnoticed: use a store that has them"
    raise ObjectRefused(message, hint=hint)


def length_of(url: str, head: Head) -> int:
    """Return the length that a head tells.

    Raises:
        BadReply: it tells none.
    """
    length = head.headers.get("content-length", "")
    if not _LENGTH.fullmatch(length):
        message = f"the store does not tell the size of {url}"
        raise BadReply(message, hint=CHECK_STORE)
    return int(length)


def facts_of(head: Head) -> ObjectFacts:
    """Return what a head tells of its object; of checksums only one of the whole object."""
    headers = head.headers
    version = headers.get("x-amz-version-id")
    has_own_key = f"{_ENCRYPTION}-customer-algorithm" in headers
    return ObjectFacts(
        checksum=next((f"{s.algorithm}:{s.value}" for s in _sums(head) if s.parts is None), None),
        version_id=None if version in {None, "", "null"} else version,
        encryption="SSE-C" if has_own_key else headers.get(_ENCRYPTION),
        kms_key=headers.get(f"{_ENCRYPTION}-aws-kms-key-id"),
        has_bucket_key=headers.get(f"{_ENCRYPTION}-bucket-key-enabled", "").lower() == "true",
    )


def has_composite(head: Head) -> bool:
    """Return whether it tells a checksum of the checksums of an upload's parts."""
    return any(found.parts is not None for found in _sums(head))


def composite_of(head: Head, part_bytes: int, size_bytes: int) -> str | None:
    """Return the checksum of an upload's parts: ``algorithm:base64-N@PART_BYTES``.

    Args:
        head: ``has_composite``.
        part_bytes: the length of the first part.
        size_bytes: of the object.

    Returns:
        ``None`` if its parts are not all as long as the first: where they lie is not known.
    """
    parts = -(-size_bytes // part_bytes) if part_bytes else 0
    for found in _sums(head):
        if found.parts is not None and parts and found.parts in {0, parts}:
            return f"{found.algorithm}:{found.value}-{parts}@{part_bytes}"
    return None


def _sums(head: Head) -> Iterator[_Sum]:
    """Yield the checksums that a head tells, the cheapest first."""
    is_composite = head.headers.get("x-amz-checksum-type") == "COMPOSITE"
    for algorithm in _ALGORITHMS:
        match = _SUM.fullmatch(head.headers.get(f"x-amz-checksum-{algorithm}", ""))
        if match is not None:
            parts = int(match[2] or 0)
            yield _Sum(algorithm, match[1], parts if parts or is_composite else None)
