"""``cached.open``: a lease from the daemon, or from the store itself if that is allowed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from cached.client import settings
from cached.client.connection import connect
from cached.client.deadline import Deadline
from cached.client.mappings import File, Lease, close_all
from cached.client.model import Model
from cached.core import wire
from cached.core.errors import DaemonUnavailable, FrameError, Stale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from cached.client.connection import Connection, Reply
    from cached.client.model import Range

PATIENCE_WITH_FALLBACK_S = 1.0
RANGES_PER_REQUEST = 8192  # 64 bytes each: well below the longest request


def open(  # noqa: A001 - cached.open, as in gzip.open
    name: str,
    *,
    timeout_s: float | None = None,
    tensors: Sequence[str] | None = None,
    until: str = "header",
    fallback: str | None = None,
    socket: str | None = None,
) -> Model:
    """Return a model, leased: as soon as its headers are there, not when everything is.

    Args:
        name: as the daemon's configuration names it.
        timeout_s: of this call, and later of each wait for a tensor; within it a daemon that
            does not listen yet is waited for. ``None``: no limit, but the daemon must listen.
        tensors: names of those that are fetched before the rest; ``FILE::NAME`` where several
            files have one of that name.
        until: ``header``, or ``ready``: wait until all is there (with ``tensors``: those).
        fallback: ``"s3"``: if no daemon answers within a second, or half of ``timeout_s``, read
            the model from its URI into memory of this process alone, with one warning.
        socket: address of the daemon; ``None``: where docs/wire.md says.

    Raises:
        DaemonUnavailable: nobody answers, and there is no fallback.
        InvalidConfig: no socket can have the given address; or the environment holds a setting
            that nobody reads.
        ModelUnknown: no such model is configured; the text names those that are.
        OverBudget: it does not fit; the text has the numbers.
        LoadFailed: the store's answer made it impossible; the text says why.
        TimedOut: ``timeout_s`` ended.
        ProtocolMismatch: client and daemon are of different generations.
    """
    if fallback not in {None, "s3"}:
        message = f"fallback must be None or 's3', was {fallback!r}"
        raise ValueError(message)
    if isinstance(tensors, str):
        message = f"tensors must be a list of names, was {tensors!r}"
        raise ValueError(message)  # noqa: TRY004 - one type for all wrong arguments
    deadline = Deadline(timeout_s)
    patience = deadline
    if fallback is not None and timeout_s is not None:
        patience = Deadline(min(timeout_s / 2, PATIENCE_WITH_FALLBACK_S))
    try:
        address = settings.daemon_address(socket)
        connection = connect(address, patience, is_patient=patience.timeout_s is not None)
        return _lease(connection, {"model": name, "until": until}, tensors, deadline)
    except DaemonUnavailable as error:
        if fallback is None:
            raise
        from cached.client.fallback import read

        return read(name, why=error.message, deadline=deadline)


def _lease(
    connection: Connection,
    fields: dict[str, object],
    tensors: Sequence[str] | None,
    deadline: Deadline,
) -> Model:
    if tensors is not None:
        fields["tensors"] = list(tensors)
    lease = Lease(connection.close)
    try:
        what = f"{fields['model']} to be {'complete' if fields['until'] == 'ready' else 'opened'}"
        reply = connection.call("open", fields, deadline, what)
        source = DaemonSource(connection, lease, reply, deadline)
        return Model(
            name=str(fields["model"]),
            version=source.version,
            files=source.files,
            source=source,
            is_complete=bool(reply.body.get("complete")),
            path=cast("str | None", reply.body.get("path")),
            timeout_s=deadline.timeout_s,
        )
    finally:
        lease.release(None)  # from here on the model and its mappings hold the lease


class DaemonSource:
    """A model's bytes as the daemon serves them (``model.Source``).

    A child of fork asks over a connection of its own, with a lease of its own; the inherited
    socket is only kept open.

    Args:
        connection: that was asked.
        lease: that its ``close`` ends.
        reply: to ``open``; its descriptors are mapped and closed.
        deadline: for those of more files than fit a reply.
    """

    def __init__(
        self, connection: Connection, lease: Lease, reply: Reply, deadline: Deadline
    ) -> None:
        self.lease = lease
        self._connections = {connection.pid: connection}
        self._address = connection.address
        try:
            self.version = str(reply.body["version"])
            self._name = str(reply.body["name"])
            entries = cast("list[Mapping[str, Any]]", reply.body["files"])
            self.files = [
                File(each["path"], each["size"], each["header_bytes"]) for each in entries
            ]
        except (KeyError, TypeError) as error:
            close_all(reply.descriptors)
            message = "the daemon's answer to open is not as docs/wire.md has it"
            raise FrameError(message, hint="upgrade the older of daemon and client") from error
        came = self._map(0, reply.descriptors)
        self._map(came, self.descriptors(range(came, len(self.files)), deadline))

    def _map(self, start: int, descriptors: list[int]) -> int:
        """Map the files from ``start`` on; return where the next one is. Closes descriptors."""
        left = descriptors[::-1]
        try:
            for file in self.files[start : start + len(left)]:
                file.map(left.pop(), self.lease)
        finally:
            close_all(left)
        return start + len(descriptors)

    def _call(
        self, op: str, fields: dict[str, object], deadline: Deadline, what: str = ""
    ) -> Reply:
        """Ask over this process's connection, and hold the lease meanwhile."""
        holding = self.lease.hold()
        try:
            return self._connection(deadline).call(op, fields, deadline, what)
        finally:
            self.lease.release(holding)

    def _connection(self, deadline: Deadline) -> Connection:
        pid = os.getpid()
        connection = self._connections.get(pid)
        if connection is not None:
            return connection
        made = connect(self._address, deadline)
        try:
            self._lease_again(made, deadline)
        except BaseException:
            made.close()
            raise
        connection = self._connections.setdefault(pid, made)
        if connection is made:
            self.lease.add(made.close)
        else:
            made.close()  # another thread was first
        return connection

    def _lease_again(self, connection: Connection, deadline: Deadline) -> None:
        reply = connection.call("open", {"model": self._name}, deadline, f"{self._name} in a fork")
        close_all(reply.descriptors)
        if reply.body["version"] != self.version:
            message = f"{self._name} is {reply.body['version']} now, was {self.version} at the fork"
            raise Stale(message, hint="open the model again in the child")

    def wait(self, ranges: Sequence[Range], deadline: Deadline, what: str) -> bool:
        """Wait for byte ranges; return whether the whole version is there."""
        is_all = False
        for start in range(0, len(ranges), RANGES_PER_REQUEST):
            batch: dict[str, object] = {"ranges": ranges[start : start + RANGES_PER_REQUEST]}
            is_all = bool(self._call("wait", batch, deadline, what).body.get("complete"))
        return is_all

    def path(self, deadline: Deadline) -> str:
        """Wait for the whole version; return its directory."""
        what = f"all of {self._name}"
        return str(self._call("wait", {"ranges": "all"}, deadline, what).body["path"])

    def arrivals(self, seen_bytes: int, deadline: Deadline) -> tuple[int, list[Range], bool]:
        """Wait for more than ``seen_bytes``; return how many and which are there, and if all."""
        what = f"more of {self._name}"
        body = self._call("arrivals", {"seen": seen_bytes}, deadline, what).body
        ranges = cast("list[list[int]]", body["ranges"])
        there = [(index, start, stop) for index, start, stop in ranges]
        return cast("int", body["seen"]), there, bool(body["complete"])

    def descriptors(self, files: Sequence[int], deadline: Deadline) -> list[int]:
        """Return new read-only descriptors of files; the caller closes them."""
        found: list[int] = []
        try:
            while len(found) < len(files):
                wanted = list(files[len(found) : len(found) + wire.MAX_DESCRIPTORS])
                came = self._call("descriptors", {"files": wanted}, deadline).descriptors
                found += came
                if len(came) != len(wanted):
                    message = f"{len(came)} descriptors came, {len(wanted)} were asked for"
                    raise FrameError(message)  # noqa: TRY301 - what came is closed below
        except BaseException:
            close_all(found)
            raise
        return found

    def is_stale(self, deadline: Deadline) -> bool:
        """Return whether a newer version is current."""
        return bool(self._call("check", {}, deadline).body["stale"])
