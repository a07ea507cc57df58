"""What the runner needs of the outside, in our own words.

An adapter keeps one of these promises. Foreign errors never pass a port: they are
translated at once into cached.core.errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cached.core.effects import Effect, Reply
    from cached.core.events import Event
    from cached.core.header import Header
    from cached.core.objects import (
        FileRef,
        Left,
        Manifest,
        ModelRef,
        ObjectFacts,
        Part,
        Range,
        StoredObject,
        VersionRef,
    )

    Post = Callable[[Event], None]
    """Puts an event into the mailbox; any thread, never blocks."""


class Clock(Protocol):
    """Time."""

    def now_s(self) -> float:
        """Return monotonic seconds."""

    def wall_s(self) -> float:
        """Return seconds since 1970, UTC."""


class Sink(Protocol):
    """Where the bytes of one part go; the only way into a segment.

    Every attempt of a part writes through the same sink, from any thread. Bytes below
    the watermark are dropped, the rest is written and moves it.
    """

    @property
    def watermark(self) -> int:
        """Return the offset in the file below which this part's bytes are there."""

    @property
    def sees_bytes(self) -> bool:
        """Return whether bytes must pass through memory: all come by ``accept`` then."""

    @property
    def checksum(self) -> bytes | None:
        """Return the CRC of the bytes from the part's start to the watermark; None: not summed."""

    def accept(self, offset: int, view: memoryview) -> None:
        """Write ``view`` at ``offset`` of the file.

        ``offset`` is at most the watermark (no holes); ``offset + len(view)`` is at most
        the part's stop.

        Raises:
            OutOfSpace: the file system is full. Nothing of ``view`` counts.
            ValueError: outside the part, or leaves a hole: a bug of the caller.
        """

    def accept_from_pipe(self, pipe_fd: int, offset: int, size_bytes: int) -> None:
        """Take exactly ``size_bytes`` out of a pipe, which belong at ``offset`` of the file.

        What lies above the watermark is moved without a copy in user space. ``offset`` and its end
        are bound as for ``accept``.

        Raises:
            OutOfSpace: the file system is full. Bytes may be left in the pipe.
            ValueError: outside the part, or leaves a hole: a bug of the caller.
        """


class Cancellation(Protocol):
    """Whether one call is still wanted: see cancellation.py. Any thread."""

    @property
    def is_cancelled(self) -> bool:
        """Return whether nobody wants the call's result any more."""

    def attach(self, cut: Callable[[], None]) -> None:
        """Have ``cut`` called once when it is cancelled, at once if it already was.

        From any thread. One at a time; it must not block, or call this object.
        """

    def detach(self) -> None:
        """Forget ``cut``: when this returns, it neither runs nor will."""


class ObjectStore(Protocol):
    """A place that holds objects: one implementation per URI scheme.

    All methods are called from fetch threads, several at a time. Once its ``cancellation`` is
    cancelled, a call ends soon with a StoreError; one without it is not cancelled.
    """

    def resolve(self, ref: ModelRef, cancellation: Cancellation = ...) -> Manifest:
        """Return the objects below ``ref.uri`` as they are now.

        Raises:
            StoreError: what the store did; ``transient`` says whether a retry can help.
        """

    def describe(
        self, uri: str, stored: StoredObject, cancellation: Cancellation = ...
    ) -> ObjectFacts:
        """Return what the store tells of one object beside the listing; pinned to its ETag.

        Args:
            uri: of the model (``Manifest.uri``).
            stored: the object, as it was listed.
            cancellation: of this call.

        Raises:
            ObjectChanged: the object is not the one of the manifest any more.
            StoreError: anything else.
        """

    def read(
        self, uri: str, stored: StoredObject, cancellation: Cancellation, most_bytes: int
    ) -> bytes:
        """Return a small object whole; pinned to its ETag.

        Args:
            uri: of the model.
            stored: the object, as it was listed.
            cancellation: of this call.
            most_bytes: the longest that is accepted.

        Raises:
            ObjectRefused: it is longer.
            ObjectChanged: the object is not the one of the manifest any more.
            StoreError: anything else.
        """

    def fetch(self, part: Part, sink: Sink, cancellation: Cancellation = ...) -> float | None:
        """Fetch ``[sink.watermark, part.stop)`` of ``part.stored`` into the sink.

        The request is pinned to the object's ETag. After an error the sink keeps what it
        accepted; another call goes on from there. Several calls may run for one part, with
        one sink: what one of them brings, the others need not.

        Returns:
            Seconds from the request to the head of its reply; ``None`` if there is no such thing.

        Raises:
            ObjectChanged: the object is not the one of the manifest any more.
            StoreUnavailable: also when another call had brought all while this one waited.
            StoreError: anything else.
        """

    def close(self) -> None:
        """Make whatever runs end soon with a StoreError, begin nothing more, keep nothing open.

        From any thread, also more than once.
        """


class Lane(Protocol):
    """A place in the mailbox for events of one origin; lanes take turns."""

    @property
    def count(self) -> int:
        """How many events wait there; any thread."""

    def post(self, event: Event) -> None:
        """Put an event behind the others; never blocks. Any thread."""


class SegmentStore(Protocol):
    """Shared memory for files.

    ``create``, ``publish``, ``switch`` and ``free`` run in the segment thread.
    """

    def found(self) -> list[Left]:
        """Return what an earlier daemon left here, as it was at the start.

        ``create`` of its ``of`` and ``manifest`` adopts it, ``free`` of its ``of`` removes it.
        Until then it stays as it is, and its path is valid.
        """

    def create(
        self, of: VersionRef, manifest: Manifest, shared: Mapping[int, FileRef] = ...
    ) -> list[tuple[int, Range]]:
        """Make all files of a version at full length: they can be mapped and filled from now on.

        Args:
            of: the version; of ``found``, to adopt what is there.
            manifest: its objects.
            shared: files, by index, that are the very file of another version of this store: the
                same memory. That version must not have been freed. Not looked at for what
                is adopted.

        Returns:
            What is there already, by index of the file: of shared and of adopted files.

        Raises:
            OutOfSpace: the file system is full. What was made stays until ``free``.
            LoadFailed: the system refuses, a shared file is not here any more, or what is to be
                adopted is not what it was. What was made stays until ``free``.
        """

    def sink(self, part: Part, summing: Summing | None = ...) -> Sink:
        """Return the sink of a part; the same one for every attempt of equal ``part_id``.

        Any thread.

        Args:
            part: that part.
            summing: of a new sink: told all bytes, in order, as they are written.
        """

    def release_sink(self, part: Part) -> None:
        """Forget a part's sink, and remember what it has taken: no attempt of it will come."""

    def read_header(self, file: FileRef, there_bytes: int) -> Header | int:
        """Parse the safetensors header of a file of which ``[0, there_bytes)`` is there.

        Returns:
            The header; or, when it does not lie wholly below ``there_bytes``, how many
            bytes it has (8 + its length).

        Raises:
            HeaderError: it breaks a rule of the format, or the file is shorter than 8 bytes.
        """

    def publish(self, of: VersionRef, checked_by: Sequence[str] = ...) -> str:
        """Make a complete version read-only and visible by path; return the directory.

        Of one that is published already: its directory.

        Args:
            of: the version.
            checked_by: by what each file was checked, for the next daemon; empty: it was told.

        Raises:
            OutOfSpace: the file system is full.
            LoadFailed: a file has not its length, somebody could still change it, or the system
                refuses.
        """

    def switch(self, of: VersionRef, passed_over: Sequence[str] = ...) -> None:
        """Make a published version the one that ``current`` points to.

        Args:
            of: the version.
            passed_over: the versions that the operator went back from, to this one: the next
                daemon is told (``Left.passed_over``).

        Raises:
            OutOfSpace: the file system is full.
            LoadFailed: it is not published, or the system refuses.
        """

    def free(self, of: VersionRef, *, if_unused: bool = False) -> bool:
        """Unlink a version; return whether nobody maps or holds any of it any more.

        May be called again until it returns True, which frees the memory. True for an
        unknown version. What it shares with another version stays, and does not count.

        Args:
            of: the version.
            if_unused: if anybody has it open or mapped, change nothing and return False.

        Raises:
            LoadFailed: the system refuses to unlink; may be called again.
        """

    def reader(self, file: FileRef) -> int:
        """Return a new read-only descriptor of a file; the caller closes it.

        Under a millisecond; called in the mailbox thread.
        """


class Summing(Protocol):
    """A sum of bytes that pass. One thread at a time."""

    def update(self, view: memoryview) -> None:
        """Take the bytes that come next."""

    def digest(self) -> bytes:
        """Return the sum of what came, big-endian."""


class Checksums(Protocol):
    """Sums of bytes. Called from fetch and check threads, several at a time."""

    def summing(self, algorithm: str) -> Summing:
        """Return a CRC of no bytes, to be told what passes.

        Raises:
            LoadFailed: it cannot be computed here.
        """

    def of_range(self, algorithm: str, fd: int, start: int, stop: int) -> bytes:
        """Return the checksum of bytes ``[start, stop)`` of a file, big-endian.

        Raises:
            LoadFailed: the file ends before.
        """

    def extend(self, file: FileRef, algorithm: str, fd: int, start: int, stop: int) -> bytes:
        """Return the SHA of all bytes below ``stop``, going on from where the last call ended.

        One call at a time for each file; a ``start`` of 0 begins anew.

        Raises:
            LoadFailed: the file ends before.
        """

    def forget(self, of: VersionRef) -> None:
        """Drop what ``extend`` keeps of a version's files."""


class MemoryProbe(Protocol):
    """How much memory there is."""

    def available_bytes(self) -> int:
        """Return what new segments may take right now, before headroom.

        The least of the cgroup's limit minus its usage, the segment file system's free
        bytes and the kernel's MemAvailable.
        """

    def private_bytes(self) -> int:
        """Return the private memory of this process (smaps_rollup)."""


class Replies(Protocol):
    """The way back to workers."""

    def send(self, reply: Reply, descriptors: tuple[int, ...]) -> None:
        """Send without blocking; the descriptors are closed before it returns.

        A peer that is gone or does not read loses its connection, nothing else happens.
        """


class Observer(Protocol):
    """Somebody who only looks: logs, metrics. In the mailbox thread; must be quick."""

    def happened(self, event: Event, now_s: float) -> None:
        """Take note of an event before it is handled."""

    def decided(self, effect: Effect, now_s: float) -> None:
        """Take note of an effect before it is carried out."""
