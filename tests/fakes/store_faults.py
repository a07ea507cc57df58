"""What can go wrong with the k-th request to a ``StoreServer`` (store_server.py): plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class ShortBody(NamedTuple):
    """Close after so many bytes of the body."""

    body_bytes: int


class Stall(NamedTuple):
    """Send nothing for a while (``inf``: as long as the server lives), then go on."""

    seconds: float
    body_bytes: int = 0
    """How much of the body comes first; -1: not even the head."""


class Reset(NamedTuple):
    """RST after so many bytes of the body; -1: before the head."""

    body_bytes: int = -1


class Status(NamedTuple):
    """Another reply."""

    status: int
    headers: Mapping[str, str] = {}
    code: str = ""
    message: str = ""
    members: str = ""


class WrongRange(NamedTuple):
    """Other bytes than those that were asked for, and say so."""

    shift_bytes: int = 1


class WrongTotal(NamedTuple):
    """Tell in Content-Range that the object is so much longer than it is."""

    more_bytes: int = 1


class WrongLength(NamedTuple):
    """Send so many bytes more than were asked for, and say so in Content-Length only."""

    more_bytes: int = 1


class Duplicate(NamedTuple):
    """Send the body twice."""


class Corrupted(NamedTuple):
    """Flip the lowest bit of one byte of the body."""

    at: int = 0
    """Which byte, modulo the body's length."""


class Changed(NamedTuple):
    """From now on the object is another one: as long, every byte and the ETag another."""


class NoEtag(NamedTuple):
    """Leave the ETag out."""


class OtherEtag(NamedTuple):
    """Ignore If-Match, and tell another ETag."""

    etag: str = '"another"'


class IgnoredRange(NamedTuple):
    """200 and the whole object."""


class ClosedIdle(NamedTuple):
    """Answer, then close the connection without having said so."""


class Raw(NamedTuple):
    """Send these bytes instead of a reply, and close."""

    data: bytes


class Mute(NamedTuple):
    """Close without a reply."""


Fault = (
    ShortBody
    | Stall
    | Reset
    | Status
    | WrongRange
    | WrongTotal
    | WrongLength
    | Duplicate
    | Corrupted
    | Changed
    | NoEtag
    | OtherEtag
    | IgnoredRange
    | ClosedIdle
    | Raw
    | Mute
)
