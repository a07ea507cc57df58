"""What the runner needs of the outside, in our own words.

An adapter keeps one of these promises. Foreign errors never pass a port: they are
translated at once into cached.core.errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.core.effects import Effect, Reply
    from cached.core.events import Event
    from cached.core.header import Header
    from cached.core.objects import FileRef, Manifest, ModelRef, Part, VersionRef

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

    def accept(self, offset: int, view: memoryview) -> None:
        """Write ``view`` at ``offset`` of the file.

        ``offset`` is at most the watermark (no holes); ``offset + len(view)`` is at most
        the part's stop.

        Raises:
            OutOfSpace: the file system is full. Nothing of ``view`` counts.
            ValueError: outside the part, or leaves a hole: a bug of the caller.
        """

    def accept_from_pipe(self, pipe_fd: int, size_bytes: int) -> None:
        """Move exactly ``size_bytes`` from a pipe to the watermark, without a copy in user space.

        Only for a part with a single attempt under way (there is nothing to drop).

        Raises:
            OutOfSpace: the file system is full.
        """


class ObjectStore(Protocol):
    """A place that holds objects: one implementation per URI scheme.

    All methods are called from fetch threads, several at a time.
    """

    def resolve(self, ref: ModelRef, is_cancelled: Callable[[], bool] = ...) -> Manifest:
        """Return the objects below ``ref.uri`` as they are now.

        Args:
            ref: the model.
            is_cancelled: asked again and again; once it is true, the call ends soon with a
                StoreError. One that takes no time need not ask. Default: it is not.

        Raises:
            StoreError: what the store did; ``transient`` says whether a retry can help.
        """

    def fetch(self, part: Part, sink: Sink, is_cancelled: Callable[[], bool] = ...) -> None:
        """Fetch ``[sink.watermark, part.stop)`` of ``part.stored`` into the sink.

        The request is pinned to the object's ETag. After an error the sink keeps what it
        accepted; another call goes on from there.

        Args:
            part: what to fetch.
            sink: takes its bytes.
            is_cancelled: asked once ``cancel`` can reach this call, so that none that came
                before is lost; default: it was not.

        Raises:
            ObjectChanged: the object is not the one of the manifest any more.
            StoreError: anything else; also what ``cancel`` makes of a running call.
        """

    def cancel(self, part: Part) -> None:
        """Make a running ``fetch`` of this part end soon with a StoreError; else do nothing.

        From any thread.
        """

    def close(self) -> None:
        """Make whatever runs end soon with a StoreError, begin nothing more, keep nothing open.

        From any thread, also more than once.
        """


class SegmentStore(Protocol):
    """Shared memory for files. ``create``, ``publish`` and ``free`` run in the segment thread."""

    def create(self, of: VersionRef, manifest: Manifest) -> None:
        """Make all files of a version at full length: they can be mapped and filled from now on.

        Raises:
            OutOfSpace: the file system is full. What was made stays until ``free``.
        """

    def sink(self, part: Part) -> Sink:
        """Return the sink of a part; the same one for every attempt of equal ``part_id``.

        Any thread.
        """

    def release_sink(self, part: Part) -> None:
        """Forget a part's sink: no attempt of it will come."""

    def read_header(self, file: FileRef, there_bytes: int) -> Header | int:
        """Parse the safetensors header of a file of which ``[0, there_bytes)`` is there.

        Returns:
            The header; or, when it does not lie wholly below ``there_bytes``, how many
            bytes it has (8 + its length).

        Raises:
            HeaderError: it breaks a rule of the format, or the file is shorter than 8 bytes.
        """

    def publish(self, of: VersionRef) -> str:
        """Make a complete version read-only, visible by path, and current; return the directory.

        Raises:
            OutOfSpace: the file system is full.
        """

    def free(self, of: VersionRef) -> bool:
        """Unlink a version; return whether nobody maps or holds any of it any more.

        May be called again until it returns True, which frees the memory. True for an
        unknown version.
        """

    def reader(self, file: FileRef) -> int:
        """Return a new read-only descriptor of a file; the caller closes it.

        Under a millisecond; called in the mailbox thread.
        """


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
