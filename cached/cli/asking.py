"""A command's connection to the daemon."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Any, Final, cast

from cached.client import settings
from cached.client.deadline import Deadline
from cached.client.dialing import connect
from cached.client.mappings import close_all
from cached.core.errors import DaemonUnavailable, TimedOut, VersionUnknown
from cached.core.units import format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cached.client.connection import Connection

KEPT_FD: Final = (
    10  # a shell's script may name 0 to 9 for itself: POSIX, Shell Command Language, 2.7
)
ANSWER_S = 10.0  # for what a daemon answers at once: one that does not is stuck


def model_names(address: str | None = None) -> list[str]:
    """Return the names of the models that the daemon knows.

    Raises:
        DaemonUnavailable: no daemon answers.
    """
    with Asking(address) as daemon:
        return [str(model["name"]) for model in daemon.models([])]


class Asking:
    """A connection to the daemon, for one command; closed at the end of the ``with`` block.

    Args:
        address: of its socket; ``None``: where docs/wire.md says.
        timeout_s: of what is waited for, a daemon that does not listen yet included; ``None``: no
            limit, but the daemon must listen.
    """

    def __init__(self, address: str | None, timeout_s: float | None = None) -> None:
        self.deadline = Deadline(timeout_s)
        self._timeout_s = timeout_s
        checked = settings.daemon_address(address, "--socket")
        is_patient = timeout_s is not None  # the rule of cached.open
        self._connection: Connection = connect(checked, self.deadline, is_patient=is_patient)
        self._kept: list[int] = []

    def __enter__(self) -> Asking:
        try:
            self._connection.greeted(Deadline(ANSWER_S))
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        close_all(self._kept)
        self._connection.close()

    def ask(self, op: str, *, within_s: float | None = None, **fields: object) -> dict[str, Any]:
        """Return the reply to a request that is answered soon, without its id.

        Args:
            op: the operation.
            within_s: how soon; ``None``: at once.
            fields: its members; those that are ``None`` are left out.

        Raises:
            DaemonUnavailable: there is none; also when the daemon is stuck.
        """
        most_s = ANSWER_S if within_s is None else within_s
        given = {key: value for key, value in fields.items() if value is not None}
        try:
            return self._call(op, given, Deadline(most_s))
        except TimedOut as error:
            message = f"the daemon has not answered for {format_seconds(most_s)}"
            hint = "it may be stopped or stuck: look at its log"
            raise DaemonUnavailable(message, hint=hint) from error

    def lease(self, name: str, until: str, version: str | None = None) -> dict[str, Any]:
        """Load a model if it is absent, and return the reply to ``open`` once it is there.

        Args:
            name: of the model.
            until: ``header`` or ``ready``.
            version: that it must be; ``None``: the current one.

        Raises:
            TimedOut: it was not in time.
            VersionUnknown: that version is not to be had.
        """
        fields = {"model": name, "until": until}
        if version is not None:
            fields["version"] = version
        try:
            reply = self._call("open", fields, self.deadline)
        except TimedOut as error:
            raise self.late(name) from error
        if version not in {None, reply.get("version")}:  # of a daemon that knows no versions
            message = f"{name} is {reply['version']} here, not {version}"
            raise VersionUnknown(message, hint="leave --version out, or upgrade the daemon")
        return reply

    def late(self, names: str) -> TimedOut:
        """Return the error for models that are not there in time."""
        message = f"{names}: not there after {format_seconds(self._timeout_s or 0)}"
        return TimedOut(message, hint="the load goes on, see cached status; or give more time")

    def _call(self, op: str, fields: Mapping[str, object], deadline: Deadline) -> dict[str, Any]:
        reply = self._connection.call(op, fields, deadline)
        for descriptor in reply.descriptors:
            os.close(descriptor)
        return {key: value for key, value in reply.body.items() if key not in {"id", "fds"}}

    def keep_over_exec(self) -> None:
        """Let the program that this process becomes, and its children, hold the lease."""
        kept = fcntl.fcntl(self._connection.socket, fcntl.F_DUPFD, KEPT_FD)  # survives exec
        self._kept.append(kept)

    def status(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the status reply, with these models only; all if none is named."""
        if not names:
            return self.ask("status")
        replies = [self.ask("status", model=name) for name in names]
        return {**replies[0], "models": [reply["models"][0] for reply in replies]}

    def models(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the models' part of the status reply."""
        return cast("list[dict[str, Any]]", self.status(names)["models"])
