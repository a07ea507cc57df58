"""Models as files in a tmpfs: made, filled, published by rename, freed.

Layout below the root::

    lock                            mode 0600, held by flock as long as the daemon lives; its pid
    filling/NAME@VERSION~LOAD/PATH  mode 0600, full length from the start
    models/NAME/VERSION/PATH        mode 0444, complete
    models/NAME/current             a symbolic link to the VERSION

Pages come with the writes. They are not reserved by fallocate: it takes the file's rwsem from
the writers and costs more than it protects from (docs/decisions/004); the ledger keeps the sum of
all loads within what there is, and a file system that fills up nevertheless fails a write cleanly.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import threading
from typing import TYPE_CHECKING, Final

from cached.adapters.segments.part_sink import OpenFile, PartSink
from cached.adapters.segments.root import (
    claim,
    gone,
    make_directory,
    remove_tree,
    survey,
    translated,
    unusable,
)
from cached.core import header
from cached.core.errors import LoadFailed, ObjectRefused
from cached.core.manifest import layout_path

if TYPE_CHECKING:
    from cached.core.header import Header
    from cached.core.objects import FileRef, Manifest, Part, VersionRef

_CURRENT: Final = "current"


class _Version:
    """One version's files.

    Attributes:
        directory: where they lie now; None once unlinked.
        sinks: of parts under way, by id.
    """

    __slots__ = ("directory", "files", "sinks")

    def __init__(self, directory: str) -> None:
        self.directory: str | None = directory
        self.files: list[OpenFile] = []
        self.sinks: dict[int, PartSink] = {}


class TmpfsSegments:
    """The ``SegmentStore`` port on a tmpfs. It owns the root until ``close``.

    ``create``, ``publish`` and ``free`` belong to the segment thread, all else to any. The lock
    guards the tables and is held for microseconds only; a sink's lock is never taken under it.

    Args:
        root: its directory; made if it is not there.
        dir_mode: of the directories that workers pass: 0o755 if their group is another.

    Raises:
        InvalidConfig: the root is in use, is another user's, or cannot be made.

    Attributes:
        root: absolute.
        swept: what a dead daemon had left; it was removed.
    """

    def __init__(self, root: str, *, dir_mode: int = 0o750) -> None:
        self.root = os.path.abspath(root)
        self._dir_mode = dir_mode
        self._lock = threading.Lock()
        self._versions: dict[VersionRef, _Version] = {}
        self._lock_fd = claim(self.root, dir_mode)
        try:
            self.swept = survey(self.root)
            for name, mode in (("filling", 0o700), ("models", dir_mode)):
                remove_tree(f"{self.root}/{name}")
                make_directory(f"{self.root}/{name}", mode)
        except OSError as error:
            os.close(self._lock_fd)
            raise unusable(self.root, error) from error

    def close(self) -> None:
        """Give the root up and close every descriptor. The files stay."""
        for version in self._versions.values():
            self._close_sinks(version)
            for file in version.files:
                file.close()
        self._versions.clear()
        os.close(self._lock_fd)

    def purge(self) -> None:
        """Remove everything below the root, and the root, and close; workers keep what they map."""
        for name in ("filling", "models"):
            remove_tree(f"{self.root}/{name}")
        with contextlib.suppress(OSError):  # another daemon waits for the lock, or the root is kept
            os.unlink(f"{self.root}/lock")
            os.rmdir(self.root)
        self.close()

    def create(self, of: VersionRef, manifest: Manifest) -> None:
        """Make all files of a version at full length: they can be mapped and filled from now on.

        Raises:
            OutOfSpace: the file system is full. What was made stays until ``free``.
            ObjectRefused: a name would lie outside the root. Nothing was made.
            LoadFailed: the system refuses.
        """
        _check_names(of, manifest)
        version = _Version(f"{self.root}/filling/{of}~{of.load}")
        with self._lock:
            self._versions[of] = version
        try:
            self._make_files(version, manifest)
        except OSError as error:
            for file in version.files:  # nobody has them yet; ``free`` itself needs a descriptor
                file.close()
            raise translated(error, f"cannot make the files of {of} in {self.root}") from error

    def _make_files(self, version: _Version, manifest: Manifest) -> None:
        directory = str(version.directory)
        make_directory(directory, self._dir_mode)
        made = {""}
        for stored in manifest.objects:
            parts = stored.path.split("/")
            for depth in range(1, len(parts)):
                parent = "/".join(parts[:depth])
                if parent not in made:
                    made.add(parent)
                    make_directory(f"{directory}/{parent}", self._dir_mode)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(f"{directory}/{stored.path}", flags, 0o600)
            version.files.append(OpenFile(fd, stored.path, stored.size_bytes))
            os.ftruncate(fd, stored.size_bytes)

    def sink(self, part: Part) -> PartSink:
        """Return the sink of a part; the same one for every attempt of equal ``part_id``.

        Raises:
            LoadFailed: the version was freed.
        """
        with self._lock:
            version, file = self._file(part.file)
            sink = version.sinks.get(part.part_id)
            if sink is None:
                sink = PartSink(file, part.start, part.stop)
                version.sinks[part.part_id] = sink
            return sink

    def release_sink(self, part: Part) -> None:
        """Forget a part's sink: no attempt of it will come."""
        with self._lock:
            version = self._versions.get(part.file.of)
            if version is not None:
                version.sinks.pop(part.part_id, None)

    def _file(self, ref: FileRef) -> tuple[_Version, OpenFile]:
        """Return an open file; the lock is held."""
        version = self._versions.get(ref.of)
        if version is None or version.directory is None:
            raise gone(str(ref.of))
        return version, version.files[ref.index]

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

    def publish(self, of: VersionRef) -> str:
        """Make a complete version read-only, visible by path, and current.

        Returns:
            The directory.

        Raises:
            OutOfSpace: the file system is full.
            LoadFailed: a file has not its length any more, or the system refuses.
        """
        with self._lock:
            version = self._versions.get(of)
        if version is None or version.directory is None:
            raise gone(str(of))
        try:
            for file in version.files:
                _finish(file)
            return self._show(of, version, version.directory)
        except OSError as error:
            raise translated(error, f"cannot publish {of} in {self.root}") from error

    def _show(self, of: VersionRef, version: _Version, filling: str) -> str:
        home = f"{self.root}/models/{of.name}"
        if not os.path.isdir(home):
            make_directory(home, self._dir_mode)
        directory = f"{home}/{of.version}"
        os.rename(filling, directory)
        version.directory = directory
        link = f"{home}/.{_CURRENT}"
        if os.path.lexists(link):
            os.unlink(link)
        os.symlink(of.version, link)
        os.rename(link, f"{home}/{_CURRENT}")
        return directory

    def free(self, of: VersionRef) -> bool:
        """Unlink a version; return whether nobody maps or holds any of it any more.

        Files that nobody has are given back at once, the others by a later call.

        Raises:
            LoadFailed: the system refuses to unlink; may be called again.
        """
        with self._lock:
            version = self._versions.get(of)
        if version is None:
            return True
        if version.directory is not None:
            try:
                self._unlink(of, version.directory)
            except OSError as error:
                raise translated(error, f"cannot remove {version.directory}") from error
            with self._lock:
                version.directory = None
            self._close_sinks(version)
        for file in version.files:
            if file.fd >= 0 and not _is_held(file.fd):
                file.close()
        if any(file.fd >= 0 for file in version.files):
            return False
        with self._lock:
            del self._versions[of]
        return True

    def _close_sinks(self, version: _Version) -> None:
        with self._lock:
            sinks = list(version.sinks.values())
            version.sinks.clear()
        for sink in sinks:
            sink.close()

    def _unlink(self, of: VersionRef, directory: str) -> None:
        home = f"{self.root}/models/{of.name}"
        current = f"{home}/{_CURRENT}"
        is_published = directory == f"{home}/{of.version}"
        if is_published and os.path.islink(current) and os.readlink(current) == of.version:
            os.unlink(current)
        remove_tree(directory)
        if os.path.isdir(home) and not os.listdir(home):
            os.rmdir(home)

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


def _check_names(of: VersionRef, manifest: Manifest) -> None:
    """Refuse names that would lie anywhere but in one directory of this version."""
    for name in (of.name, of.version):
        if "/" in layout_path(name, ""):
            message = f"{name!r} cannot be the name of a directory"
            raise ObjectRefused(message)
    if of.version.lstrip(".") == _CURRENT:
        message = f"{of.version!r} cannot be a version: that name is taken"
        raise ObjectRefused(message)
    for stored in manifest.objects:
        layout_path(stored.path, "")


def _finish(file: OpenFile) -> None:
    """Make a whole file read-only.

    Raises:
        LoadFailed: somebody changed its length.
    """
    found_bytes = os.fstat(file.fd).st_size
    if found_bytes != file.size_bytes:
        message = f"{file.path} must have {file.size_bytes} bytes, has {found_bytes}"
        raise LoadFailed(message, hint="something else writes to the segment root: find out what")
    os.fchmod(file.fd, 0o444)


def _is_held(fd: int) -> bool:
    """Return whether anybody else has a file open or mapped.

    The kernel grants a write lease only to the file's one and only user: fcntl(2), F_SETLEASE.
    Where it cannot tell, nobody is assumed to: those who have a lease of ours have gone by now.
    """
    try:
        # Should somebody open the file while we have the lease: a signal that does nothing.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
