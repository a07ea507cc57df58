"""The only way of bytes into a file: written once, from the front, by whoever comes first."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from cached.adapters.segments.root import gone, translated
from cached.core.errors import BadReply
from cached.core.objects import Range
from cached.core.ranges import RangeSet

if TYPE_CHECKING:
    from cached.core.errors import CachedError
    from cached.ports import Summing

_DROP_BYTES: Final = 1 << 16


class OpenFile:
    """One file of a version, or of several that share it: open until the last of them is free.

    Attributes:
        fd: read-write; read-only if it was complete when it was adopted, until bytes of it are
            found wrong; -1 once closed.
        path: in the model's directory.
        size_bytes: its full length.
        lock: around every write. Writers of one tmpfs file wait for its inode's rwsem, and burn
            CPU while they do; here they sleep (docs/decisions/001). It also guards ``there``.
        there: bytes of parts that have ended, but for what is being fetched anew.
        users: versions that have it.
        is_suspect: somebody could write to it when it was to become read-only.
    """

    __slots__ = ("fd", "is_suspect", "lock", "path", "size_bytes", "there", "users")

    def __init__(self, fd: int, path: str, size_bytes: int) -> None:
        self.fd = fd
        self.path = path
        self.size_bytes = size_bytes
        self.lock = threading.Lock()
        self.there = RangeSet()
        self.users = 1
        self.is_suspect = False

    def complete(self) -> None:
        """Take note that all of it is there."""
        with self.lock:
            self.there.add(0, self.size_bytes)

    def close(self) -> None:
        """Give the descriptor back, and with the last one the memory: 130 ms/GiB."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class PartSink:
    """Where the bytes of one part go; the ``Sink`` port. Any thread.

    All attempts share it: what is below the watermark is there and never written again, so a
    late loser of a hedge cannot change what somebody reads already.

    Args:
        file: that they belong to.
        start: first byte of the part.
        stop: one past the last.
        summing: told every byte once, in order, when it is written.
    """

    __slots__ = ("_file", "_is_closed", "_start", "_stop", "_summing", "_watermark")

    def __init__(
        self, file: OpenFile, start: int, stop: int, summing: Summing | None = None
    ) -> None:
        self._file = file
        self._summing = summing
        self._start = start
        self._stop = stop
        self._watermark = start
        self._is_closed = False

    @property
    def watermark(self) -> int:
        """Return the offset in the file below which this part's bytes are there."""
        return self._watermark

    @property
    def sees_bytes(self) -> bool:
        """Return whether all bytes must come by ``accept``."""
        return self._summing is not None

    @property
    def checksum(self) -> bytes | None:
        """Return the sum of what lies below the watermark, once no more comes."""
        return self._summing.digest() if self._summing is not None else None

    def accept(self, offset: int, view: memoryview) -> None:
        """Write what of ``view`` lies above the watermark, and move it.

        Raises:
            OutOfSpace: the file system is full. Nothing of ``view`` counts.
            LoadFailed: the version was freed.
            ValueError: outside the part, or leaves a hole: a bug of the caller.
        """
        with self._file.lock:
            at = self._watermark
            stop = offset + len(view)
            if not (self._start <= offset <= at and stop <= self._stop):
                raise self._misfit(offset, stop)
            self._begin()
            fresh = view[at - offset :]
            try:
                while at < stop:
                    at += os.pwrite(self._file.fd, view[at - offset :], at)
            except OSError as error:
                raise self._translated(error) from error
            if self._summing is not None:
                self._summing.update(fresh)  # they are in the cache still
            self._watermark = at

    def accept_from_pipe(self, pipe_fd: int, offset: int, size_bytes: int) -> None:
        """Take exactly ``size_bytes`` out of a pipe, which belong at ``offset`` of the file.

        What lies above the watermark is moved without a copy here, the rest is dropped.

        Raises:
            OutOfSpace: the file system is full. What was moved before counts.
            BadReply: the pipe ended early. What was moved before counts.
            LoadFailed: the version was freed.
            ValueError: outside the part, or leaves a hole, or they should have been seen: a bug of
                the caller.
        """
        with self._file.lock:
            stop = offset + size_bytes
            if self._summing is not None or not (
                self._start <= offset <= self._watermark and stop <= self._stop
            ):
                raise self._misfit(offset, stop)
            self._begin()
            if offset < self._watermark:  # another attempt was faster
                _drop(pipe_fd, min(self._watermark, stop) - offset)
            while self._watermark < stop:
                left = stop - self._watermark
                try:
                    moved = os.splice(pipe_fd, self._file.fd, left, offset_dst=self._watermark)
                except OSError as error:
                    raise self._translated(error) from error
                if not moved:
                    raise _ended_early(left)
                self._watermark += moved

    def noted(self, grain_bytes: int) -> Range | None:
        """Take note in the file of what this part has; return what is there around it, if any.

        Args:
            grain_bytes: of what other parts have next to it, so much counts at each end.
        """
        with self._file.lock:
            start, stop = self._start, self._watermark
            self._file.there.add(start, stop)
            found = self._file.there.first(start, stop)
        if found is None:
            return None
        start -= start % grain_bytes
        stop += -stop % grain_bytes
        return Range(max(start, found.start), min(stop, found.stop))

    def close(self) -> None:
        """Refuse whatever comes; waits for a write that is under way."""
        with self._file.lock:
            self._is_closed = True

    def _misfit(self, offset: int, stop: int) -> ValueError:
        return ValueError(
            f"bytes {offset} to {stop} do not fit part {self._start} to {self._stop} "
            f"with its watermark at {self._watermark}"
        )

    def _begin(self) -> None:
        """See that bytes may be written; what was there of the part before goes now."""
        if self._is_closed:
            raise gone(self._file.path)
        if self._watermark == self._start:
            self._file.there.remove(self._start, self._stop)

    def _translated(self, error: OSError) -> CachedError:
        return translated(error, f"cannot write {self._file.path} at byte {self._watermark}")


def _drop(pipe_fd: int, left_bytes: int) -> None:
    while left_bytes:
        got_bytes = len(os.read(pipe_fd, min(left_bytes, _DROP_BYTES)))
        if not got_bytes:
            raise _ended_early(left_bytes)
        left_bytes -= got_bytes


def _ended_early(left_bytes: int) -> BadReply:
    return BadReply(f"the body ended {left_bytes} bytes early")
