"""All models, their loads and the ledger: what the parts of the engine share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.effects import Evicted, Free
from cached.core.errors import DaemonUnavailable, ModelUnknown
from cached.core.loads import PAGE_BYTES, Model, file_bytes
from cached.core.objects import FileRef

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cached.core.effects import Effect
    from cached.core.ledger import Ledger
    from cached.core.loads import Load
    from cached.core.objects import ModelRef, VersionRef


class Shelf:
    """The state of the engine.

    Attributes:
        models: by name, in the order of the configuration.
        ledger: of the memory budget.
        retired: loads that are out of use and of sight, but not yet out of memory.
        effects: decided since the engine last took them.
        changed: names of models whose waiters may have an answer now.
        is_room_made: who waits for room may try again.
        is_draining: nothing new is wanted.
        is_stopped: no GET is begun.

    Args:
        refs: the configured models.
        ledger: empty.
        last_load: the highest number of a load that an earlier daemon left.
    """

    __slots__ = (
        "_last_load",
        "changed",
        "effects",
        "is_draining",
        "is_room_made",
        "is_stopped",
        "ledger",
        "models",
        "retired",
    )

    def __init__(self, refs: tuple[ModelRef, ...], ledger: Ledger, last_load: int = 0) -> None:
        self.models = {ref.name: Model(ref) for ref in refs}
        self.ledger = ledger
        self.retired: dict[VersionRef, Load] = {}
        self.effects: list[Effect] = []
        self.changed: dict[str, None] = {}  # a set that keeps its order
        self._last_load = last_load
        self.is_room_made = False
        self.is_draining = False
        self.is_stopped = False

    def model(self, name: str) -> Model:
        """Return the model of that name.

        Raises:
            ModelUnknown: none is configured.
        """
        model = self.models.get(name)
        if model is None:
            known = ", ".join(self.models) or "none"
            message = f"no model named {name[:128]!r} is configured: known are {known}"
            raise ModelUnknown(message, hint=f"start the daemon with --model {name[:128]}=s3://…")
        return model

    def refuse_when_draining(self) -> None:
        """Raise ``DaemonUnavailable`` if nothing new is wanted."""
        if self.is_draining:
            raise DaemonUnavailable("the daemon is stopping", hint="try again when it is back")

    def next_load(self) -> int:
        """Return a number for a new load."""
        self._last_load += 1
        return self._last_load

    def loads(self) -> Iterator[Load]:
        """Yield every load that has memory, or will."""
        for model in self.models.values():
            yield from model.loads()
        yield from self.retired.values()

    def coming(self, of: VersionRef) -> Load | None:
        """Return the load if it is the one that its model waits for."""
        model = self.models.get(of.name)
        load = model.coming if model is not None else None
        return load if load is not None and load.of == of else None

    def find(self, of: VersionRef) -> Load | None:
        """Return a load, wherever it stands."""
        model = self.models.get(of.name)
        for load in model.loads() if model is not None else ():
            if load.of == of:
                return load
        return self.retired.get(of)

    @property
    def leased_bytes(self) -> int:
        """Bytes of the versions that somebody has, reserved ones included."""
        return sum(self.ledger.size_of(load.of) for load in self.loads() if load.is_held)

    @property
    def leaving(self) -> list[Load]:
        """Loads that are about to be given back: the next event of each is awaited."""
        return [load for load in self.loads() if self.is_leaving(load)]

    def is_leaving(self, load: Load) -> bool:
        """Return whether the memory of a load is on its way back."""
        if load.frees:
            return not load.holders
        return load.of in self.retired and not load.holders and bool(load.in_flight)

    def gives_back(self, loads: Iterable[Load]) -> int:
        """Return what freeing all these loads gives back: what no other one has as well."""
        going = {load.of: load for load in loads}
        staying = {
            file
            for other in self.loads()
            if other.of not in going
            for file in other.shared.values()
            if file.of in going
        }
        return sum(map(self.ledger.size_of, going)) - sum(
            file_bytes(going[file.of].manifest.objects[file.index].size_bytes) for file in staying
        )

    def commit(self, file: FileRef, start: int, stop: int) -> None:
        """Note that bytes ``[start, stop)`` of a file are on pages now, which are whole."""
        self.ledger.commit(file, start - start % PAGE_BYTES, file_bytes(stop))

    def committed_of(self, load: Load) -> int:
        """Return what the files of a load have on pages, those included that it shares."""
        shared_bytes = sum(map(self.ledger.committed_in, load.shared.values()))
        return self.ledger.committed_of(load.of) + shared_bytes

    def checked_by(self, shared: Mapping[int, FileRef]) -> dict[int, str]:
        """Return by what shared files were checked, by the index that they have in the sharer."""
        homes = {index: (self.find(file.of), file.index) for index, file in shared.items()}
        return {
            index: load.integrity.checked_by[at] if load is not None else ""
            for index, (load, at) in homes.items()
        }

    def free(self, load: Load, *, if_unused: bool = False) -> None:
        """Have a load unlinked, and its memory given back unless somebody maps it.

        Args:
            load: any.
            if_unused: only if nobody has it, also by path alone.
        """
        load.frees += 1
        self.effects.append(Free(load.of, if_unused))

    def forget(self, load: Load) -> None:
        """Take note that the kernel has a load's memory back."""
        load.frees = 0
        for index, stored in enumerate(load.manifest.objects):
            if index not in load.shared:
                self._inherit(FileRef(load.of, index), file_bytes(stored.size_bytes))
        size_bytes = self.ledger.release(load.of)
        model = self.models.get(load.of.name)
        if model is not None and load in model.kept:
            model.kept.remove(load)
            self.effects.append(Evicted(load.of, load.leaving, size_bytes))
        self.retired.pop(load.of, None)
        self.changed[load.of.name] = None
        self.is_room_made = True

    def _inherit(self, file: FileRef, size_bytes: int) -> None:
        """Charge another version for a file that it has in common with one that is gone."""
        heir: FileRef | None = None
        for other in self.loads():
            for index, shared in other.shared.items():
                if shared == file:
                    heir = heir or FileRef(other.of, index)
                    other.shared[index] = heir
        if heir is not None:
            self.ledger.hand_over(file, heir, size_bytes)
            owner = self.find(heir.of)
            if owner is not None:
                del owner.shared[heir.index]
