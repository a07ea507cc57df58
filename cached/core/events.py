"""What can happen: every input of the engine.

Each event is posted to the mailbox by one adapter or by the runner and handled in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cached.core.digests import Digests
    from cached.core.errors import CachedError
    from cached.core.header import Header
    from cached.core.objects import (
        FileRef,
        Manifest,
        ObjectFacts,
        Part,
        PeerId,
        Range,
        VersionRef,
    )


class Connected(NamedTuple):
    """A worker's connection was accepted.

    Attributes:
        uid: of the peer process, from ``SO_PEERCRED``.
        pid: the same; 0 of one that is not seen from here.
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
    """All files of a version exist at full length: they can be mapped and filled.

    Attributes:
        there: bytes that are there already, by index of the file: an earlier daemon left them, or
            another version has the same file.
    """

    of: VersionRef
    there: tuple[tuple[int, Range], ...] = ()


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


class Described(NamedTuple):
    """The store told what it knows of one object."""

    file: FileRef
    facts: ObjectFacts


class DescribeFailed(NamedTuple):
    """The store did not tell.

    Attributes:
        jitter_ratio: a random number in [0, 1) that the engine may spend on a back-off.
    """

    file: FileRef
    error: CachedError
    jitter_ratio: float = 0.5


class DigestsRead(NamedTuple):
    """The list of digests that came with the model was parsed and is valid."""

    file: FileRef
    digests: Digests


class DigestsRefused(NamedTuple):
    """The list of digests breaks a rule of the format."""

    file: FileRef
    error: CachedError


class Checked(NamedTuple):
    """Bytes were read back and summed.

    Attributes:
        value: big-endian; with ``is_running`` of all bytes below ``stop``.
    """

    file: FileRef
    algorithm: str
    start: int
    stop: int
    value: bytes


class CheckFailed(NamedTuple):
    """They could not be read."""

    file: FileRef
    error: CachedError


class PartStalled(NamedTuple):
    """A GET that is under way brings nothing; told again and again while it lasts.

    Attributes:
        watermark: bytes ``[part.start, watermark)`` are in the segment.
        idle_s: since the last byte, or since the request was sent.
    """

    part: Part
    watermark: int
    idle_s: float


class PartFetched(NamedTuple):
    """All bytes of a part are in its segment.

    Attributes:
        seconds: from the sending of the request to the last byte.
        first_byte_s: from the sending of the request to the head of the reply; ``None`` if the
            store does not tell.
        checksum: of its bytes by ``part.algorithm``, big-endian; ``None`` if there is none.
    """

    part: Part
    seconds: float
    first_byte_s: float | None = None
    checksum: bytes | None = None


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
    """Somebody maps or holds a file of it; unlinked all the same, unless ``if_unused`` was said."""

    of: VersionRef


class FreeFailed(NamedTuple):
    """It could not be unlinked; what of it is there counts on."""

    of: VersionRef
    error: CachedError


class Ticked(NamedTuple):
    """A time that the engine had asked for has come."""


class DrainRequested(NamedTuple):
    """A signal: take no new work, answer what can be answered, stop; a second: stop at once."""


OutsideEvent = Connected | Disconnected | Requested | Ticked | DrainRequested
"""What comes from workers, time and the operator."""

CheckEvent = Described | DescribeFailed | DigestsRead | DigestsRefused | Checked | CheckFailed
"""What tells whether the bytes are right."""

LoadEvent = (
    Resolved
    | ResolveFailed
    | SegmentsReady
    | SegmentsFailed
    | HeaderRead
    | HeaderSized
    | HeaderRefused
    | PartStalled
    | PartFetched
    | PartFailed
    | Published
    | Freed
    | StillMapped
    | FreeFailed
)
"""What ends, or tells of, a job."""

Event = OutsideEvent | CheckEvent | LoadEvent
