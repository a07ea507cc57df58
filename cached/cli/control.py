"""The commands that talk to a running daemon: prefetch, status, wait, path, evict."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, cast

from cached.adapters.clock import SystemClock
from cached.cli.arguments import Parser, add_socket, add_timeout
from cached.cli.main import FAILED, OK, complain
from cached.cli.progress import Progress, Sample
from cached.cli.table import named, status_table
from cached.cli.terminal import CLEAR_BELOW, CLEAR_LINE, HOME, say, terminal_of
from cached.client import settings
from cached.client.connection import connect
from cached.client.deadline import Deadline
from cached.core.errors import CachedError, DaemonUnavailable, LoadFailed, TimedOut
from cached.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from cached.client.connection import Connection

POLL_S = 0.1  # a bar that is drawn ten times a second moves smoothly
WATCH_S = 1.0
ANSWER_S = 10.0  # for what a daemon answers at once: one that does not is stuck


def parser(name: str) -> Parser:
    """Return the parser of one of the commands of this module."""
    made = _PARSERS[name](name)
    add_socket(made)
    return made


def model_names(address: str | None = None) -> list[str]:
    """Return the names of the models that the daemon knows.

    Raises:
        DaemonUnavailable: no daemon answers.
    """
    with _Daemon(address) as daemon:
        return [str(model["name"]) for model in daemon.models([])]


class _Daemon:
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

    def __enter__(self) -> _Daemon:
        try:
            self._connection.greeted(Deadline(ANSWER_S))
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def ask(self, op: str, **fields: object) -> dict[str, Any]:
        """Return the reply to a request that is answered at once, without its id.

        Raises:
            DaemonUnavailable: there is none; also when the daemon is stuck.
        """
        try:
            return self._call(op, fields, Deadline(ANSWER_S))
        except TimedOut as error:
            message = f"the daemon has not answered for {format_seconds(ANSWER_S)}"
            hint = "it may be stopped or stuck: look at its log"
            raise DaemonUnavailable(message, hint=hint) from error

    def lease(self, name: str, until: str) -> dict[str, Any]:
        """Load a model if it is absent, and return the reply to ``open`` once it is there.

        Raises:
            TimedOut: it was not in time.
        """
        try:
            return self._call("open", {"model": name, "until": until}, self.deadline)
        except TimedOut as error:
            raise self.late(name) from error

    def late(self, names: str) -> TimedOut:
        """Return the error for models that are not there in time."""
        message = f"{names}: not there after {format_seconds(self._timeout_s or 0)}"
        return TimedOut(message, hint="the load goes on, see cached status; or give more time")

    def _call(self, op: str, fields: dict[str, object], deadline: Deadline) -> dict[str, Any]:
        reply = self._connection.call(op, fields, deadline)
        for descriptor in reply.descriptors:
            os.close(descriptor)
        return {key: value for key, value in reply.body.items() if key not in {"id", "fds"}}

    def status(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the status reply, with these models only; all if none is named."""
        if not names:
            return self.ask("status")
        replies = [self.ask("status", model=name) for name in names]
        return {**replies[0], "models": [reply["models"][0] for reply in replies]}

    def models(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the models' part of the status reply."""
        return cast("list[dict[str, Any]]", self.status(names)["models"])


# --- prefetch


def _prefetch_parser(name: str) -> Parser:
    made = Parser(
        name,
        "Load models into memory, and show how far they are until they are there.",
        ("cached prefetch llm", "cached prefetch llm clip --no-wait"),
    )
    made.add_argument("names", nargs="+", metavar="NAME", help="a configured model")
    made.add_argument("--no-wait", action="store_true", help="begin the loads and return")
    made.add_argument("--json", action="store_true", help="print the models' status at the end")
    add_timeout(made)
    made.set_defaults(run=_prefetch)
    return made


def _prefetch(options: argparse.Namespace) -> int:
    names = list(dict.fromkeys(options.names))
    with _Daemon(options.socket, options.timeout_s) as daemon:
        models = daemon.models(names)  # an unknown name is refused before any load begins
        for name in names:
            daemon.ask("prefetch", model=name)
        if not options.no_wait:
            models = _follow(daemon, names)
        elif options.json:
            models = daemon.models(names)
    if options.json:
        say(json.dumps(models, indent=2) + "\n")
    if options.no_wait:
        return OK
    lost = [model for model in models if model["state"] != "resident"]
    for model in lost:
        why = model["error"] or "it was evicted before it was complete; prefetch it again"
        complain(named(model["name"], why))
    return FAILED if lost else OK


def _follow(daemon: _Daemon, names: Sequence[str]) -> list[dict[str, Any]]:
    """Show progress on stderr until nothing more will come; return the last status."""
    clock = SystemClock()
    progress = Progress(sys.stderr, terminal_of(sys.stderr))
    while True:
        models = daemon.models(names)
        samples = [_sample(model) for model in models]
        progress.show(samples, clock.now_s())
        if all(sample.is_over for sample in samples):
            return models
        if daemon.deadline.has_passed:
            raise daemon.late(", ".join(each.name for each in samples if not each.is_over))
        daemon.deadline.sleep(POLL_S)


def _sample(model: dict[str, Any]) -> Sample:
    return Sample(
        name=model["name"],
        state=model["state"],
        done_bytes=model["committed_bytes"],
        size_bytes=model["size_bytes"] or 0,
        load_s=model["load_s"],
    )


# --- status


def _status_parser(name: str) -> Parser:
    made = Parser(
        name,
        "Show the models and the memory of the daemon.",
        ("cached status", "cached status llm --json", "cached status --watch"),
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="a configured model (default: all)")
    made.add_argument("--json", action="store_true", help="print the daemon's reply as it is")
    made.add_argument("--watch", action="store_true", help="once a second, until Ctrl-C")
    made.set_defaults(run=_status)
    return made


def _status(options: argparse.Namespace) -> int:
    with _Daemon(options.socket) as daemon:
        _show_status(daemon, options)
        while options.watch:
            daemon.deadline.sleep(WATCH_S)
            _show_status(daemon, options)
    return OK


def _show_status(daemon: _Daemon, options: argparse.Namespace) -> None:
    reply = daemon.status(options.names)
    if options.json:
        say(json.dumps(reply, indent=None if options.watch else 2) + "\n")
        return
    terminal = terminal_of(sys.stdout)
    table = status_table(reply, terminal)
    if options.watch and terminal.is_terminal:  # drawn over the last one, without a flicker
        table = HOME + table.replace("\n", f"{CLEAR_LINE}\n") + CLEAR_BELOW
    elif options.watch:
        table += "\n"
    say(table)


# --- wait and path


def _wait_parser(name: str) -> Parser:
    made = Parser(
        name,
        "Wait until a model can be used; load it if it is absent.",
        ("cached wait llm", "cached wait llm --until header --timeout 30s"),
    )
    made.add_argument("name", metavar="NAME", help="a configured model")
    made.add_argument(
        "--until",
        choices=("header", "ready"),
        default="ready",
        help="header: tensors can be asked for; ready: everything is there (default)",
    )
    add_timeout(made)
    made.set_defaults(run=_wait)
    return made


def _wait(options: argparse.Namespace) -> int:
    with _Daemon(options.socket, options.timeout_s) as daemon:
        daemon.lease(options.name, options.until)
    return OK


def _path_parser(name: str) -> Parser:
    made = Parser(
        name,
        "Print a model's directory; wait until everything is there.\n"
        "The directory stays as long as the daemon keeps the model: `cached.open` holds a lease\n"
        "that keeps it, this command does not once it has ended.",
        ("cached path llm", 'python serve.py --model "$(cached path llm --timeout 2m)"'),
    )
    made.add_argument("name", metavar="NAME", help="a configured model")
    add_timeout(made)
    made.set_defaults(run=_path)
    return made


def _path(options: argparse.Namespace) -> int:
    with _Daemon(options.socket, options.timeout_s) as daemon:
        reply = daemon.lease(options.name, "ready")
    path = reply.get("path")
    if not path:
        message = f"{options.name} has no directory: the daemon keeps it in sealed memory"
        raise LoadFailed(message, hint="open it with cached.open")
    say(f"{path}\n")
    return OK


# --- evict


def _evict_parser(name: str) -> Parser:
    made = Parser(
        name,
        "Take models out of memory; one that a worker holds stays, and the command fails.",
        ("cached evict llm", "cached evict llm clip"),
    )
    made.add_argument("names", nargs="+", metavar="NAME", help="a configured model")
    made.set_defaults(run=_evict)
    return made


def _evict(options: argparse.Namespace) -> int:
    code = OK
    with _Daemon(options.socket) as daemon:
        for name in options.names:
            try:
                freed_bytes = daemon.ask("evict", model=name)["freed_bytes"]
            except DaemonUnavailable:
                raise
            except CachedError as error:  # the others are asked for all the same
                complain(str(error))
                code = FAILED
            else:
                say(f"{name}: {_evicted(freed_bytes)}\n")
    return code


def _evicted(freed_bytes: int) -> str:
    if not freed_bytes:
        return "nothing of it was in memory"
    return f"evicted, freeing {format_bytes(freed_bytes)}"  # the state that status shows next


_PARSERS: dict[str, Callable[[str], Parser]] = {
    "prefetch": _prefetch_parser,
    "status": _status_parser,
    "wait": _wait_parser,
    "path": _path_parser,
    "evict": _evict_parser,
}
