"""``cached.open``: a lease from the daemon, or from the store itself if that is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from cached.client import settings
from cached.client.deadline import Deadline
from cached.client.dialing import connect
from cached.client.mappings import Lease
from cached.client.model import Model
from cached.client.source import DaemonSource
from cached.core import wire
from cached.core.errors import DaemonUnavailable, VersionUnknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cached.client.connection import Connection

PATIENCE_WITH_FALLBACK_S = 1.0
MAX_NAMES_BYTES = wire.MAX_REQUEST_BYTES * 3 // 4


def open(  # noqa: A001, PLR0913 - cached.open, as in gzip.open; by keywords
    name: str,
    *,
    version: str | None = None,
    timeout_s: float | None = None,
    tensors: Sequence[str] | None = None,
    until: str = "header",
    fallback: str | None = None,
    socket: str | None = None,
) -> Model:
    """Return a model, leased: as soon as its headers are there, not when everything is.

    Args:
        name: as the daemon's configuration names it.
        version: id of the version that it must be: one that is in memory, or what the store has.
            ``None``: the one that is current.
        timeout_s: of this call, and later of each wait for a tensor; within it a daemon that
            does not listen yet is waited for. ``None``: no limit, but the daemon must listen.
        tensors: names of those that are fetched before the rest; ``FILE::NAME`` where several
            files have one of that name. Of thousands, the first 1,024 (at most 96 KiB of names).
        until: ``header``, or ``ready``: wait until all is there (with ``tensors``: those).
        fallback: ``"s3"``: if no daemon answers within a second, or half of ``timeout_s``, read
            the model from its URI into memory of this process alone, with one warning.
        socket: address of the daemon; ``None``: where docs/wire.md says.

    Raises:
        DaemonUnavailable: nobody answers, and there is no fallback.
        InvalidConfig: no socket can have the given address; or the environment holds a setting
            that nobody reads.
        ModelUnknown: no such model is configured; the text names those that are.
        VersionUnknown: that version is not to be had; the text names those that are.
        OverBudget: it does not fit; the text has the numbers.
        LoadFailed: the store's answer made it impossible; the text says why.
        TimedOut: ``timeout_s`` ended.
        ProtocolMismatch: client and daemon are of different generations.
    """
    _check(tensors, fallback)
    deadline = Deadline(timeout_s)
    patience = deadline
    if fallback is not None and timeout_s is not None:
        patience = Deadline(min(timeout_s / 2, PATIENCE_WITH_FALLBACK_S))
    try:
        address = settings.daemon_address(socket)
        connection = connect(address, patience, is_patient=patience.timeout_s is not None)
        fields: dict[str, object] = {"model": name, "until": until}
        if tensors is None:
            return _lease(connection, fields, version, deadline)
        fields["tensors"] = first = _first(tensors)
        model = _lease(connection, fields, version, deadline)
    except DaemonUnavailable as error:
        if fallback is None:
            raise
        from cached.client.fallback import read

        return read(name, why=error.message, deadline=deadline, version=version)
    return _seen_to(model, tensors[len(first) :], until, deadline)


def _check(tensors: Sequence[str] | None, fallback: str | None) -> None:
    if fallback not in {None, "s3"}:
        message = f"fallback must be None or 's3', was {fallback!r}"
        raise ValueError(message)
    if isinstance(tensors, str):
        message = f"tensors must be a list of names, was {tensors!r}"
        raise ValueError(message)  # noqa: TRY004 - one type for all wrong arguments


def _first(tensors: Sequence[str]) -> list[str]:
    """Return as many of the names as one request may hold."""
    first = list(tensors[: wire.MAX_NAMES])
    while len(wire.encode({"tensors": first})) > MAX_NAMES_BYTES:
        first = first[: len(first) // 2]
    return first


def _seen_to(model: Model, tensors: Sequence[str], until: str, deadline: Deadline) -> Model:
    """Do what is asked for those tensors that the request did not name."""
    try:
        if until == "ready" and tensors:
            model.wait(tensors, timeout_s=deadline.left_s)
        for name in tensors:
            model.dtype(name)  # or it says that there is none
    except BaseException:
        model.close()
        raise
    return model


def _lease(
    connection: Connection,
    fields: dict[str, object],
    version: str | None,
    deadline: Deadline,
) -> Model:
    if version is not None:
        fields["version"] = version
    lease = Lease(connection.close)
    try:
        what = f"{fields['model']} to be {'complete' if fields['until'] == 'ready' else 'opened'}"
        reply = connection.call("open", fields, deadline, what)
        source = DaemonSource(connection, lease, reply, deadline)
        if version not in {None, source.version}:  # of a daemon that knows no versions
            source.drop()
            message = f"{fields['model']} is {source.version} here, not {version}"
            raise VersionUnknown(message, hint="leave version out, or upgrade the daemon")
        return Model(
            name=str(fields["model"]),
            version=source.version,
            source=source,
            is_complete=bool(reply.body.get("complete")),
            path=cast("str | None", reply.body.get("path")),
            timeout_s=deadline.timeout_s,
        )
    finally:
        lease.release(None)  # from here on the model and its mappings hold the lease
