"""What a ``status`` reply says, as values of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.adapters.metrics.rows import ROWS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Values = dict[tuple[str, ...], float]
    """By the values of the labels, in the order of the row."""

# Of a model, and of one of its versions: docs/wire.md.
STATES = (
    "absent",
    "resolving",
    "admitting",
    "loading",
    "publishing",
    "resident",
    "freeing",
    "failed",
)
VERSION_STATES = ("current", "loading", "kept", "leaving")


def status_values(status: Mapping[str, object], models: Iterable[str]) -> dict[str, Values]:
    """Return the values of the rows that the status reply holds, by name of the row."""
    values: dict[str, Values] = {row.name: {} for row in ROWS}

    def put(name: str, value: object, *labels: str) -> None:
        if isinstance(value, int | float):
            values[name][labels] = value

    put("cached_uptime_seconds", status.get("uptime_s"))
    put("cached_ready", status.get("ready"))
    memory, listed = status.get("memory"), status.get("models")
    for key, value in memory.items() if isinstance(memory, dict) else ():
        if (name := f"cached_memory_{key}") in values:
            put(name, value)
    gets = status.get("gets")
    put("cached_window_gets", gets.get("window") if isinstance(gets, dict) else None)
    for model in listed if isinstance(listed, list) else ():
        name, state = model["name"], model["state"]
        if name not in models:
            continue
        put("cached_model_bytes", model["committed_bytes"], name, state)
        put("cached_model_size_bytes", model["size_bytes"], name)
        put("cached_model_leases", model["leases"], name)
        put("cached_model_opens_total", model["opens"], name)
        for each in STATES:
            put("cached_model_state", each == state, name, each)
        put("cached_model_confirmed", model.get("confirmed"), name)
        versions = [version["state"] for version in model.get("versions", ())]
        for each in VERSION_STATES:
            put("cached_versions", versions.count(each), name, each)
    put("cached_leases", sum(values["cached_model_leases"].values()))
    return values
