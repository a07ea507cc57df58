"""Versions as sealed memory without a file system: memfds. They end with their last user.

Where there is no tmpfs, or where a process of the daemon's own user must not be able to change what
others read: once published, the kernel lets nobody write. A file is 0400 from the start and every
worker gets a read-only descriptor of its own; only the daemon writes, and only until it is sealed.

By path, ``models/NAME/VERSION/PATH`` is a link to ``/proc/PID/fd/N`` of the daemon: it leads there
for processes of the same user that see the daemon's pid.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING, Final

from cached.adapters.segments.homes import hide, leave, show
from cached.adapters.segments.part_sink import OpenFile
from cached.adapters.segments.root import SUBDIRECTORIES, make_directory, make_parents, remove
from cached.adapters.segments.store import Segments
from cached.core.errors import InvalidConfig, LoadFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cached.adapters.segments.store import Shared
    from cached.adapters.segments.version import Version
    from cached.core.objects import Manifest, VersionRef

SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_FLAGS: Final = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
_MODE: Final = 0o400
_NAME_CHARS: Final = 60  # at most 4 bytes each; the kernel takes 249 bytes


class MemfdSegments(Segments):
    """The ``SegmentStore`` port on memfds; nothing is left to a next daemon.

    Args:
        root: of the links; as for ``Segments``.
        dir_mode: as for ``Segments``.

    Raises:
        InvalidConfig: also: the kernel has no memory that can be sealed.
    """

    kind = "memfd"

    def _take_over(self) -> None:
        check_sealing()
        for name in SUBDIRECTORIES:
            remove(f"{self.root}/{name}")
        make_directory(f"{self.root}/filling", 0o700)
        make_directory(f"{self.root}/models", self._dir_mode)

    def close(self) -> None:
        """Close, and remove the links: they lead nowhere now, or to what another process opens."""
        for name in SUBDIRECTORIES:
            with contextlib.suppress(OSError):  # the next daemon sweeps them
                remove(f"{self.root}/{name}")
        super().close()

    def _make(self, of: VersionRef, version: Version, manifest: Manifest, shared: Shared) -> None:
        for index, stored in enumerate(manifest.objects):
            if index in shared:
                shared[index].users += 1
                version.files.append(shared[index])
            else:
                file = OpenFile(_sealable(of.name), stored.path, stored.size_bytes)
                version.files.append(file)
                os.ftruncate(file.fd, stored.size_bytes)

    def _finish(self, file: OpenFile) -> None:
        if file.is_suspect:
            raise _quarantined(file)
        if fcntl.fcntl(file.fd, fcntl.F_GET_SEALS) == SEALS:
            return  # shared, and published with the other version
        try:
            fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            file.is_suspect = True
            raise _quarantined(file) from error

    def _show(self, of: VersionRef, version: Version) -> str:
        place = f"{self.root}/filling/next"
        remove(place)  # of a try that failed
        make_directory(place, self._dir_mode)
        for file, path in zip(version.files, version.paths, strict=True):
            make_parents(place, path, self._dir_mode)
            os.symlink(f"/proc/{os.getpid()}/fd/{file.fd}", f"{place}/{path}")
        return show(self.root, of, place, self._dir_mode)

    def _unlink(self, version: Version, place: str | None) -> None:
        if version.place is None:
            return
        home, name = os.path.split(version.place)
        hide(home, name)
        remove(str(place))
        leave(home)

    @contextlib.contextmanager
    def _witness(self, file: OpenFile) -> Iterator[int]:
        """Lend a descriptor whose lease tells of all other users of a file."""
        fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def check_sealing() -> None:
    """See whether the kernel has memory that can be sealed.

    Raises:
        InvalidConfig: it has none.
    """
    try:
        os.close(_sealable("probe"))
    except OSError as error:
        message = f"no sealed memory can be had here: memfd_create: {error.strerror}"
        hint = "choose tmpfs or file, with a directory that can be written"
        raise InvalidConfig(message, hint=hint) from error


def _sealable(name: str) -> int:
    """Return a new memfd that nobody but this process may open for writing."""
    fd = os.memfd_create(f"cached:{name}"[:_NAME_CHARS], _FLAGS)
    try:
        os.fchmod(fd, _MODE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _quarantined(file: OpenFile) -> LoadFailed:
    message = f"{file.path} is quarantined: when it was sealed, somebody had it mapped for writing"
    hint = "find out which process of this user opens the daemon's memory; load the model anew"
    return LoadFailed(message, hint=hint)
