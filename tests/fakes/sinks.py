"""A sink in memory that keeps the promises of the port."""

from __future__ import annotations

import os


class MemorySink:
    """The bytes ``[start, stop)`` of one file."""

    checksum = None

    def __init__(self, start: int, stop: int, *, sees_bytes: bool = False) -> None:
        self.sees_bytes = sees_bytes
        self.data = bytearray()
        self.pieces = 0
        self._start = start
        self._stop = stop

    @property
    def watermark(self) -> int:
        return self._start + len(self.data)

    def accept(self, offset: int, view: memoryview) -> None:
        if not self._start <= offset <= self.watermark or offset + len(view) > self._stop:
            raise ValueError(f"{offset}, {len(view)} bytes: watermark {self.watermark}")
        self.pieces += 1
        self.data += view[self.watermark - offset :]

    def accept_from_pipe(self, pipe_fd: int, offset: int, size_bytes: int) -> None:
        assert not self.sees_bytes
        piece = b""
        while len(piece) < size_bytes:
            more = os.read(pipe_fd, size_bytes - len(piece))
            assert more
            piece += more
        self.accept(offset, memoryview(piece))
