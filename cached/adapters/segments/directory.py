"""Versions as files in a directory: on a tmpfs, or on a disk. They survive the daemon.

What lies where, and what the next daemon makes of it, is told in survey.py. Nothing is synced: who
comes after a start of the machine sees by boot_id that he must look at the content.

Pages come with the writes. They are not reserved by fallocate: it takes the file's rwsem from
the writers and costs more than it protects from (docs/decisions/004); the ledger keeps the sum of
all loads within what there is, and a file system that fills up nevertheless fails a write cleanly.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from cached.adapters.segments import survey
from cached.adapters.segments.description import Marks, boot_id, encode, marks_of
from cached.adapters.segments.homes import hide, leave, show
from cached.adapters.segments.part_sink import OpenFile
from cached.adapters.segments.root import (
    SUBDIRECTORIES,
    make_directory,
    make_parents,
    parent_of,
    remove,
    take_directory,
    translated,
)
from cached.adapters.segments.store import Segments
from cached.adapters.segments.version import Version, what_is_there
from cached.core.errors import LoadFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cached.adapters.segments.part_sink import PartSink
    from cached.adapters.segments.store import Shared
    from cached.adapters.segments.survey import Relic
    from cached.core.objects import FileRef, Left, Manifest, Part, Range, VersionRef
    from cached.ports import Summing

_NOTHING: Final[Mapping[int, FileRef]] = MappingProxyType({})
_NEW: Final = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_OLD: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class DirectorySegments(Segments):
    """The ``SegmentStore`` port on a file system.

    Args:
        root: as for ``Segments``.
        dir_mode: as for ``Segments``.
        kind: ``tmpfs`` or ``file``; they differ in what their pages count as, not in here.
    """

    def __init__(self, root: str, *, dir_mode: int = 0o750, kind: str = "tmpfs") -> None:
        self.kind = kind
        self._boot_id = boot_id()
        self._relics: dict[VersionRef, Relic] = {}
        self._left: list[Left] = []
        self._next = 1  # number in the root
        # Two versions that were left may have one file. Two descriptors of it would each see
        # the other as somebody who holds it.
        self._adopted: dict[tuple[int, int], OpenFile] = {}  # by device and inode
        super().__init__(root, dir_mode=dir_mode)

    def _take_over(self) -> None:
        for name in SUBDIRECTORIES:
            take_directory(self.root, name, self._dir_mode if name == "models" else 0o700)
        relics = survey.survey(self.root, self._boot_id)
        self._left = [relic.left for relic in relics]
        self._relics = {relic.left.of: relic for relic in relics}
        self._next += survey.last_number(self.root)

    def found(self) -> list[Left]:
        """Return what an earlier daemon left here, as it was at the start."""
        return list(self._left)

    def create(
        self, of: VersionRef, manifest: Manifest, shared: Mapping[int, FileRef] = _NOTHING
    ) -> list[tuple[int, Range]]:
        """Make all files of a version, or adopt what is there; see ``Segments``."""
        relic = self._relics.get(of)
        if relic is None:
            return super().create(of, manifest, shared)
        version = self._opened(relic, manifest)
        self._add(of, version)
        del self._relics[of]
        return what_is_there(version)

    def _opened(self, relic: Relic, manifest: Manifest) -> Version:
        """Return a version that was left, with its files open.

        Raises:
            LoadFailed: it is not what it was, or not what it should be.
        """
        version = _version(relic)
        try:
            if relic.left.manifest is None or _files(relic.left.manifest) != _files(manifest):
                raise _changed(relic)
            for stored, spans in zip(manifest.objects, relic.left.there, strict=True):
                fd, facts = _open(self.root, f"{relic.place}/{stored.path}")
                file = self._known(fd, facts, stored.path)
                version.files.append(file)
                if survey.is_ours(facts, stored.size_bytes) is None:
                    raise _changed(relic)
                with file.lock:
                    for span in spans:
                        file.there.add(span.start, span.stop)
            self._prepare(version, manifest)
        except OSError as error:
            self._drop(version.files)
            raise translated(error, f"cannot adopt {relic.left.path}") from error
        except LoadFailed:
            self._drop(version.files)
            raise
        return version

    def sink(self, part: Part, summing: Summing | None = None) -> PartSink:
        """Return the sink of a part; see ``Segments``.

        A file that was complete when it was adopted, and of which bytes were found wrong, can be
        written from now on.
        """
        with self._lock:
            _, file = self._file(part.file)
            try:
                _make_writable(file.fd)
            except OSError as error:
                raise translated(error, f"cannot write {file.path} of {part.file.of}") from error
        return super().sink(part, summing)

    def _known(self, fd: int, facts: os.stat_result, path: str) -> OpenFile:
        """Return the file of a descriptor: the one that has it already, or a new one."""
        key = (facts.st_dev, facts.st_ino)
        file = self._adopted.get(key)
        if file is not None and file.fd >= 0:
            os.close(fd)
            file.users += 1
            return file
        file = self._adopted[key] = OpenFile(fd, path, facts.st_size)
        return file

    def _prepare(self, version: Version, manifest: Manifest) -> None:
        """Give directories the mode of today, and go on with the map."""
        place = str(version.place)
        os.chmod(place, self._dir_mode)
        for entry in survey.walk(place):
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, self._dir_mode)
        if version.is_published:
            os.chmod(os.path.dirname(place), self._dir_mode)
        else:
            fd = os.open(f"{self.root}/about/{version.stem}.map", os.O_RDWR | _OLD)
            version.marks = Marks(fd, [stored.size_bytes for stored in manifest.objects])

    def publish(self, of: VersionRef, checked_by: Sequence[str] = ()) -> str:
        """Publish a version, and tell the next daemon by what it was checked; see ``Segments``.

        Where that cannot be written it goes without.
        """
        if checked_by:
            path = f"{self.root}/about/{self._version(of).stem}.checked"
            with contextlib.suppress(OSError):
                _put(path, "".join(f"{by}\n" for by in checked_by).encode())
        return super().publish(of)

    def switch(self, of: VersionRef, passed_over: Sequence[str] = ()) -> None:
        """Make a version current, and tell the next daemon what was passed over for it.

        That counts once this version is the current one: nobody else's record is looked at.
        """
        path = f"{self.root}/about/{self._version(of).stem}.over"
        try:
            if passed_over:
                _put(path, "\n".join(passed_over).encode())
            else:
                remove(path)
        except OSError as error:
            raise translated(error, f"cannot make {of} current in {self.root}") from error
        super().switch(of)

    def free(self, of: VersionRef, *, if_unused: bool = False) -> bool:
        """Unlink a version, also one that was left and not adopted; see ``Segments``."""
        relic = self._relics.get(of)
        if relic is None:
            return super().free(of, if_unused=if_unused)
        version = _version(relic)
        try:
            self._open_all(version)
            self._add(of, version)
            return super().free(of, if_unused=if_unused)
        except OSError as error:
            raise translated(error, f"cannot look at {relic.left.path}") from error
        finally:
            if version.is_gone:
                del self._relics[of]
            else:
                self._drop(version.files)
                with self._lock:
                    self._versions.pop(of, None)

    def _open_all(self, version: Version) -> None:
        """Open whatever regular files there are, to see when nobody has them any more."""
        for entry in survey.walk(str(version.place)):
            if entry.is_file(follow_symlinks=False):
                with contextlib.suppress(PermissionError):
                    fd, facts = _open(self.root, entry.path)
                    version.files.append(self._known(fd, facts, entry.path))

    def _make(self, of: VersionRef, version: Version, manifest: Manifest, shared: Shared) -> None:
        version.stem = str(self._next)
        self._next += 1
        version.place = f"{self.root}/filling/{version.stem}"
        make_directory(version.place, self._dir_mode)
        for index, stored in enumerate(manifest.objects):
            make_parents(version.place, stored.path, self._dir_mode)
            path = f"{version.place}/{stored.path}"
            if index in shared:
                version.files.append(_linked(shared[index], path))
            else:
                fd = os.open(path, os.O_RDWR | _NEW, survey.FILLING_MODE)
                version.files.append(OpenFile(fd, stored.path, stored.size_bytes))
                os.ftruncate(fd, stored.size_bytes)
        self._tell(of, version, manifest)

    def _tell(self, of: VersionRef, version: Version, manifest: Manifest) -> None:
        """Write what the next daemon is told; the rename of the description makes it valid."""
        about = f"{self.root}/about/{version.stem}"
        sizes = [stored.size_bytes for stored in manifest.objects]
        fd = os.open(f"{about}.map", os.O_RDWR | _NEW, 0o600)
        version.marks = Marks(fd, sizes)
        _write(fd, bytes(sum(map(marks_of, sizes))))
        for index, span in what_is_there(version):
            version.marks.mark(index, span)
        _put(f"{about}.json", encode(of, manifest, self._boot_id))

    def _finish(self, file: OpenFile) -> None:
        os.fchmod(file.fd, survey.COMPLETE_MODE)

    def _show(self, of: VersionRef, version: Version) -> str:
        return show(self.root, of, str(version.place), self._dir_mode)

    def _unlink(self, version: Version, place: str | None) -> None:
        about = f"{self.root}/about/{version.stem}"
        home, name = os.path.split(str(version.place))
        if version.is_published:
            hide(home, name)
        if version.stem is not None:
            remove(f"{about}.json")
        remove(str(place))
        if version.is_published:
            leave(home)
        if version.stem is not None:
            for kind in ("new", "map", *survey.MORE):
                remove(f"{about}.{kind}")


def _version(relic: Relic) -> Version:
    version = Version()
    version.place = relic.place
    version.stem = relic.stem
    version.is_published = relic.left.is_published
    return version


def _files(manifest: Manifest) -> list[tuple[str, int]]:
    return [(stored.path, stored.size_bytes) for stored in manifest.objects]


def _changed(relic: Relic) -> LoadFailed:
    message = f"{relic.left.path} cannot be adopted: it is not what was described"
    return LoadFailed(message, hint="free it, and load the model anew")


def _open(root: str, path: str) -> tuple[int, os.stat_result]:
    """Open a file that was left in a root: to go on writing, unless it is complete.

    Raises:
        OSError: of the system; also if it is a link, or there is one on the way.
    """
    with parent_of(root, path.removeprefix(f"{root}/")) as (directory, name):
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        is_filling = stat.S_IMODE(found.st_mode) == survey.FILLING_MODE
        flags = (os.O_RDWR if is_filling else os.O_RDONLY) | _OLD
        fd = os.open(name, flags, dir_fd=directory)
    return fd, os.fstat(fd)


def _make_writable(fd: int) -> None:
    """Open a file for writing that was opened to be read, under the same number.

    Its mode says meanwhile that it is not complete: who is killed then leaves nothing believed.
    """
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        return
    os.fchmod(fd, survey.FILLING_MODE)
    try:
        writing = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.fchmod(fd, survey.COMPLETE_MODE)
    os.dup2(writing, fd, inheritable=False)
    os.close(writing)


def _linked(file: OpenFile, path: str) -> OpenFile:
    """Give a file of another version a further name, by its descriptor: names may have changed."""
    # With a descriptor given, os.link is linkat, which alone follows the link in /proc.
    os.link(f"/proc/self/fd/{file.fd}", path, src_dir_fd=file.fd, follow_symlinks=True)
    file.users += 1
    return file


def _put(path: str, data: bytes) -> None:
    """Make a small file, or replace it: who reads it finds all of it, or what was there before."""
    new = f"{path.rpartition('.')[0]}.new"
    remove(new)
    fd = os.open(new, os.O_WRONLY | _NEW, 0o600)
    with open(fd, "wb", buffering=0):
        _write(fd, data)
    os.rename(new, path)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
