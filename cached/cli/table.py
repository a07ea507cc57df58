"""The daemon's reply to ``status``, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.errors import printable
from cached.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from cached.cli.terminal import Terminal

HEAD = ("NAME", "STATE", "SIZE", "DONE", "LEASES", "VERSION", "PATH")
RIGHT = {"SIZE", "DONE", "LEASES"}  # numbers stand at the right of their column
STATE = HEAD.index("STATE")


def status_table(reply: Mapping[str, Any], terminal: Terminal) -> str:
    """Return the daemon's line, its memory's line, one line for each model, and what went wrong.

    Args:
        reply: the whole reply to ``status``; members that are not there are left out.
        terminal: what can be shown.
    """
    models = reply.get("models", ())
    lines = [
        _daemon(reply),
        _memory(reply),
        "",
        *_aligned([row for model in models for row in _rows(model)], terminal),
    ]
    errors = [
        printable(named(model["name"], model["error"])) for model in models if model.get("error")
    ]
    lines += ["", *errors] if errors else []
    return "".join(f"{line}\n" for line in lines)


def named(name: str, why: str) -> str:
    """Return what is wrong with a model, behind its name unless the text names it."""
    return why if why.startswith((f"cannot load {name}:", f"{name} needs ")) else f"{name}: {why}"


def done_bytes(told: Mapping[str, Any]) -> int:
    """Return how much is there of a version, or of the one that a model shows.

    Its last page may be some more, and the model may have other versions in memory.
    """
    shown = [
        each
        for each in told.get("versions", ())
        if each["version"] == told["version"] and each["state"] != "leaving"
    ]
    there_bytes: int = (shown or [told])[0].get("committed_bytes", 0)
    return min(there_bytes, told.get("size_bytes") or 0)


def _daemon(reply: Mapping[str, Any]) -> str:
    ready = "ready" if reply.get("ready") else "not ready"
    uptime = format_seconds(round(reply.get("uptime_s", 0)))
    process = f"daemon {reply.get('daemon')}, pid {reply.get('pid')}, up {uptime}"
    return f"{process}, {ready}, on {reply.get('socket')}"


def _memory(reply: Mapping[str, Any]) -> str:
    memory = reply.get("memory", {})
    budget, reserved, committed, leased, free = (
        memory.get(f"{name}_bytes", 0)
        for name in ("budget", "reserved", "committed", "leased", "free")
    )
    used = f"{format_bytes(reserved + committed)} of {format_bytes(budget)} used"
    return f"memory: {used}, {format_bytes(leased)} leased, {format_bytes(free)} free"


def _rows(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the row of a model, and one for each version in memory beside the one it shows."""
    size_bytes = model.get("size_bytes")
    done = f"{done_bytes(model) / size_bytes:.0%}" if size_bytes else "-"
    name = model["name"] + (" (pinned)" if model.get("pinned") else "")
    version = model.get("version") or "-"
    if version != "-" and model.get("confirmed") is False:
        version += " (unconfirmed)"
    if version != "-" and model.get("passed_over"):
        version += " (went back)"
    first = (
        name,
        model["state"],
        "-" if size_bytes is None else format_bytes(size_bytes),
        "100%" if model["state"] == "resident" else done,
        str(model.get("leases", 0)),
        version,
        model.get("path") or "-",
    )
    others = [each for each in model.get("versions", ()) if each["version"] != model.get("version")]
    return [first, *map(_other, others)]


def _other(version: Mapping[str, Any]) -> tuple[str, ...]:
    size_bytes = version.get("size_bytes")
    return (
        "",
        version["state"],
        "-" if size_bytes is None else format_bytes(size_bytes),
        "-",
        str(version.get("leases", 0)),
        version["version"],
        version.get("path") or "-",
    )


def _aligned(rows: Sequence[tuple[str, ...]], terminal: Terminal) -> list[str]:
    widths = [max(len(row[column]) for row in (HEAD, *rows)) for column in range(len(HEAD))]
    lines = []
    for row in (HEAD, *rows):
        cells = [_cell(column, row[column], widths[column]) for column in range(len(HEAD))]
        if row is not HEAD:
            cells[STATE] = cells[STATE].replace(row[STATE], terminal.state(row[STATE]), 1)
        lines.append("  ".join(cells).rstrip())
    return lines


def _cell(column: int, text: str, width: int) -> str:
    return text.rjust(width) if HEAD[column] in RIGHT else text.ljust(width)
