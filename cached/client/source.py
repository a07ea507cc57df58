"""Where a model's bytes come from; and the source that is a daemon, which may come back.

A daemon that was killed and started again has the version still, or gets it: a call that finds
its connection lost opens that version anew, and what it maps is for later views.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from cached.client.dialing import connect
from cached.client.mappings import File, close_all
from cached.core import wire
from cached.core.errors import DaemonUnavailable, FrameError, Stale, TimedOut, VersionUnknown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from cached.client.connection import Connection, Reply
    from cached.client.deadline import Deadline
    from cached.client.mappings import Lease
    from cached.client.spans import Range


class There(NamedTuple):
    """What is there, and in which mappings.

    Attributes:
        files: that it is true of: after a daemon has come back they may be others than before.
        is_all: nothing need be waited for any more.
        ranges: that are there; empty where they were not asked for.
        seen_bytes: of them together.
    """

    files: list[File]
    is_all: bool
    ranges: Sequence[Range] = ()
    seen_bytes: int = 0


class Source(Protocol):
    """Where a model's bytes come from: the daemon, or the store itself.

    Attributes:
        lease: that every mapping holds.
        files: as they were mapped last.
    """

    lease: Lease
    files: list[File]

    def wait(self, ranges: Sequence[Range], deadline: Deadline, what: str) -> There:
        """Wait for byte ranges.

        Args:
            ranges: file, start, stop of each.
            deadline: when to give up.
            what: they are, for the error.
        """

    def path(self, deadline: Deadline) -> tuple[str, list[File]]:
        """Wait for the whole version; return its directory, and the files, which are complete."""

    def arrivals(self, seen_bytes: int, deadline: Deadline) -> There:
        """Wait for more than ``seen_bytes``; return what is there."""

    def descriptors(self, files: Sequence[int], deadline: Deadline) -> list[int]:
        """Return one new read-only descriptor for each file; the caller closes them."""

    def is_stale(self, deadline: Deadline) -> bool:
        """Return whether this version failed to load, or another is current."""

    def drop(self) -> None:
        """Let go of all mappings, and of those that a call under way would make."""


class _Link(NamedTuple):
    """A connection with a lease, and the files that its replies are about."""

    connection: Connection
    files: list[File]


class DaemonSource:
    """A model's bytes as the daemon serves them (``Source``).

    A child of fork asks over a connection of its own, with a lease of its own; the inherited
    socket is only kept open.

    Args:
        connection: that was asked.
        lease: that its ``close`` ends.
        reply: to ``open``; its descriptors are mapped and closed.
        deadline: for those of more files than fit a reply.

    Attributes:
        files: as they were mapped last.
    """

    def __init__(
        self, connection: Connection, lease: Lease, reply: Reply, deadline: Deadline
    ) -> None:
        self.lease = lease
        self._address = connection.address
        self._is_dropped = False
        self.files: list[File] = []
        self._name, self.version, files = _read(reply)
        self.files = self._mapped(files, connection, reply.descriptors, deadline)
        self._links = {connection.pid: _Link(connection, self.files)}
        self._locks: dict[int, threading.Lock] = {}  # by process: a child of fork has its own

    def wait(self, ranges: Sequence[Range], deadline: Deadline, what: str) -> There:
        """Wait for byte ranges."""
        there = There(self.files, is_all=False)
        for start in range(0, len(ranges), wire.MAX_RANGES):
            batch: dict[str, object] = {"ranges": ranges[start : start + wire.MAX_RANGES]}
            reply, files = self._call("wait", batch, deadline, what)
            if files is not there.files and start:
                return self.wait(ranges, deadline, what)  # the first are to be waited for again
            there = There(files, bool(reply.body.get("complete")))
        return there

    def path(self, deadline: Deadline) -> tuple[str, list[File]]:
        """Wait for the whole version; return its directory, and its files."""
        what = f"all of {self._name}"
        reply, files = self._call("wait", {"ranges": "all"}, deadline, what)
        return str(reply.body["path"]), files

    def arrivals(self, seen_bytes: int, deadline: Deadline) -> There:
        """Wait for more than ``seen_bytes``; return what is there."""
        what = f"more of {self._name}"
        reply, files = self._call("arrivals", {"seen": seen_bytes}, deadline, what)
        ranges = cast("list[list[int]]", reply.body["ranges"])
        there = [(index, start, stop) for index, start, stop in ranges]
        is_all, seen_bytes = bool(reply.body["complete"]), cast("int", reply.body["seen"])
        return There(files, is_all, there, seen_bytes)

    def descriptors(self, files: Sequence[int], deadline: Deadline) -> list[int]:
        """Return new read-only descriptors of files; the caller closes them."""
        holding = self.lease.hold()
        try:
            return _descriptors(self._link(deadline).connection, files, deadline)
        finally:
            self.lease.release(holding)

    def is_stale(self, deadline: Deadline) -> bool:
        """Return whether another version is current."""
        return bool(self._call("check", {}, deadline)[0].body["stale"])

    def drop(self) -> None:
        """Let go of all mappings, and of those that a call under way would make."""
        self._is_dropped = True
        for files in (self.files, *(link.files for link in list(self._links.values()))):
            for file in files:
                file.drop()

    # --- the connection

    def _call(
        self, op: str, fields: dict[str, object], deadline: Deadline, what: str = ""
    ) -> tuple[Reply, list[File]]:
        """Ask over this process's connection, and hold the lease meanwhile."""
        holding = self.lease.hold()
        try:
            link = self._link(deadline)
            return link.connection.call(op, fields, deadline, what), link.files
        finally:
            self.lease.release(holding)

    def _link(self, deadline: Deadline) -> _Link:
        """Return the connection of this process, made anew if it has none or it is lost."""
        pid = os.getpid()
        link = self._links.get(pid)
        if link is not None and not link.connection.is_lost:
            return link
        lock = self._locks.setdefault(pid, threading.Lock())
        left_s = deadline.left_s
        if not lock.acquire(timeout=-1 if left_s is None else left_s):
            message = f"waited {deadline.timeout_s:g} s to reach the daemon again in vain"
            raise TimedOut(message, hint="give more time (timeout_s)")
        try:
            link = self._links.get(pid)  # another thread may have been first
            if link is None or link.connection.is_lost:
                link = self._renewed(link, deadline)
            return link
        finally:
            lock.release()

    def _renewed(self, lost: _Link | None, deadline: Deadline) -> _Link:
        try:
            made = connect(self._address, deadline)
        except DaemonUnavailable as error:
            message = f"the daemon has gone: {error.message}"
            hint = f"what is mapped stays valid; {error.hint}"
            raise DaemonUnavailable(message, hint=hint) from error
        try:
            files = self._leased_again(made, deadline)
        except BaseException:
            made.close()
            raise
        link = self._links[made.pid] = _Link(made, files)
        self.files = files
        self.lease.add(made.close)
        if lost is not None:
            lost.connection.retire()
        if self._is_dropped:
            self.drop()
        return link

    def _leased_again(self, made: Connection, deadline: Deadline) -> list[File]:
        fields = {"model": self._name, "version": self.version}
        hint = "open the model again: the views that you have stay valid"
        try:
            reply = made.call("open", fields, deadline, f"{self._name} to be opened again")
        except VersionUnknown as error:
            raise Stale(error.message, hint=hint) from error
        _, version, files = _read(reply)
        if version != self.version:  # of a daemon that keeps one version only
            close_all(reply.descriptors)
            message = f"{self._name} is {version} now, was {self.version}"
            raise Stale(message, hint=hint)
        return self._mapped(files, made, reply.descriptors, deadline)

    # --- the files

    def _mapped(
        self, files: list[File], connection: Connection, descriptors: list[int], deadline: Deadline
    ) -> list[File]:
        """Return the files, mapped; those that are mapped already as they are."""
        self._map(files, 0, descriptors)
        start = len(descriptors)
        while start < len(files):
            wanted = range(start, min(len(files), start + wire.MAX_DESCRIPTORS))
            self._map(files, start, _descriptors(connection, wanted, deadline))
            start = wanted.stop
        return files

    def _map(self, files: list[File], start: int, descriptors: list[int]) -> None:
        """Map the files from ``start`` on. Closes the descriptors."""
        known = self.files
        left = descriptors[::-1]
        try:
            for at in range(start, min(len(files), start + len(left))):
                descriptor = left.pop()
                if at < len(known) and known[at].is_mapped_from(descriptor):
                    files[at] = known[at]
                    os.close(descriptor)
                else:
                    files[at].map(descriptor, self.lease)
        finally:
            close_all(left)


def _read(reply: Reply) -> tuple[str, str, list[File]]:
    """Return name, version and files of a reply to ``open``; closes its descriptors if it cannot.

    Raises:
        FrameError: it is not as docs/wire.md has it.
    """
    body = reply.body
    try:
        entries = cast("list[Mapping[str, Any]]", body["files"])
        files = [File(each["path"], each["size"], each["header_bytes"]) for each in entries]
        return str(body["name"]), str(body["version"]), files
    except (KeyError, TypeError) as error:
        close_all(reply.descriptors)
        message = "the daemon's answer to open is not as docs/wire.md has it"
        raise FrameError(message, hint="upgrade the older of daemon and client") from error


def _descriptors(connection: Connection, files: Sequence[int], deadline: Deadline) -> list[int]:
    found: list[int] = []
    try:
        while len(found) < len(files):
            wanted = list(files[len(found) : len(found) + wire.MAX_DESCRIPTORS])
            came = connection.call("descriptors", {"files": wanted}, deadline).descriptors
            found += came
            if len(came) != len(wanted):
                message = f"{len(came)} descriptors came, {len(wanted)} were asked for"
                raise FrameError(message)  # noqa: TRY301 - what came is closed below
    except BaseException:
        close_all(found)
        raise
    return found
