"""Checksums that stores keep of objects: how they are written, and how they are put together.

Sources: docs.aws.amazon.com, "Checking object integrity in Amazon S3" (full object and composite
checksums); Adler, zlib's crc32_combine (joining the CRCs of two byte strings).
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import re
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

SIZES: Final = {"crc64nvme": 8, "crc32c": 4, "crc32": 4, "sha256": 32, "sha1": 20}
"""Algorithms, the cheapest first, and the bytes of their values."""

LENGTH: Final = "length"
WAYS: Final = frozenset({*SIZES, "digest", LENGTH, ""})
"""By what a file was checked; empty: by nothing that is known."""

# Reflected polynomials (without the highest term), all with initial and final value ~0.
_POLYNOMIALS: Final = {
    "crc64nvme": 0x9A6C9329AC4BC9B5,
    "crc32c": 0x82F63B78,
    "crc32": 0xEDB88320,
}
_LENGTH_BITS: Final = 63  # of the longest file
_TEXT: Final = re.compile(r"([a-z0-9]+):([A-Za-z0-9+/]+={0,2})(?:-(\d{1,5})@(\d{1,15}))?", re.ASCII)


def summary(ways: Collection[str]) -> str:
    """Return by what the files of a model were checked.

    ``length`` comes last; it is also what is told where nothing is known.

    Args:
        ways: of ``WAYS``, of each file.
    """
    named = sorted(set(ways) - {"", LENGTH})
    return " ".join([*named, LENGTH] if LENGTH in ways or not named else named)


class Checksum(NamedTuple):
    """What a store keeps of one object.

    Attributes:
        algorithm: one of ``SIZES``.
        value: big-endian.
        part_bytes: of a composite one, which is the checksum of the values of the parts of the
            upload: the length of each but the last; ``None``: of the whole object.
    """

    algorithm: str
    value: bytes
    part_bytes: int | None = None


def parse(text: str) -> Checksum:
    """Return what ``ObjectFacts.checksum`` says: ``ALGORITHM:BASE64`` or ``…-PARTS@PART_BYTES``.

    Raises:
        ValueError: it is something else.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        message = f"not a checksum: {text[:80]!r}"
        raise ValueError(message)
    algorithm, value, _, part_bytes = match.groups()
    try:
        raw = base64.b64decode(value, validate=True)
    except binascii.Error as error:
        message = f"not base64: {value[:80]!r}"
        raise ValueError(message) from error
    if len(raw) != SIZES.get(algorithm):
        message = f"no checksum of {len(raw)} bytes is known as {algorithm[:20]!r}"
        raise ValueError(message)
    if part_bytes is not None and not int(part_bytes):
        raise ValueError("parts of 0 bytes")
    return Checksum(algorithm, raw, int(part_bytes) if part_bytes else None)


def composite(algorithm: str, values: Sequence[bytes]) -> bytes:
    """Return the checksum of the values of an upload's parts.

    Args:
        algorithm: one that needs no package: SHA, or a CRC, which is computed slowly here.
        values: in order.
    """
    data = b"".join(values)
    if algorithm.startswith("sha"):
        return hashlib.new(algorithm, data, usedforsecurity=False).digest()
    if algorithm == "crc32":
        return zlib.crc32(data).to_bytes(4)
    return _slow_crc(algorithm, data)


def _slow_crc(algorithm: str, data: bytes) -> bytes:
    """Return a CRC bit by bit: for some hundred bytes."""
    polynomial, size = _POLYNOMIALS[algorithm], SIZES[algorithm]
    ones = (1 << (8 * size)) - 1
    crc = ones
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (polynomial if crc & 1 else 0)
    return (crc ^ ones).to_bytes(size)


def combine(algorithm: str, left: bytes, right: bytes, right_bytes: int) -> bytes:
    """Return the CRC of two byte strings, one after the other, from the CRCs of both.

    Args:
        algorithm: a CRC.
        left: of the first, big-endian.
        right: of the second.
        right_bytes: length of the second.
    """
    size = SIZES[algorithm]
    polynomial = _POLYNOMIALS[algorithm]
    shifted = _times(int.from_bytes(left), _power(polynomial, size, right_bytes), polynomial, size)
    return (shifted ^ int.from_bytes(right)).to_bytes(size)


def _power(polynomial: int, size: int, count: int) -> int:
    """Return x^(8 * count) modulo the polynomial, reflected: the highest bit is x^0."""
    squares = _squares(polynomial, size)
    result = 1 << (8 * size - 1)
    at = 3  # x^8 is x^(2^3)
    while count:
        if count & 1:
            result = _times(result, squares[at], polynomial, size)
        count >>= 1
        at += 1
    return result


@functools.cache
def _squares(polynomial: int, size: int) -> list[int]:
    """Return x^(2^n) modulo the polynomial for each n."""
    found = [1 << (8 * size - 2)]  # x
    for _ in range(_LENGTH_BITS + 3):
        found.append(_times(found[-1], found[-1], polynomial, size))
    return found


def _times(one: int, other: int, polynomial: int, size: int) -> int:
    """Return the product of two polynomials modulo a third, all reflected."""
    product = 0
    bit = 1 << (8 * size - 1)
    while one:
        if one & bit:
            product ^= other
            one ^= bit
        bit >>= 1
        other = (other >> 1) ^ (polynomial if other & 1 else 0)
    return product


class Sums:
    """CRCs of ranges of one file, which come in any order.

    Args:
        algorithm: a CRC.
    """

    __slots__ = ("_algorithm", "_by_start", "_by_stop")

    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        self._by_start: dict[int, tuple[int, bytes]] = {}  # start → stop, value; none touch
        self._by_stop: dict[int, int] = {}

    def add(self, start: int, stop: int, value: bytes) -> None:
        """Take the CRC of a range that overlaps none before; neighbours become one."""
        before = self._by_stop.pop(start, None)
        if before is not None:
            _, left = self._by_start.pop(before)
            value = combine(self._algorithm, left, value, stop - start)
            start = before
        after = self._by_start.pop(stop, None)
        if after is not None:
            value = combine(self._algorithm, value, after[1], after[0] - stop)
            stop = after[0]
        self._by_start[start] = (stop, value)
        self._by_stop[stop] = start

    def whole(self, size_bytes: int) -> bytes | None:
        """Return the CRC of the file; ``None`` while a range of it is missing."""
        stop, value = self._by_start.get(0, (0, b""))
        return value if stop == size_bytes and value else None
