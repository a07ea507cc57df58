"""Reads the files of a model once, several at a time, and makes their digests on the way."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final, TypeVar

from cached.core.backoff import delay_s
from cached.core.digests import BLOCK_BYTES, MANIFEST_NAME, Digests, FileDigests
from cached.core.errors import BadReply, ObjectChanged, ObjectMissing, StoreError
from cached.core.objects import FileRef, Part, VersionRef

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.core.objects import Manifest, ModelRef, StoredObject
    from cached.ports import ObjectStore

    Shown = Callable[[int, int], None]
    """Told how many bytes were read, and of how many."""

T = TypeVar("T")

LOOK_S = 0.1  # between two looks at how far it is
PIECE_BYTES = 128 << 10  # of a pipe: both sums find it in the L2 cache


class HashingSink:
    """Hashes the bytes of one file in order, and keeps none; the ``Sink`` port for one attempt.

    Attributes:
        watermark: bytes below it were hashed.
        sees_bytes: False: a pipe is read in pieces that both sums find in the L2 cache.
        checksum: of the port; there is none.
    """

    sees_bytes: Final = False
    checksum: Final = None

    __slots__ = ("_block", "_blocks", "_size_bytes", "_whole", "watermark")

    def __init__(self, size_bytes: int) -> None:
        self.watermark = 0
        self._size_bytes = size_bytes
        self._whole = hashlib.sha256()
        self._block = hashlib.sha256()
        self._blocks: list[bytes] = []

    def accept(self, offset: int, view: memoryview) -> None:
        """Hash what of ``view`` lies above the watermark.

        Raises:
            ValueError: outside the file, or leaves a hole: a bug of the caller.
        """
        stop = offset + len(view)
        if not (0 <= offset <= self.watermark and stop <= self._size_bytes):
            message = (
                f"bytes {offset} to {stop} do not fit a file of {self._size_bytes} bytes "
                f"with its watermark at {self.watermark}"
            )
            raise ValueError(message)
        view = view[self.watermark - offset :]
        while view:
            piece = view[: BLOCK_BYTES - self.watermark % BLOCK_BYTES]
            self._whole.update(piece)
            self._block.update(piece)
            self.watermark += len(piece)
            if self.watermark % BLOCK_BYTES == 0:
                self._end_block()
            view = view[len(piece) :]

    def accept_from_pipe(self, pipe_fd: int, offset: int, size_bytes: int) -> None:
        """Hash exactly ``size_bytes`` from a pipe, which belong at ``offset``.

        Raises:
            BadReply: the pipe ended early. What came before counts.
        """
        stop = offset + size_bytes
        while offset < stop:
            piece = os.read(pipe_fd, min(stop - offset, PIECE_BYTES))
            if not piece:
                message = f"the body ended {stop - offset} bytes early"
                raise BadReply(message)
            self.accept(offset, memoryview(piece))
            offset += len(piece)

    def digests(self) -> FileDigests:
        """Return the digests of the whole file, of which all bytes came."""
        if self.watermark % BLOCK_BYTES:
            self._end_block()
        return FileDigests(self._size_bytes, self._whole.digest(), tuple(self._blocks))

    def _end_block(self) -> None:
        self._blocks.append(self._block.digest())
        self._block = hashlib.sha256()


class Patience:
    """Tries again what may pass. Any thread.

    Args:
        attempts: in a row that may bring nothing; the error of the last one is raised.
    """

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._over = threading.Event()

    def end(self) -> None:
        """Try nothing again from now on, and wake who waits to."""
        self._over.set()

    def call(self, attempt: Callable[[], T], done_bytes: Callable[[], int] = lambda: 0) -> T:
        """Return what ``attempt`` returns in the end.

        Args:
            attempt: goes on where the one before it ended.
            done_bytes: how far it is: an attempt that failed and moved this brought something.

        Raises:
            StoreError: it is not transient, or of the last attempt.
        """
        failures = 0
        while True:
            before_bytes = done_bytes()
            try:
                return attempt()
            except StoreError as error:
                failures = 1 if done_bytes() > before_bytes else failures + 1
                if not error.transient or failures >= self._attempts:
                    raise
                pause_s = delay_s(failures, random.random(), error.retry_after_s)  # noqa: S311
                if self._over.wait(pause_s):
                    raise


class Hashing:
    """Makes the digests of a model.

    Args:
        store: holds it; closed when anything fails, so that what runs ends soon.
        patience: of every request.
        threads: files that are read at a time. Over plain HTTP one thread moves the bytes of
            all (docs/decisions/005), and so hashes them: about 1 GB/s.
    """

    def __init__(self, store: ObjectStore, patience: Patience, threads: int) -> None:
        self._store = store
        self._patience = patience
        self._threads = threads

    def digests(self, ref: ModelRef, shown: Shown) -> Digests:
        """Read every file of a model but the manifest of digests itself.

        Raises:
            ObjectMissing: there is none.
            ObjectChanged: one is not what it was when it was listed.
            StoreError: anything else.
        """
        listed = self._listed(ref)
        sinks = [HashingSink(stored.size_bytes) for stored in listed.objects]
        try:
            self._read(listed, sinks, shown)
            self._check_same(ref, listed)
        except ObjectChanged as error:
            hint = "nothing was written; run it again once nobody writes there"
            raise ObjectChanged(error.message, hint=hint) from error
        files = {
            stored.path: sink.digests() for stored, sink in zip(listed.objects, sinks, strict=True)
        }
        return Digests(BLOCK_BYTES, files)

    def _listed(self, ref: ModelRef) -> Manifest:
        found = self._patience.call(lambda: self._store.resolve(ref))
        objects = tuple(stored for stored in found.objects if stored.path != MANIFEST_NAME)
        if not objects:
            message = f"nothing but {MANIFEST_NAME} is at {ref.uri}"
            raise ObjectMissing(message, hint="check bucket and prefix")
        return found._replace(objects=objects)

    def _read(self, listed: Manifest, sinks: list[HashingSink], shown: Shown) -> None:
        pool = ThreadPoolExecutor(self._threads, "hash")
        try:
            parts = [_whole(listed, index) for index in range(len(sinks))]
            left = {pool.submit(self._fetch, *each) for each in zip(parts, sinks, strict=True)}
            while left:
                done, left = wait(left, LOOK_S, FIRST_EXCEPTION)
                shown(sum(sink.watermark for sink in sinks), listed.size_bytes)
                for job in done:
                    job.result()
        except BaseException:
            self._patience.end()
            self._store.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _fetch(self, part: Part, sink: HashingSink) -> None:
        self._patience.call(lambda: self._store.fetch(part, sink), lambda: sink.watermark)

    def _check_same(self, ref: ModelRef, listed: Manifest) -> None:
        """Notice what was added, removed, or replaced after it had been read."""
        changed = {*listed.objects} ^ {*self._listed(ref).objects}
        if changed:
            message = f"{min(stored.key for stored in changed)} was changed while others were read"
            raise ObjectChanged(message)


def _whole(listed: Manifest, index: int) -> Part:
    stored: StoredObject = listed.objects[index]
    file = FileRef(VersionRef("digest", listed.version), index)
    return Part(index, file, listed.uri, stored, 0, stored.size_bytes)
