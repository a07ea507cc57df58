"""What shall be done: every output of the engine.

The runner carries each effect through one port; results come back as events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cached.core.objects import FileRef, Manifest, ModelRef, Part, PeerId, VersionRef


class Resolve(NamedTuple):
    """List the objects of a model → ``Resolved`` or ``ResolveFailed``.

    Attributes:
        listing: number of this one among those of the model; the answer repeats it.
    """

    ref: ModelRef
    listing: int = 0


class CreateSegments(NamedTuple):
    """Make every file of a version at full length → ``SegmentsReady`` or ``SegmentsFailed``."""

    of: VersionRef
    manifest: Manifest


class FetchPart(NamedTuple):
    """Send one ranged GET → ``PartFetched`` or ``PartFailed``."""

    part: Part


class CancelParts(NamedTuple):
    """Cut the GETs of a version that are in flight; each ends as ``PartFailed``."""

    of: VersionRef


class ReadHeader(NamedTuple):
    """Parse a safetensors header out of its segment.

    → ``HeaderRead``, ``HeaderRefused``, or ``HeaderSized`` when it is longer.

    Attributes:
        there_bytes: bytes ``[0, there_bytes)`` of the file are there.
    """

    file: FileRef
    there_bytes: int


class Publish(NamedTuple):
    """Make a filled version read-only and visible → ``Published`` or ``SegmentsFailed``."""

    of: VersionRef


class Free(NamedTuple):
    """Unlink a version and give its memory back → ``Freed``, ``StillMapped`` or ``FreeFailed``."""

    of: VersionRef


class Reply(NamedTuple):
    """Answer a request.

    Attributes:
        op: of the request; for observers.
        body: JSON members of the reply, without the id. An error is
            ``{"error": {"code", "message", "hint"}}``.
        files: descriptors to send along, in this order; each a new read-only one.
    """

    peer: PeerId
    request_id: int
    op: str
    body: dict[str, object]
    files: tuple[FileRef, ...] = ()


class WakeAt(NamedTuple):
    """Post ``Ticked`` at this time; replaces the time asked for before.

    Attributes:
        when_s: monotonic seconds.
    """

    when_s: float


class MarkReady(NamedTuple):
    """Every model that is prefetched at start has been complete once."""


class Refused(NamedTuple):
    """For observers: a load did not begin or did not end.

    Attributes:
        code: of the error.
        message: its text.
        hint: what to do next; may be empty.
    """

    name: str
    code: str
    message: str
    hint: str = ""


class Retried(NamedTuple):
    """For observers: a GET or a listing will be tried again.

    Attributes:
        code: why.
        delay_s: from now.
        error: why, as a text.
    """

    name: str
    code: str
    delay_s: float
    error: str = ""


class Evicted(NamedTuple):
    """For observers: a version was taken out of memory.

    Attributes:
        reason: ``budget``, ``asked``, ``failed`` or ``stale``.
    """

    of: VersionRef
    reason: str
    size_bytes: int


class DrainBegan(NamedTuple):
    """For observers: the daemon ends once these are answered.

    Attributes:
        requests_under_way: how many wait for something.
    """

    requests_under_way: int


class DrainCut(NamedTuple):
    """For observers: the daemon does not wait any longer.

    Attributes:
        requests_given_up: how many waited for something.
    """

    requests_given_up: int


class Drained(NamedTuple):
    """Nothing is left to wait for: the daemon may stop."""


Effect = (
    Resolve
    | CreateSegments
    | FetchPart
    | CancelParts
    | ReadHeader
    | Publish
    | Free
    | Reply
    | WakeAt
    | MarkReady
    | Refused
    | Retried
    | Evicted
    | DrainBegan
    | DrainCut
    | Drained
)
