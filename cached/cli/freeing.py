"""The commands that give memory back: evict, purge."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from cached.adapters.segments import DirectorySegments
from cached.cli.arguments import Parser, add_socket
from cached.cli.asking import Asking
from cached.cli.load import segment_root
from cached.cli.main import FAILED, OK, complain
from cached.cli.terminal import say
from cached.core.errors import CachedError, DaemonUnavailable, InvalidConfig
from cached.core.units import format_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

FREE_S = 60.0  # the kernel takes 0.13 s for the pages of 1 GiB
NOBODY = (FileNotFoundError, ConnectionRefusedError)  # no daemon is there


def parser(name: str) -> Parser:
    """Return the parser of one of the commands of this module."""
    made = _PARSERS[name](name)
    add_socket(made)
    return made


def _evict_parser(name: str) -> Parser:
    made = Parser(
        name,
        "Take models out of memory, and wait until the machine has it back. One that a worker\n"
        "holds stays, and the command fails.",
        ("cached evict llm", "cached evict llm clip"),
    )
    made.add_argument("names", nargs="+", metavar="NAME", help="a configured model")
    made.set_defaults(run=_evict)
    return made


def _evict(options: argparse.Namespace) -> int:
    code = OK
    with Asking(options.socket) as daemon:
        for name in options.names:
            try:
                freed_bytes = daemon.ask("evict", within_s=FREE_S, model=name)["freed_bytes"]
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
    return f"evicted, {format_bytes(freed_bytes)} freed"


# --- purge


def _purge_parser(name: str) -> Parser:
    made = Parser(
        name,
        "Take every model out of memory that nobody holds. Without a daemon on the socket: remove\n"
        "what a stopped one left in its segment root, which the next would go on with.",
        ("cached purge", "cached purge --segment-root /dev/shm/cached-1000"),
    )
    made.add_argument("--json", action="store_true", help="print freed_bytes and models")
    made.add_argument(
        "--segment-root",
        metavar="PATH",
        help="of the daemon that was stopped (CACHED_SEGMENT_ROOT; default: as for cached serve)",
    )
    made.set_defaults(run=_purge)
    return made


def _purge(options: argparse.Namespace) -> int:
    stayed = []
    try:
        with Asking(options.socket) as daemon:
            reply = daemon.ask("purge", within_s=FREE_S)
            if not options.json:
                stayed = [line for model in daemon.models([]) if (line := _stayed(model))]
    except DaemonUnavailable as error:
        if not isinstance(error.__cause__, NOBODY):
            raise
        root = segment_root(options.segment_root)
        if options.segment_root is not None and not os.path.lexists(root):
            message = f"segment root {root} is not there (from --segment-root)"
            hint = "it may be purged already, or has another name: see the daemon's log"
            raise InvalidConfig(message, hint=hint) from None
        reply = _remove_left(root)
        where = f"no daemon runs; in {root} "
    else:
        where = ""
    if options.json:
        say(json.dumps(reply, indent=2) + "\n")
    elif reply["models"]:
        freed = format_bytes(reply["freed_bytes"])
        say(f"{where}purged {', '.join(reply['models'])}: {freed} freed\n")
    else:
        say(f"{where}nothing was {'freed' if stayed else 'there that could be freed'}\n")
    if stayed:
        say("".join(f"{line}\n" for line in stayed))
    return OK


def _stayed(model: dict[str, Any]) -> str:
    """Return why a model is in memory after a purge, by its status; empty if it is not."""
    versions = [each for each in model.get("versions", ()) if each["state"] in {"current", "kept"}]
    if not versions:
        return ""
    count = sum(each["leases"] for each in versions)
    if count:
        return f"{model['name']} stays: leased by {count} worker{'s' if count > 1 else ''}"
    return f"{model['name']} stays: mapped by a process that holds no lease"


def _remove_left(root: str) -> dict[str, Any]:
    """Remove what a daemon left that does not run any more; return a reply as that of ``purge``.

    Raises:
        InvalidConfig: a daemon runs that owns it, or it is not this user's.
    """
    if not os.path.isdir(root):
        return {"freed_bytes": 0, "models": []}
    segments = DirectorySegments(root, dir_mode=os.stat(root).st_mode & 0o777)
    left = segments.found()
    segments.purge()
    names = sorted({each.of.name for each in left})
    return {"freed_bytes": sum(each.size_bytes for each in left), "models": names}


_PARSERS: dict[str, Callable[[str], Parser]] = {
    "evict": _evict_parser,
    "purge": _purge_parser,
}
