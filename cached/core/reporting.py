"""What the daemon tells of itself: the body of a ``status`` reply (docs/wire.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cached.core.checksums import summary

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cached.core.loads import Load, Model
    from cached.core.shelf import Shelf


class About(NamedTuple):
    """What does not change while the daemon lives.

    Attributes:
        version: of the distribution.
        pid: its process.
        owner_uid: who may prefetch and evict, beside root.
        socket: its address.
        began_s: monotonic.
    """

    version: str
    pid: int
    owner_uid: int
    socket: str
    began_s: float


def status(shelf: Shelf, about: About, models: Iterable[Model], now_s: float) -> dict[str, object]:
    """Return the status of these models and of the memory, as JSON members."""
    ledger = shelf.ledger
    return {
        "daemon": about.version,
        "pid": about.pid,
        "uptime_s": round(now_s - about.began_s, 3),
        "socket": about.socket,
        "memory": {
            "budget_bytes": ledger.budget_bytes,
            "reserved_bytes": ledger.reserved_bytes,
            "committed_bytes": ledger.committed_bytes,
            "leased_bytes": shelf.leased_bytes,
            "free_bytes": ledger.free_bytes,
        },
        "models": [_model(shelf, model) for model in models],
    }


def _model(shelf: Shelf, model: Model) -> dict[str, object]:
    load = model.offered
    manifest = load.manifest if load else model.pending
    versions = _versions(shelf, model)
    return {
        "name": model.ref.name,
        "uri": model.ref.uri,
        "state": _state(shelf, model),
        "version": manifest.version if manifest else None,
        "size_bytes": manifest.size_bytes if manifest else None,
        "committed_bytes": sum(shelf.ledger.committed_of(each.of) for each in versions),
        "files": len(manifest.objects) if manifest else None,
        "headers": load.has_headers if load else False,
        "leases": len(load.holders) if load else 0,
        "opens": model.opens,
        "path": load.path if load else None,
        "pinned": model.ref.pinned,
        "load_s": _load_s(load),
        "error": str(model.error) if model.error else None,
        "confirmed": model.is_confirmed or not (load and load.is_adopted),
        "passed_over": list(model.passed_over),
        "refreshing": model.current is not None and model.state not in {"idle", "failed"},
        "waits_for_room": model.state == "admitting" and model.is_refusal_told,
        "verified": summary(load.integrity.checked_by) if load and load.is_complete else None,
        "versions": [_version(shelf, model, each) for each in versions],
    }


def _load_s(load: Load | None) -> float | None:
    """Return how long this daemon took to load a version; None if an earlier one left it."""
    is_loaded = load is not None and load.is_complete and not load.is_adopted
    return round(load.load_s, 6) if load is not None and is_loaded else None


def _state(shelf: Shelf, model: Model) -> str:
    if model.current is not None:
        return "resident"
    if model.state != "idle":
        return model.state
    is_freeing = any(True for _ in _versions(shelf, model))
    return "freeing" if is_freeing else "absent"


def _versions(shelf: Shelf, model: Model) -> list[Load]:
    retired = [load for load in shelf.retired.values() if load.of.name == model.ref.name]
    return [*model.loads(), *retired]


def _version(shelf: Shelf, model: Model, load: Load) -> dict[str, object]:
    if load is model.current:
        state = "current"
    elif load is model.coming or load in model.left:
        state = "loading"
    else:
        state = "kept" if load in model.kept and not load.frees else "leaving"
    return {
        "version": load.of.version,
        "state": state,
        "leases": len(load.holders),
        "size_bytes": load.manifest.size_bytes,
        "committed_bytes": shelf.committed_of(load),
        "path": load.path,
    }
