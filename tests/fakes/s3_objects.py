"""What the S3 server of the tests holds, and how it answers."""

from __future__ import annotations

import base64
import calendar
import hashlib
import itertools
import re
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl, quote, quote_plus, unquote
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_BYTES = 1_048_573  # a prime: no two parts of a model look alike
PAGE_KEYS = 1000


class Generated(NamedTuple):
    """An object of which nothing is stored: byte ``i`` follows from ``i`` and the seed."""

    size_bytes: int
    seed: int = 0

    def view(self, start: int, stop: int) -> memoryview:
        """Return bytes ``[start, stop)``; at most one block of them, so maybe fewer."""
        at = start % BLOCK_BYTES
        return memoryview(_block(self.seed))[at : at + min(stop - start, BLOCK_BYTES)]

    def content(self, start: int, stop: int) -> bytes:
        """Return bytes ``[start, stop)``."""
        pieces = []
        while start < stop:
            pieces.append(bytes(self.view(start, stop)))
            start += len(pieces[-1])
        return b"".join(pieces)


_BLOCKS: dict[int, bytes] = {}


def _block(seed: int) -> bytes:
    """Return two blocks, so that every slice of one block's length is a plain slice."""
    if seed not in _BLOCKS:
        _BLOCKS[seed] = hashlib.shake_128(str(seed).encode()).digest(BLOCK_BYTES) * 2
    return _BLOCKS[seed]


Content = bytes | Path | Generated


class Stored(NamedTuple):
    """One object: ``headers`` come with every reply to a GET or HEAD of it.

    Attributes:
        part_bytes: of its multipart upload, or the lengths of all parts; 0: it was uploaded in one.
        customer_key_md5: of the key that it is encrypted by (SSE-C), as a header tells it.
    """

    content: Content
    etag: str
    headers: tuple[tuple[str, str], ...] = ()
    part_bytes: int | tuple[int, ...] = 0
    customer_key_md5: str = ""

    @property
    def size_bytes(self) -> int:
        match self.content:
            case bytes():
                return len(self.content)
            case Path():
                return self.content.stat().st_size
            case Generated():
                return self.content.size_bytes

    @property
    def parts(self) -> tuple[int, ...]:
        """Return the lengths of the parts of its upload; none if it was uploaded in one."""
        if isinstance(self.part_bytes, tuple) or not self.part_bytes:
            return self.part_bytes or ()
        starts = range(0, self.size_bytes, self.part_bytes)
        return tuple(min(self.part_bytes, self.size_bytes - start) for start in starts)

    def content_of(self, start: int, stop: int) -> bytes:
        """Return bytes ``[start, stop)``."""
        match self.content:
            case bytes():
                return self.content[start:stop]
            case Path():
                return self.content.read_bytes()[start:stop]
            case Generated():
                return self.content.content(start, stop)


def stored(content: Content | Stored) -> Stored:
    """Return an object with an ETag that is another for another content."""
    if isinstance(content, Stored):
        return content
    named = content if isinstance(content, bytes) else repr(content).encode()
    return Stored(content, f'"{hashlib.md5(named, usedforsecurity=False).hexdigest()}"')


def replaced(found: Stored) -> Stored:
    """Return an object to put in the place of one: as long, every byte and the ETag another.

    Headers stay, but for the checksums of ``summed``.
    """
    content = found.content_of(0, found.size_bytes).translate(_NEXT_BYTE)
    made = stored(content)._replace(headers=found.headers, part_bytes=found.part_bytes)
    names = [name for name, _ in found.headers if name.startswith(CHECKSUM)]
    return summed(made, names[0].removeprefix(CHECKSUM)) if names else made


_NEXT_BYTE = bytes((byte + 1) % 256 for byte in range(256))


def flipped(content: bytes, at: int) -> bytes:
    """Return the same bytes but for the lowest bit of one."""
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


CHECKSUM = "x-amz-checksum-"


def _crc64nvme(data: bytes) -> bytes:
    from awscrt import checksums  # here: few tests need it

    value: int = checksums.crc64nvme(data)
    return value.to_bytes(8)


def _crc32c(data: bytes) -> bytes:
    from awscrt import checksums

    value: int = checksums.crc32c(data)
    return value.to_bytes(4)


_SUMS: dict[str, Callable[[bytes], bytes]] = {
    "crc64nvme": _crc64nvme,
    "crc32c": _crc32c,
    "crc32": lambda data: zlib.crc32(data).to_bytes(4),
    "sha1": lambda data: hashlib.sha1(data, usedforsecurity=False).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}


def summed(found: Stored, algorithm: str) -> Stored:
    """Return the object with its checksum, as the store tells it; of its parts if it has some.

    Args:
        found: any; ``part_bytes`` decides whether its checksum is composite.
        algorithm: ``crc64nvme``, ``crc32c``, ``crc32``, ``sha1`` or ``sha256``.
    """
    sum_of = _SUMS[algorithm]
    content = found.content_of(0, found.size_bytes)
    value = base64.b64encode(sum_of(content)).decode()
    if found.parts:
        stops = itertools.accumulate(found.parts)
        spans = zip(stops, found.parts, strict=True)
        sums = b"".join(sum_of(content[stop - length : stop]) for stop, length in spans)
        value = f"{base64.b64encode(sum_of(sums)).decode()}-{len(found.parts)}"
    kept = tuple(pair for pair in found.headers if not pair[0].startswith(CHECKSUM))
    return found._replace(headers=(*kept, (CHECKSUM + algorithm, value)))


class Answer(NamedTuple):
    """A reply that is whole in memory."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


class Asked(NamedTuple):
    """A request as it came: ``path`` still quoted, names of headers in lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def parameters(self) -> dict[str, str]:
        return dict(parse_qsl(self.query, keep_blank_values=True))


SENT_KEY_MD5 = "x-amz-server-side-encryption-customer-key-md5"


def locked(found: Stored, asked: Asked) -> Answer | None:
    """Return the refusal of an object of SSE-C without its key, or of a key too many."""
    sent = asked.headers.get(SENT_KEY_MD5, "")
    if sent == found.customer_key_md5:
        return None
    if not sent:
        text = (
            "The object was stored using a form of Server Side Encryption. "
            "The correct parameters must be provided to retrieve the object."
        )
        return refusal(400, "InvalidRequest", text)
    if not found.customer_key_md5:
        text = "The encryption parameters are not applicable to this object."
        return refusal(400, "InvalidRequest", text)
    return refusal(403, "AccessDenied", "Access Denied")


def refusal(status: int, code: str, message: str = "", members: str = "") -> Answer:
    """Return the answer to what is not served; ``members`` is XML."""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{escape(message)}</Message>{members}</Error>"
    )
    return Answer(status, (("content-type", "application/xml"),), body.encode())


def listing(objects: dict[str, Stored], asked: Asked, page_keys: int) -> Answer:
    """Answer ListObjectsV2: sorted by UTF-8, one page from the continuation token on."""
    parameters = asked.parameters
    prefix = parameters.get("prefix", "")
    keys = sorted((key for key in objects if key.startswith(prefix)), key=str.encode)
    token = parameters.get("continuation-token", "")
    after = base64.urlsafe_b64decode(token).decode() if token else ""
    keys = [key for key in keys if key.encode() > after.encode()]
    page = keys[: min(page_keys, int(parameters.get("max-keys", PAGE_KEYS)))]
    is_truncated = len(page) < len(keys)
    is_quoted = parameters.get("encoding-type") == "url"
    shown = (lambda key: quote_plus(key, safe="/")) if is_quoted else escape
    contents = "".join(
        f"<Contents><Key>{shown(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>{escape(objects[key].etag, {chr(34): '&quot;'})}</ETag>"
        f"<Size>{objects[key].size_bytes}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key in page
    )
    more = ""
    if is_truncated:
        next_token = base64.urlsafe_b64encode(page[-1].encode()).decode()
        more = f"<NextContinuationToken>{next_token}</NextContinuationToken>"
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>models</Name><Prefix>{shown(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
        f"{'<EncodingType>url</EncodingType>' if is_quoted else ''}"
        f"<IsTruncated>{'true' if is_truncated else 'false'}</IsTruncated>{more}{contents}"
        "</ListBucketResult>"
    )
    return Answer(200, (("content-type", "application/xml"),), body.encode())


class Account(NamedTuple):
    """Who may ask, and where this store is.

    Attributes:
        expired: access keys whose time is over.
        expired_status: of the refusal of those.
    """

    access_key: str
    secret_key: str
    region: str
    session_token: str | None = None
    expired: frozenset[str] = frozenset()
    expired_status: int = 400


MAX_SKEW_S = 900


def unsigned(asked: Asked, account: Account, wall_s: float) -> Answer | None:
    """Return what is wrong with a request's signature: recomputed by botocore, as S3 does it.

    That is from the decoded path and query: what is quoted in another way on the wire than in
    the signature does not match.
    """
    authorization = asked.headers.get("authorization", "")
    match = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request, "
        r"SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})",
        authorization,
    )
    if match is None:
        return refusal(403, "AccessDenied", "Access Denied")
    access_key = match[1]
    if access_key in account.expired:
        return refusal(account.expired_status, "ExpiredToken", "The provided token has expired.")
    if access_key != account.access_key:
        return refusal(403, "InvalidAccessKeyId", "The key you provided does not exist.")
    return _wrongly_signed(asked, account, wall_s, (match[3], match[4], match[5]))


def _wrongly_signed(
    asked: Asked, account: Account, wall_s: float, told: tuple[str, str, str]
) -> Answer | None:
    region, listed, signature = told
    date = asked.headers.get("x-amz-date", "")
    if region != account.region:
        message = f"the region '{region}' is wrong; expecting '{account.region}'"
        return refusal(
            400, "AuthorizationHeaderMalformed", message, f"<Region>{account.region}</Region>"
        )
    if abs(calendar.timegm(time.strptime(date, "%Y%m%dT%H%M%SZ")) - wall_s) > MAX_SKEW_S:
        return refusal(403, "RequestTimeTooSkewed", "The difference is too large.")
    names = listed.split(";")
    wanted = {name for name in asked.headers if name.startswith("x-amz-")} | {"host"}
    if not wanted <= set(names):
        return refusal(403, "AccessDenied", f"not signed: {sorted(wanted - set(names))}")
    if asked.headers.get("x-amz-content-sha256") != hashlib.sha256(asked.body).hexdigest():
        return refusal(400, "XAmzContentSHA256Mismatch", "It does not match what was computed.")
    if signature != _signature(asked, account, names):
        return refusal(403, "SignatureDoesNotMatch", "Check your key and signing method.")
    return None


def _signature(asked: Asked, account: Account, names: list[str]) -> str:
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    keys = Credentials(account.access_key, account.secret_key, account.session_token)
    auth = S3SigV4Auth(keys, "s3", account.region)
    path = quote(unquote(asked.path), safe="/-_.~")
    query = "&".join(
        f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}"
        for name, value in parse_qsl(asked.query, keep_blank_values=True)
    )
    request = AWSRequest(
        method=asked.method,
        url=f"http://{asked.headers['host']}{path}?{query}",
        headers={name: asked.headers.get(name, "") for name in names},
    )
    request.context["timestamp"] = asked.headers["x-amz-date"]
    request.context["payload_signing_enabled"] = True
    to_sign = auth.string_to_sign(request, auth.canonical_request(request))
    signature: str = auth.signature(to_sign, request)
    return signature
