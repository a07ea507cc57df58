"""The commands that load and show: prefetch, refresh, status."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from cached.adapters.clock import SystemClock
from cached.cli.arguments import Parser, add_socket, add_timeout
from cached.cli.asking import Asking
from cached.cli.main import FAILED, OK, complain
from cached.cli.progress import Progress, Sample
from cached.cli.table import done_bytes, named, status_table
from cached.cli.terminal import CLEAR_BELOW, CLEAR_LINE, HOME, say, terminal_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

POLL_S = 0.1  # a bar that is drawn ten times a second moves smoothly
WATCH_S = 1.0


def parser(name: str) -> Parser:
    """Return the parser of one of the commands of this module."""
    made = _PARSERS[name](name)
    add_socket(made)
    return made


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
    with Asking(options.socket, options.timeout_s) as daemon:
        models = daemon.models(names)  # an unknown name is refused before any load begins
        for name in names:
            daemon.ask("prefetch", model=name)
        if not options.no_wait:
            models = _follow(daemon, names, _sample)
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


def _follow(
    daemon: Asking, names: Sequence[str], sample: Callable[[dict[str, Any]], Sample]
) -> list[dict[str, Any]]:
    """Show progress on stderr until nothing more will come; return the last status."""
    clock = SystemClock()
    progress = Progress(sys.stderr, terminal_of(sys.stderr))
    while True:
        models = daemon.models(names)
        samples = [sample(model) for model in models]
        progress.show(samples, clock.now_s())
        if all(each.is_over for each in samples):
            return models
        if daemon.deadline.has_passed:
            raise daemon.late(", ".join(each.name for each in samples if not each.is_over))
        daemon.deadline.sleep(POLL_S)


def _sample(model: dict[str, Any]) -> Sample:
    return Sample(
        name=model["name"],
        state=model["state"],
        done_bytes=done_bytes(model),
        size_bytes=model["size_bytes"] or 0,
        load_s=model["load_s"],
    )


# --- refresh


def _refresh_parser(name: str) -> Parser:
    made = Parser(
        name,
        "Ask the store whether it has another version of a model; if so, load it beside the one\n"
        "that is current, and switch to it. Workers keep what they hold.",
        (
            "cached refresh llm",
            "cached refresh llm --version 9f2c41d0a7b3e586    # back",
        ),
    )
    made.add_argument("name", metavar="NAME", help="a configured model")
    made.add_argument(
        "--version", metavar="V", help="make this version current, which is in memory: at once"
    )
    made.add_argument("--no-wait", action="store_true", help="ask the store and return")
    made.add_argument("--json", action="store_true", help="print the model's status at the end")
    add_timeout(made)
    made.set_defaults(run=_refresh)
    return made


def _refresh(options: argparse.Namespace) -> int:
    name = options.name
    with Asking(options.socket, options.timeout_s) as daemon:
        (model,) = daemon.models([name])
        before, there = model["version"], _complete(model)
        daemon.ask("refresh", model=name, version=options.version)
        if options.no_wait:
            (model,) = daemon.models([name])
        else:
            (model,) = _follow(daemon, [name], partial(_refreshed_sample, options.version, there))
    if options.json:
        say(json.dumps(model, indent=2) + "\n")
    if options.no_wait:
        return OK
    # who asked for the version that is current is not told why an earlier refresh failed
    has_failed = model["error"] and model["version"] == before != options.version
    if model["state"] != "resident" or has_failed:
        complain(named(name, model["error"] or "it was evicted meanwhile; refresh it again"))
        return FAILED
    if not options.json:
        was = "as before" if model["version"] == before else f"was {before or 'not there'}"
        say(f"{name}: {model['version']} is current, {was}\n")
    return OK


def _complete(model: dict[str, Any]) -> set[str]:
    """Return the versions that are in memory whole, by the status of a model."""
    return {each["version"] for each in model.get("versions", ()) if each.get("path")}


def _refreshed_sample(wanted: str | None, there: set[str], model: dict[str, Any]) -> Sample:
    """Return how far the version is that comes beside the current one; else as for a prefetch.

    Args:
        wanted: the version to go back to: once it is current, nothing more is waited for.
        there: versions that were in memory before: how long they took to load is not told.
        model: its status.
    """
    if not model.get("refreshing") or (wanted is not None and model["version"] == wanted):
        sample = _sample(model)
        return sample._replace(load_s=None) if model["version"] in there else sample
    if model.get("waits_for_room"):  # until others give up what they hold: nobody knows how long
        return Sample(model["name"], "failed", done_bytes=0, size_bytes=0)
    versions: list[dict[str, Any]] = model["versions"]
    coming = next((each for each in versions if each["state"] == "loading"), {})
    return Sample(
        name=model["name"],
        state="loading" if coming else "resolving",
        done_bytes=done_bytes(coming),
        size_bytes=coming.get("size_bytes", 0),
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
    with Asking(options.socket) as daemon:
        _show_status(daemon, options)
        while options.watch:
            daemon.deadline.sleep(WATCH_S)
            _show_status(daemon, options)
    return OK


def _show_status(daemon: Asking, options: argparse.Namespace) -> None:
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


_PARSERS: dict[str, Callable[[str], Parser]] = {
    "prefetch": _prefetch_parser,
    "refresh": _refresh_parser,
    "status": _status_parser,
}
