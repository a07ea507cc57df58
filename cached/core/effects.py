"""What shall be done: every output of the engine.

The runner carries each effect through one port; results come back as events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cached.core.objects import (
        FileRef,
        Manifest,
        ModelRef,
        ObjectFacts,
        Part,
        PeerId,
        StoredObject,
        VersionRef,
    )

NOTHING_SHARED: Mapping[int, FileRef] = {}


class Resolve(NamedTuple):
    """List the objects of a model → ``Resolved`` or ``ResolveFailed``.

    Attributes:
        listing: number of this one among those of the model; the answer repeats it.
    """

    ref: ModelRef
    listing: int = 0


class CreateSegments(NamedTuple):
    """Make every file of a version at full length → ``SegmentsReady`` or ``SegmentsFailed``.

    Attributes:
        shared: files that are those of another version, which has them whole: by index.
    """

    of: VersionRef
    manifest: Manifest
    shared: Mapping[int, FileRef] = NOTHING_SHARED


class FetchPart(NamedTuple):
    """Send one ranged GET → ``PartFetched`` or ``PartFailed``; ``PartStalled`` meanwhile."""

    part: Part


class CancelParts(NamedTuple):
    """Cut the GETs of a version that are in flight; each ends as ``PartFailed``.

    Attributes:
        part_id: those of one part only.
    """

    of: VersionRef
    part_id: int | None = None


class Describe(NamedTuple):
    """Ask the store what it knows of one object → ``Described`` or ``DescribeFailed``."""

    file: FileRef
    uri: str
    stored: StoredObject


class ReadDigests(NamedTuple):
    """Parse the list of digests that came with a model → ``DigestsRead`` or ``DigestsRefused``."""

    file: FileRef


class Check(NamedTuple):
    """Read bytes of a file back and sum them → ``Checked`` or ``CheckFailed``.

    Attributes:
        is_running: of all bytes below ``stop``, going on from ``start``, where the check before
            ended; else of ``[start, stop)`` alone.
    """

    file: FileRef
    algorithm: str
    start: int
    stop: int
    is_running: bool = False


class ReadHeader(NamedTuple):
    """Parse a safetensors header out of its segment.

    → ``HeaderRead``, ``HeaderRefused``, or ``HeaderSized`` when it is longer.

    Attributes:
        there_bytes: bytes ``[0, there_bytes)`` of the file are there.
    """

    file: FileRef
    there_bytes: int


class Publish(NamedTuple):
    """Make a filled version read-only, visible and current → ``Published`` or ``SegmentsFailed``.

    One that is published already becomes current again.

    Attributes:
        is_current: False: it does not become current.
        passed_over: versions that the operator went back from; told to the next daemon.
        checked_by: by what each file was checked (``checksums.WAYS``), for the next daemon; empty:
            it was told before.
    """

    of: VersionRef
    is_current: bool = True
    passed_over: tuple[str, ...] = ()
    checked_by: tuple[str, ...] = ()


class Free(NamedTuple):
    """Unlink a version and give its memory back → ``Freed``, ``StillMapped`` or ``FreeFailed``.

    Attributes:
        if_unused: only if nobody has it open or mapped, also by path; else nothing changes.
    """

    of: VersionRef
    if_unused: bool = False


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
        reason: ``budget``, ``asked``, ``failed``, ``stale``, ``superseded`` or ``left`` (by an
            earlier daemon, of no use to this one).
    """

    of: VersionRef
    reason: str
    size_bytes: int


class Adopted(NamedTuple):
    """For observers: a version that an earlier daemon left goes on.

    Attributes:
        there_bytes: of it, which need not be fetched.
    """

    of: VersionRef
    there_bytes: int


class Switched(NamedTuple):
    """For observers: a model's current version is another one now.

    Attributes:
        before: the one that was current; empty if none was.
    """

    of: VersionRef
    before: str


class Looked(NamedTuple):
    """For observers: how an object of a load is encrypted, and by what it can be checked.

    Attributes:
        algorithm: empty: by nothing that this host can compute.
    """

    file: FileRef
    path: str
    facts: ObjectFacts
    algorithm: str


class Mismatched(NamedTuple):
    """For observers: bytes are not what the store, or the list of digests, says that they are.

    Attributes:
        is_final: the load fails; else they are fetched once more.
    """

    file: FileRef
    path: str
    algorithm: str
    start: int
    stop: int
    is_final: bool


class Hedged(NamedTuple):
    """For observers: a part that brings nothing is asked for a second time.

    Attributes:
        idle_s: how long nothing came.
    """

    part: Part
    idle_s: float


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
    | Describe
    | ReadDigests
    | Check
    | ReadHeader
    | Publish
    | Free
    | Reply
    | WakeAt
    | MarkReady
    | Refused
    | Retried
    | Evicted
    | Adopted
    | Switched
    | Looked
    | Mismatched
    | Hedged
    | DrainBegan
    | DrainCut
    | Drained
)
