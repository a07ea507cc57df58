"""The tables of a segment store: versions, their files and sinks, who shares what.

What a file is made of, how it becomes read-only and what lies on disk is for the two back ends:
directory.py and memfd.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from cached.adapters.segments.description import MARK_BYTES
from cached.adapters.segments.homes import check_names, make_current
from cached.adapters.segments.leases import Leases, is_held
from cached.adapters.segments.part_sink import PartSink
from cached.adapters.segments.root import SUBDIRECTORIES, claim, gone, remove, translated, unusable
from cached.adapters.segments.version import Version, check_length, close_marks, what_is_there
from cached.core import header
from cached.core.errors import LoadFailed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cached.adapters.segments.part_sink import OpenFile
    from cached.core.header import Header
    from cached.core.objects import FileRef, Left, Manifest, Part, Range, VersionRef
    from cached.ports import Summing

    Shared = Mapping[int, OpenFile]
    """Files of other versions, by the index that they have in the new one."""

_NOTHING: Final[Mapping[int, FileRef]] = MappingProxyType({})


class Segments:
    """The ``SegmentStore`` port. It owns the root until ``close``.

    ``create``, ``publish``, ``switch`` and ``free`` belong to the segment thread, all else to any.
    The lock guards the tables and is held for microseconds only; a sink's lock is never taken
    under it.

    Args:
        root: its directory; made if it is not there.
        dir_mode: of the directories that workers pass: 0o755 if their group is another.

    Raises:
        InvalidConfig: the root is in use, is another user's, or cannot be made.

    Attributes:
        kind: ``tmpfs``, ``file`` or ``memfd``.
        root: absolute.
    """

    kind: str

    def __init__(self, root: str, *, dir_mode: int = 0o750) -> None:
        self.root = os.path.abspath(root)
        self._dir_mode = dir_mode
        self._lock = threading.Lock()
        self._versions: dict[VersionRef, Version] = {}
        self._lock_fd = claim(self.root, dir_mode)
        try:
            self._take_over()
        except BaseException as error:
            os.close(self._lock_fd)
            if isinstance(error, OSError):
                raise unusable(self.root, error) from error
            raise

    # What a back end does. An OSError is the system's, and is translated here.

    def _take_over(self) -> None:
        """Look at what is in the root, and make what is needed."""
        raise NotImplementedError

    def _make(self, of: VersionRef, version: Version, manifest: Manifest, shared: Shared) -> None:
        """Make all files, in order."""
        raise NotImplementedError

    def _finish(self, file: OpenFile) -> None:
        """Make a whole file read-only; also one that is already."""
        raise NotImplementedError

    def _show(self, of: VersionRef, version: Version) -> str:
        """Make a complete version visible; return its directory."""
        raise NotImplementedError

    def _unlink(self, version: Version, place: str | None) -> None:
        """Remove a version that lies in a place now, and whatever tells of it."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _witness(self, file: OpenFile) -> Iterator[int]:
        """Lend a descriptor whose lease tells of all other users of a file."""
        yield file.fd

    def found(self) -> list[Left]:
        """Return what an earlier daemon left here, as it was at the start."""
        return []

    def close(self) -> None:
        """Give the root up and close every descriptor. The files stay."""
        for version in self._versions.values():
            self._close_sinks(version)
            close_marks(version)
            for file in version.files:
                file.close()
        self._versions.clear()
        os.close(self._lock_fd)

    def purge(self) -> None:
        """Remove everything below the root, and the root, and close; workers keep what they map."""
        for name in SUBDIRECTORIES:
            remove(f"{self.root}/{name}")
        with contextlib.suppress(OSError):  # another daemon waits for the lock, or the root is kept
            os.unlink(f"{self.root}/lock")
            os.rmdir(self.root)
        Segments.close(self)  # that alone: without its lock the root may be another daemon's by now

    def create(
        self, of: VersionRef, manifest: Manifest, shared: Mapping[int, FileRef] = _NOTHING
    ) -> list[tuple[int, Range]]:
        """Make all files of a version at full length: they can be mapped and filled from now on.

        Returns:
            What is there already, by index of the file: of shared and of adopted files.

        Raises:
            OutOfSpace: the file system is full. What was made stays until ``free``.
            ObjectRefused: a name would lie outside the root. Nothing was made.
            LoadFailed: the system refuses, the version is here already, or a shared file is not
                any more.
        """
        check_names(of, manifest)
        with self._lock:
            if of in self._versions:
                message = f"{of}, load {of.load}, is here already"
                raise LoadFailed(message, hint="free it first")
            given = {index: self._file(ref)[1] for index, ref in shared.items()}
        for index, file in given.items():
            if file.size_bytes != manifest.objects[index].size_bytes:
                message = f"{manifest.objects[index].path} has another size than what it shares"
                raise ValueError(message)
        version = Version()
        version.paths = [stored.path for stored in manifest.objects]
        self._add(of, version)
        try:
            self._make(of, version, manifest, given)
        except OSError as error:
            self._drop(version.files)  # nobody has them yet; ``free`` itself needs a descriptor
            version.files = []
            close_marks(version)
            raise translated(error, f"cannot make the files of {of} in {self.root}") from error
        return what_is_there(version)

    def _add(self, of: VersionRef, version: Version) -> None:
        with self._lock:
            self._versions[of] = version

    def _drop(self, files: Iterable[OpenFile]) -> None:
        """Take files away from one version; the last one closes them."""
        for file in files:
            file.users -= 1
            if not file.users:
                file.close()

    def sink(self, part: Part, summing: Summing | None = None) -> PartSink:
        """Return the sink of a part; the same one for every attempt of equal ``part_id``.

        What was there of the part, and did not match, is so no more for the next daemon.

        Args:
            part: that part.
            summing: of a new sink: told all bytes as they are written.

        Raises:
            LoadFailed: the version was freed, or the system refuses.
        """
        with self._lock:
            version, file = self._file(part.file)
            sink = version.sinks.get(part.part_id)
            if sink is None:
                try:
                    if version.marks is not None:
                        version.marks.unmark(part.file.index, part.start, part.stop)
                except OSError as error:
                    raise translated(error, f"cannot fetch {file.path} anew") from error
                sink = PartSink(file, part.start, part.stop, summing)
                version.sinks[part.part_id] = sink
            return sink

    def release_sink(self, part: Part) -> None:
        """Forget a part's sink, and remember what it has taken: no attempt of it will come."""
        with self._lock:
            version = self._versions.get(part.file.of)
            sink = version.sinks.pop(part.part_id, None) if version is not None else None
        if version is None or sink is None:
            return
        there = sink.noted(MARK_BYTES)
        if there is not None and version.marks is not None:
            version.marks.mark(part.file.index, there)

    def _file(self, ref: FileRef) -> tuple[Version, OpenFile]:
        """Return an open file; the lock is held."""
        version = self._versions.get(ref.of)
        if version is None or version.is_gone or ref.index >= len(version.files):
            raise gone(str(ref.of))
        return version, version.files[ref.index]

    def _version(self, of: VersionRef) -> Version:
        with self._lock:
            version = self._versions.get(of)
        if version is None or version.is_gone:
            raise gone(str(of))
        return version

    def read_header(self, file: FileRef, there_bytes: int) -> Header | int:
        """Parse the header of a file of which ``[0, there_bytes)`` is there.

        Returns:
            The header; or how many bytes it has, if that is more than are there.

        Raises:
            HeaderError: it breaks a rule of the format.
            LoadFailed: the version was freed, or the system has no descriptor left.
        """
        with self._lock:
            _, opened = self._file(file)
            try:
                fd = os.dup(opened.fd)  # survives a free in the segment thread
            except OSError as error:
                raise translated(error, f"cannot read {opened.path} of {file.of}") from error
        try:
            first = os.pread(fd, min(there_bytes, header.LENGTH_BYTES), 0)
            if len(first) < min(header.LENGTH_BYTES, opened.size_bytes):
                return header.LENGTH_BYTES
            size_bytes = header.header_bytes(first, opened.size_bytes)
            if size_bytes > there_bytes:
                return size_bytes
            return header.parse(os.pread(fd, size_bytes, 0), opened.size_bytes)
        finally:
            os.close(fd)

    def publish(self, of: VersionRef, checked_by: Sequence[str] = ()) -> str:
        """Make a complete version read-only and visible by path.

        Returns:
            The directory; also of one that is published already.

        Raises:
            OutOfSpace: the file system is full.
            LoadFailed: a file has not its length any more, somebody could still change it, or the
                system refuses.
        """
        version = self._version(of)
        if version.is_published:
            return str(version.place)
        try:
            for file in version.files:
                check_length(file)
                self._finish(file)
            version.place = self._show(of, version)
        except OSError as error:
            raise translated(error, f"cannot publish {of} in {self.root}") from error
        version.is_published = True
        for file in version.files:
            file.complete()
        close_marks(version)
        return version.place

    def switch(self, of: VersionRef, passed_over: Sequence[str] = ()) -> None:
        """Make a published version the one that ``current`` points to.

        Raises:
            OutOfSpace: the file system is full.
            LoadFailed: it is not published, or the system refuses.
        """
        if not self._version(of).is_published:
            message = f"{of} cannot be current: it is not published"
            raise LoadFailed(message)
        try:
            make_current(self.root, of)
        except OSError as error:
            raise translated(error, f"cannot make {of} current in {self.root}") from error

    def free(self, of: VersionRef, *, if_unused: bool = False) -> bool:
        """Unlink a version; return whether nobody maps or holds any of it any more.

        Files that nobody has are given back at once, the others by a later call; what another
        version shares stays.

        Args:
            of: the version.
            if_unused: if anybody has it open or mapped, change nothing and return False.

        Raises:
            LoadFailed: the system refuses to unlink; may be called again.
        """
        with self._lock:
            version = self._versions.get(of)
        if version is None:
            return True
        try:
            if not version.is_gone and not self._withdraw(version, if_unused=if_unused):
                return False
            for file in tuple(version.files):
                # Another version has it by now: an adopted one that had not been opened before.
                if file.users > 1 or not self._is_held(file):
                    version.files.remove(file)
                    self._drop((file,))
        except OSError as error:
            raise translated(error, f"cannot remove {of} from {self.root}") from error
        if version.files:
            return False
        with self._lock:
            del self._versions[of]
        return True

    def _withdraw(self, version: Version, *, if_unused: bool) -> bool:
        """Unlink a version and close what is not needed to tell when its memory is back."""
        shared = [file for file in version.files if file.users > 1]
        own = [file for file in version.files if file.users == 1]
        with contextlib.ExitStack() as stack:
            asked = own if if_unused else []
            fds = [stack.enter_context(self._witness(file)) for file in asked]
            # Locked until the leases are given back: this process must not wait for its own.
            with self._lock, Leases() as leases:
                if not all(map(leases.take, fds)):
                    return False
                place = self._move_away(version)
                if leases.are_contested():
                    self._move_back(version, place)
                    return False
                version.is_gone = True
        try:
            self._unlink(version, place)
        except OSError:
            version.is_gone = False
            with contextlib.suppress(OSError):  # then it is served on by descriptor alone
                self._move_back(version, place)
            raise
        self._close_sinks(version)
        close_marks(version)
        version.place = None
        version.files = [] if if_unused else own
        self._drop([*shared, *own] if if_unused else shared)
        return True

    def _move_away(self, version: Version) -> str | None:
        """Take a version out of sight, all of it in one moment; return where it lies now.

        Who has found its directory before, by a path or a descriptor, finds the files on.
        """
        if not version.is_published:
            return version.place
        away = f"{self.root}/filling/{version.stem or 'gone'}"
        if os.path.lexists(away):  # of a try that failed
            remove(away)
        try:
            os.rename(str(version.place), away)
        except FileNotFoundError:  # somebody else has removed it
            return version.place
        return away

    def _move_back(self, version: Version, place: str | None) -> None:
        if place != version.place:
            os.rename(str(place), str(version.place))

    def _is_held(self, file: OpenFile) -> bool:
        with self._witness(file) as fd:
            return is_held(fd)

    def _close_sinks(self, version: Version) -> None:
        with self._lock:
            sinks = list(version.sinks.values())
            version.sinks.clear()
        for sink in sinks:
            sink.close()

    def reader(self, file: FileRef) -> int:
        """Return a new read-only descriptor, with an open file description of its own.

        Raises:
            LoadFailed: the version was freed, or the system has no descriptor left.
        """
        with self._lock:
            _, opened = self._file(file)
            try:
                return os.open(f"/proc/self/fd/{opened.fd}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise translated(error, f"cannot open {opened.path} of {file.of}") from error
