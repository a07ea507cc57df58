"""The only way of bytes into a file: written once, from the front, by whoever comes first."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from cached.adapters.segments.root import gone, translated
from cached.core.errors import BadReply

if TYPE_CHECKING:
    from cached.core.errors import CachedError


class OpenFile:
    """One file of a version: its descriptor stays open until the version is free.

    Attributes:
        fd: read-write; -1 once closed.
        path: in the model's directory.
        size_bytes: its full length.
        lock: around every write. Writers of one tmpfs file wait for its inode's rwsem, and burn
            CPU while they do; here they sleep (docs/decisions/001).
    """

    __slots__ = ("fd", "lock", "path", "size_bytes")

    def __init__(self, fd: int, path: str, size_bytes: int) -> None:
        self.fd = fd
        self.path = path
        self.size_bytes = size_bytes
        self.lock = threading.Lock()

    def close(self) -> None:
        """Give the descriptor back, and with the last one the memory: 130 ms/GiB."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class PartSink:
    """Where the bytes of one part go; the ``Sink`` port. Any thread.

    All attempts share it: what is below the watermark is there and never written again, so a
    late loser of a hedge cannot change what somebody reads already.
    """

    __slots__ = ("_file", "_is_closed", "_start", "_stop", "_watermark")

    def __init__(self, file: OpenFile, start: int, stop: int) -> None:
        self._file = file
        self._start = start
        self._stop = stop
        self._watermark = start
        self._is_closed = False

    @property
    def watermark(self) -> int:
        """Return the offset in the file below which this part's bytes are there."""
        return self._watermark

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
                message = (
                    f"bytes {offset} to {stop} do not fit part {self._start} to {self._stop} "
                    f"with its watermark at {at}"
                )
                raise ValueError(message)
            self._check_open()
            try:
                while at < stop:
                    at += os.pwrite(self._file.fd, view[at - offset :], at)
            except OSError as error:
                raise self._translated(error) from error
            self._watermark = at

    def accept_from_pipe(self, pipe_fd: int, size_bytes: int) -> None:
        """Move exactly ``size_bytes`` from a pipe to the watermark, without a copy here.

        Raises:
            OutOfSpace: the file system is full. What was moved before counts.
            BadReply: the pipe ended early. What was moved before counts.
            LoadFailed: the version was freed.
            ValueError: more than is left of the part: a bug of the caller.
        """
        with self._file.lock:
            stop = self._watermark + size_bytes
            if stop > self._stop:
                message = f"{size_bytes} bytes at {self._watermark} do not fit up to {self._stop}"
                raise ValueError(message)
            self._check_open()
            while self._watermark < stop:
                left = stop - self._watermark
                try:
                    moved = os.splice(pipe_fd, self._file.fd, left, offset_dst=self._watermark)
                except OSError as error:
                    raise self._translated(error) from error
                if not moved:
                    message = f"the body ended {left} bytes early"
                    raise BadReply(message)
                self._watermark += moved

    def close(self) -> None:
        """Refuse whatever comes; waits for a write that is under way."""
        with self._file.lock:
            self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise gone(self._file.path)

    def _translated(self, error: OSError) -> CachedError:
        return translated(error, f"cannot write {self._file.path} at byte {self._watermark}")
