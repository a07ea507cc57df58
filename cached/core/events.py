"""What can happen: every input of the engine.

Each event is posted to the mailbox by one adapter or by the runner and handled in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cached.core.errors import CachedError
    from cached.core.header import Header
    from cached.core.objects import FileRef, Manifest, Part, PeerId, VersionRef


class Connected(NamedTuple):
    """A worker's connection was accepted.

    Attributes:
        uid: of the peer process, from ``SO_PEERCRED``.
        pid: the same; for the log only.
    """

    peer: PeerId
    uid: int
    pid: int


class Disconnected(NamedTuple):
    """The connection is gone, and with it its lease and its requests."""

    peer: PeerId


class Requested(NamedTuple):
    """A worker asks for something.

    Attributes:
        request_id: the peer's own; the reply repeats it.
        op: ``hello``, ``open``, … (core/wire.py).
        fields: the other members of the request, as JSON gave them; untrusted.
    """

    peer: PeerId
    request_id: int
    op: str
    fields: dict[str, object]


class Resolved(NamedTuple):
    """The store listed a model's objects.

    Attributes:
        available_bytes: what the machine could still give, at this moment.
        listing: of the ``Resolve`` that this answers.
    """

    name: str
    manifest: Manifest
    available_bytes: int
    listing: int = 0


class ResolveFailed(NamedTuple):
    """The store did not.

    Attributes:
        jitter_ratio: a random number in [0, 1) that the engine may spend on a back-off.
        listing: of the ``Resolve`` that this answers.
    """

    name: str
    error: CachedError
    jitter_ratio: float = 0.5
    listing: int = 0


class SegmentsReady(NamedTuple):
    """All files of a version exist at full length: they can be mapped and filled."""

    of: VersionRef


class SegmentsFailed(NamedTuple):
    """They could not be created or published; what was made is still there."""

    of: VersionRef
    error: CachedError


class HeaderRead(NamedTuple):
    """A safetensors file's header was parsed and is valid."""

    file: FileRef
    header: Header


class HeaderSized(NamedTuple):
    """A header is longer than what is there yet.

    Attributes:
        header_bytes: 8 + its length.
    """

    file: FileRef
    header_bytes: int


class HeaderRefused(NamedTuple):
    """A header breaks a rule of the format."""

    file: FileRef
    error: CachedError


class PartFetched(NamedTuple):
    """All bytes of a part are in its segment.

    Attributes:
        seconds: from the sending of the request to the last byte.
    """

    part: Part
    seconds: float


class PartFailed(NamedTuple):
    """An attempt ended early.

    Attributes:
        watermark: bytes ``[part.start, watermark)`` are in the segment.
        jitter_ratio: a random number in [0, 1) that the engine may spend on a back-off.
    """

    part: Part
    watermark: int
    error: CachedError
    jitter_ratio: float = 0.5


class Published(NamedTuple):
    """A version is complete, read-only and visible by path.

    Attributes:
        path: the directory.
    """

    of: VersionRef
    path: str


class Freed(NamedTuple):
    """The kernel has the memory back."""

    of: VersionRef


class StillMapped(NamedTuple):
    """Its files are unlinked, but somebody still maps or holds one."""

    of: VersionRef


class FreeFailed(NamedTuple):
    """It could not be unlinked; what of it is there counts on."""

    of: VersionRef
    error: CachedError


class Ticked(NamedTuple):
    """A time that the engine had asked for has come."""


class DrainRequested(NamedTuple):
    """A signal: take no new work, answer what can be answered, stop; a second: stop at once."""


Event = (
    Connected
    | Disconnected
    | Requested
    | Resolved
    | ResolveFailed
    | SegmentsReady
    | SegmentsFailed
    | HeaderRead
    | HeaderSized
    | HeaderRefused
    | PartFetched
    | PartFailed
    | Published
    | Freed
    | StillMapped
    | FreeFailed
    | Ticked
    | DrainRequested
)
