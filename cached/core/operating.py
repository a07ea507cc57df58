"""What the operator asks: status, prefetch, evict, refresh, purge (docs/wire.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core import reporting, wire
from cached.core.errors import NotPermitted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cached.core.leaving import Leaving
    from cached.core.listing import Listing
    from cached.core.loading import Loading
    from cached.core.loads import Load, Model
    from cached.core.peers import Answer, Ask
    from cached.core.reporting import About
    from cached.core.shelf import Shelf

    Question = tuple[str, Ask]
    """Whose events may bring the answer (a model's, or those of all), and what looks for it."""

EVERY = ""
"""In place of a model's name: what waits for all of them."""


class Operating:
    """The operator's side of the engine.

    Args:
        shelf: models and loads.
        listing: to have the store asked.
        loading: to go back to a version.
        leaving: to have models leave.
        about: what ``status`` tells.
        gets: what ``status`` tells of the GETs under way.
    """

    def __init__(
        self,
        shelf: Shelf,
        listing: Listing,
        loading: Loading,
        leaving: Leaving,
        about: About,
        gets: Callable[[], dict[str, object]],
    ) -> None:
        self._shelf = shelf
        self._listing = listing
        self._loading = loading
        self._leaving = leaving
        self._about = about
        self._gets = gets
        self._operations: dict[str, Callable[[Mapping[str, object], float], Question]] = {
            "status": self._status,
            "prefetch": self._prefetch,
            "evict": self._evict,
            "refresh": self._refresh,
            "purge": self._purge,
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Return what can be asked."""
        return tuple(self._operations)

    def ask(self, op: str, fields: Mapping[str, object], uid: int, now_s: float) -> Question:
        """Do what is asked; return what answers it.

        Raises:
            NotPermitted: only the daemon's own user and root may change something.
            BadRequest, ModelUnknown: the request is wrong.
        """
        if op != "status" and uid not in {0, self._about.owner_uid}:
            message = f"{op} is for uid {self._about.owner_uid} and root, was asked by {uid}"
            raise NotPermitted(message, hint="run the command as the daemon's user")
        return self._operations[op](fields, now_s)

    def _status(self, fields: Mapping[str, object], now_s: float) -> Question:
        name = wire.optional_text(fields, "model")
        models = [self._shelf.model(name)] if name is not None else self._shelf.models.values()
        body = reporting.status(self._shelf, self._about, models, now_s)
        body["ready"] = self._loading.is_ready
        body["gets"] = self._gets()
        return _at_once(body)

    def _prefetch(self, fields: Mapping[str, object], now_s: float) -> Question:
        model = self._shelf.model(wire.text(fields, "model"))
        self._shelf.refuse_when_draining()
        self._listing.want(model, now_s)
        self._listing.hurry(model, now_s)
        return _at_once({"state": model.state if model.current is None else "resident"})

    def _refresh(self, fields: Mapping[str, object], now_s: float) -> Question:
        model = self._shelf.model(wire.text(fields, "model"))
        version = wire.optional_text(fields, "version")
        self._shelf.refuse_when_draining()
        if version is not None:
            self._loading.go_back(model, version)
        else:
            self._loading.end_rollback(model)
            self._listing.hurry(model, now_s)
            self._listing.refresh(model, now_s)
        current = model.current.of.version if model.current is not None else None
        return _at_once({"state": model.state, "version": current})

    def _evict(self, fields: Mapping[str, object], now_s: float) -> Question:
        model = self._shelf.model(wire.text(fields, "model"))
        count = sum(len(load.holders) for load in model.loads())
        if count:
            message = f"{model.ref.name} is leased by {count} worker{'s' if count > 1 else ''}"
            raise NotPermitted(message, hint="evict it when they have closed it")
        loads = self._send_away([model])

        def answer() -> Answer | None:
            if self._is_awaited(loads):
                return None
            if self._gone(loads) != list(loads):
                message = f"{model.ref.name} is mapped by a process that holds no lease"
                raise NotPermitted(message, hint="evict it when that process has ended")
            return {"freed_bytes": sum(loads.values())}, ()

        return model.ref.name, answer

    def _purge(self, fields: Mapping[str, object], now_s: float) -> Question:
        models = [
            model
            for model in self._shelf.models.values()
            if not any(load.holders for load in model.loads())
        ]
        loads = self._send_away(models)

        def answer() -> Answer | None:
            if self._is_awaited(loads):
                return None
            gone = self._gone(loads)
            names = list(dict.fromkeys(load.of.name for load in gone))
            return {"freed_bytes": sum(loads[load] for load in gone), "models": names}, ()

        return EVERY, answer

    def _send_away(self, models: Sequence[Model]) -> dict[Load, int]:
        """Have models leave; return their loads, and how many bytes each has."""
        loads = {}
        for model in models:
            for load in model.loads():
                loads[load] = self._shelf.ledger.size_of(load.of)
            self._loading.give_up(model, "asked")
            for load in tuple(model.loads()):
                self._leaving.evict(load, "asked")
        return loads

    def _is_awaited(self, loads: Mapping[Load, int]) -> bool:
        return any(load.frees or load.of in self._shelf.retired for load in loads)

    def _gone(self, loads: Mapping[Load, int]) -> list[Load]:
        return [load for load in loads if self._shelf.find(load.of) is not load]


def _at_once(body: dict[str, object]) -> Question:
    return EVERY, lambda: (body, ())
