"""``cached.open``: a lease from the daemon, or from the store itself if that is allowed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from cached.client import settings
from cached.client.connection import Connection, connect
from cached.client.deadline import Deadline
from cached.client.mappings import File, Lease
from cached.client.model import Model, close_all
from cached.core.errors import DaemonUnavailable, Stale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cached.client.connection import Reply


def open(  # noqa: A001, PLR0913 - cached.open, as in gzip.open
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
        tensors: names of those that are fetched before the rest.
        until: ``header``, or ``ready``: wait until all is there (with ``tensors``: those).
        fallback: ``"s3"``: if no daemon answers, read the model from its URI into memory of
            this process alone, with one warning.
        socket: address of the daemon; ``None``: where docs/wire.md says.

    Raises:
        DaemonUnavailable: nobody answers, and there is no fallback.
        ModelUnknown: no such model is configured; the text names those that are.
        OverBudget: it does not fit; the text has the numbers.
        LoadFailed: the store's answer made it impossible; the text says why.
        TimedOut: ``timeout_s`` ended.
        ProtocolMismatch: client and daemon are of different generations.
    """
    if fallback not in {None, "s3"}:
        message = f"fallback must be None or 's3', was {fallback!r}"
        raise ValueError(message)
    deadline = Deadline(timeout_s)
    try:
        return _lease(name, tensors, until, deadline, timeout_s, socket)
    except DaemonUnavailable as error:
        if fallback is None:
            raise
        from cached.client.fallback import read

        return read(name, why=str(error), timeout_s=timeout_s)


def _lease(  # noqa: PLR0913, PLR0917 - open's arguments, passed on
    name: str,
    tensors: Sequence[str] | None,
    until: str,
    deadline: Deadline,
    timeout_s: float | None,
    address: str | None,
) -> Model:
    if address is None:
        address = settings.socket_address()
        settings.check_owner(address)
    fields: dict[str, object] = {"model": name, "until": until}
    if tensors is not None:
        fields["tensors"] = list(tensors)
    connection = connect(address, deadline, is_patient=timeout_s is not None)
    lease = Lease(connection.close)
    try:
        reply = connection.call("open", fields, deadline)
        source = DaemonSource(connection, lease, reply, address)
        model = Model(
            name=name,
            version=source.version,
            files=source.files,
            source=source,
            is_complete=bool(reply.body.get("complete")),
            path=cast("str | None", reply.body.get("path")),
            timeout_s=timeout_s,
        )
    finally:
        lease.release()  # from here on the model and its mappings hold the lease
    return model


class DaemonSource:
    """A model's bytes as the daemon serves them (``model.Source``).

    A child of fork asks over a connection of its own, with a lease of its own; the inherited
    socket is only kept open.
    """

    def __init__(self, connection: Connection, lease: Lease, reply: Reply, address: str) -> None:
        self.lease = lease
        self.version = str(reply.body["version"])
        self._name = str(reply.body["name"])
        self._address = address
        self._connections = {connection.pid: connection}
        entries = cast("list[dict[str, object]]", reply.body["files"])
        self.files = [
            File(
                str(entry["path"]),
                cast("int", entry["size"]),
                cast("int | None", entry["header_bytes"]),
            )
            for entry in entries
        ]
        self._map(reply.descriptors)

    def _map(self, descriptors: list[int]) -> None:
        mapped = 0
        while mapped < len(self.files):
            if not descriptors:
                wanted = range(mapped, min(mapped + 128, len(self.files)))
                descriptors = self.descriptors(list(wanted))
            while descriptors:
                self.files[mapped].map(descriptors.pop(0), self.lease)
                mapped += 1

    def _connection(self, deadline: Deadline) -> Connection:
        pid = os.getpid()
        connection = self._connections.get(pid)
        if connection is not None:
            return connection
        made = connect(self._address, deadline)
        reply = made.call("open", {"model": self._name}, deadline)
        close_all(reply.descriptors)
        if reply.body["version"] != self.version:
            made.close()
            message = f"{self._name} is {reply.body['version']} now, was {self.version} at the fork"
            raise Stale(message, hint="open the model again in the child")
        connection = self._connections.setdefault(pid, made)
        if connection is made:
            self.lease.add(made.close)
        else:
            made.close()  # another thread was first
        return connection

    def wait(self, ranges: Sequence[tuple[int, int, int]], deadline: Deadline) -> bool:
        """Wait for byte ranges; return whether the whole version is there."""
        fields: dict[str, object] = {"ranges": [list(wanted) for wanted in ranges]}
        reply = self._connection(deadline).call("wait", fields, deadline)
        return bool(reply.body.get("complete"))

    def path(self, deadline: Deadline) -> str:
        """Wait for the whole version; return its directory."""
        reply = self._connection(deadline).call("wait", {"ranges": "all"}, deadline)
        return str(reply.body["path"])

    def arrivals(self, seen_bytes: int) -> tuple[int, list[tuple[int, int, int]], bool]:
        """Wait for more than ``seen_bytes``; return how many and which are there, and if all."""
        deadline = Deadline(None)
        body = self._connection(deadline).call("arrivals", {"seen": seen_bytes}, deadline).body
        ranges = cast("list[list[int]]", body["ranges"])
        there = [(index, start, stop) for index, start, stop in ranges]
        return cast("int", body["seen"]), there, bool(body["complete"])

    def descriptors(self, files: Sequence[int]) -> list[int]:
        """Return new read-only descriptors of files; the caller closes them."""
        deadline = Deadline(None)
        found: list[int] = []
        for start in range(0, len(files), 128):
            fields: dict[str, object] = {"files": list(files[start : start + 128])}
            found += self._connection(deadline).call("descriptors", fields, deadline).descriptors
        return found

    def is_stale(self) -> bool:
        """Return whether a newer version is current."""
        deadline = Deadline(None)
        return bool(self._connection(deadline).call("check", {}, deadline).body["stale"])
