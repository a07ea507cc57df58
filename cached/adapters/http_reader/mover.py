"""Bodies of plain connections, moved into their sinks by one thread for all of them.

Into a sink that must see the bytes they are received through a buffer, else they are spliced.

Threads that splice into one file wait for each other at every megabyte, and for the
interpreter's lock twice. One thread that goes from socket to socket never waits while any of
them has bytes: 10 % more speed for 10 % less CPU (docs/decisions/005-one-thread-splices.md).
"""

from __future__ import annotations

import mmap
import os
import select
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.ports import Sink

REST_S: Final = 0.1  # the thread ends after so long without a body under way
# What a socket has at most is taken at once: each step wakes the sender, and takes two locks.
BUFFER_BYTES: Final = 1 << 20
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_MORE


class Transfer:
    """A body on its way from a socket into a sink.

    The mover's thread calls ``step``; the one that ordered it looks at the rest.

    Args:
        source_fd: a connected, non-blocking socket.
        pipe: its ends to read and to write; empty. None: the sink must see the bytes.
        start: where the first byte belongs.
        stop: one past the last byte.
        sink: takes them.
        progressed: told how many bytes are still to come, after each step.

    Attributes:
        at: bytes below it were given to the sink.
        error: why it ended early: an OSError of the socket, or what the sink raised.
        is_over: no byte will move any more: all came, the connection ended, or an error.
        over: held until then.
        lock: held during a step.
    """

    __slots__ = (
        "_pipe",
        "_progressed",
        "_sink",
        "_stop",
        "at",
        "error",
        "is_over",
        "lock",
        "over",
        "source_fd",
    )

    def __init__(
        self,
        source_fd: int,
        pipe: tuple[int, int] | None,
        start: int,
        stop: int,
        sink: Sink,
        progressed: Callable[[int], None],
    ) -> None:
        self.source_fd = source_fd
        self.at = start
        self.error: BaseException | None = None
        self.is_over = False
        self.lock = threading.Lock()
        self.over = threading.Lock()
        self.over.acquire()
        self._pipe = pipe
        self._stop = stop
        self._sink = sink
        self._progressed = progressed

    def step(self, buffer: memoryview) -> None:
        """Move what is there, one pipe or buffer full at most.

        Args:
            buffer: to be used by a transfer without a pipe.
        """
        with self.lock:
            if self.is_over:
                return
            try:
                goes_on = self._move(buffer)
            except BlockingIOError:
                return
            except BaseException as error:  # noqa: BLE001 - it belongs to the thread that waits
                self.error = error
                goes_on = False
            if not goes_on:
                self._end()

    def _move(self, buffer: memoryview) -> bool:
        left_bytes = self._stop - self.at
        if self._pipe is None:
            moved_bytes = os.readv(self.source_fd, [buffer[:left_bytes]])
            if moved_bytes:
                self._sink.accept(self.at, buffer[:moved_bytes])
        else:
            read_fd, write_fd = self._pipe
            moved_bytes = os.splice(self.source_fd, write_fd, left_bytes, flags=_FLAGS)
            if moved_bytes:
                self._sink.accept_from_pipe(read_fd, self.at, moved_bytes)
        if moved_bytes:
            self.at += moved_bytes
            self._progressed(self._stop - self.at)
        return moved_bytes > 0 and self.at < self._stop

    def end(self) -> None:
        """Have it over: no byte moves from here on. Any thread, and again."""
        with self.lock:
            if not self.is_over:
                self._end()

    def _end(self) -> None:
        self.is_over = True
        self.over.release()


class Mover:
    """Steps every transfer whose socket has bytes, in a thread that is there while any is."""

    __slots__ = ("_epoll", "_is_running", "_lock", "_transfers")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transfers: dict[int, Transfer] = {}  # by descriptor
        self._is_running = False
        self._epoll: select.epoll  # of the running thread

    def add(self, transfer: Transfer) -> None:
        """Start it; ``remove`` must follow before its descriptors are closed.

        Raises:
            OSError: no descriptor is left; nothing was started.
        """
        with self._lock:
            if not self._is_running:
                self._epoll = select.epoll()
                self._is_running = True
                try:
                    threading.Thread(target=self._work, name="mover", daemon=True).start()
                except BaseException:
                    self._stop()
                    raise
            self._epoll.register(transfer.source_fd, select.EPOLLIN)
            self._transfers[transfer.source_fd] = transfer

    def remove(self, transfer: Transfer) -> None:
        """End it if it is not over: no byte moves from here on."""
        transfer.end()
        self._drop(transfer)

    def _drop(self, transfer: Transfer) -> None:
        with self._lock:
            if self._transfers.get(transfer.source_fd) is transfer:
                del self._transfers[transfer.source_fd]
                self._epoll.unregister(transfer.source_fd)

    def _stop(self) -> None:
        self._is_running = False
        self._epoll.close()

    def _work(self) -> None:
        buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))  # pages come with use
        try:
            while self._turn(buffer):
                pass
        except BaseException as error:  # a defect: nobody shall wait for a thread that is gone
            with self._lock:
                self._stop()
                for transfer in self._transfers.values():
                    transfer.error = error
                    transfer.end()
                self._transfers.clear()
            raise

    def _turn(self, buffer: memoryview) -> bool:
        """Step what is ready; return whether to go on."""
        ready = self._epoll.poll(REST_S)
        for fd, _ in ready:
            transfer = self._transfers.get(fd)
            if transfer is not None:
                transfer.step(buffer)
                if transfer.is_over:
                    self._drop(transfer)
        if ready:
            return True
        with self._lock:
            if not self._transfers:
                self._stop()
            return self._is_running
