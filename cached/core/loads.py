"""What the engine remembers of a model and of one attempt to load it.

A *load* is one attempt to hold one version. A model has at most one that is current; a
load that failed or was evicted is *retired*: it is counted in the ledger until the kernel
has its memory back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cached.core import lifecycle
from cached.core.effects import Free
from cached.core.errors import BadRequest, TensorUnknown
from cached.core.objects import Range

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cached.core.effects import Effect
    from cached.core.errors import CachedError
    from cached.core.header import Header, Tensor
    from cached.core.ledger import Ledger
    from cached.core.objects import Manifest, ModelRef, Part, PeerId, VersionRef
    from cached.core.parts import Planner

PAGE_BYTES = 4096
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 20.0  # AWS SDKs' cap for back-off


class Load:
    """One attempt to hold one version in memory.

    Attributes:
        headers: of safetensors files, by index, as they become known.
        holders: peers with a lease.
        error: why it failed; waiters get it. None while it goes well.
        frees: attempts to free it that are under way.
        path: the directory, once published.
        resume_at_s: no GET before this time (back-off).
    """

    __slots__ = (
        "began_s",
        "error",
        "failures",
        "frees",
        "header_asked",
        "headers",
        "holders",
        "in_flight",
        "is_mappable",
        "load_s",
        "manifest",
        "of",
        "path",
        "planner",
        "resume_at_s",
    )

    def __init__(self, of: VersionRef, manifest: Manifest, planner: Planner, now_s: float) -> None:
        self.of = of
        self.manifest = manifest
        self.planner = planner
        self.headers: dict[int, Header] = {}
        self.header_asked: dict[int, int] = {}
        self.holders: set[PeerId] = set()
        self.in_flight: dict[int, Part] = {}
        self.failures: dict[tuple[int, int], int] = {}
        self.frees = 0
        self.is_mappable = False
        self.error: CachedError | None = None
        self.path: str | None = None
        self.resume_at_s = now_s
        self.began_s = now_s
        self.load_s = 0.0

    @property
    def has_headers(self) -> bool:
        """Whether it can be mapped and every safetensors header is known."""
        return self.is_mappable and all(
            index in self.headers
            for index, stored in enumerate(self.manifest.objects)
            if stored.is_safetensors
        )

    @property
    def is_complete(self) -> bool:
        """Whether it is published."""
        return self.path is not None

    @property
    def is_leaving(self) -> bool:
        """Whether the memory of a retired load is on its way back: its next event is awaited."""
        return not self.holders and (bool(self.in_flight) or self.frees > 0)

    def covers(self, ranges: Iterable[tuple[int, Range]]) -> bool:
        """Return whether all these bytes are there."""
        return self.is_complete or all(
            self.planner.has(index, wanted.start, wanted.stop) for index, wanted in ranges
        )

    def header_bytes(self, index: int) -> int | None:
        """Return where the data of a safetensors file starts, if that is known."""
        header = self.headers.get(index)
        return None if header is None else header.header_bytes

    def check_ranges(self, ranges: Iterable[tuple[int, Range]]) -> None:
        """Check that bytes which somebody names exist.

        Raises:
            BadRequest: the model has no such file, or the file no such bytes.
        """
        objects = self.manifest.objects
        for index, span in ranges:
            if index >= len(objects):
                message = f"file {index} is not one of {len(objects)}"
                raise BadRequest(message)
            if span.stop > objects[index].size_bytes:
                message = f"range stops at {span.stop}, the file at {objects[index].size_bytes}"
                raise BadRequest(message)

    def tensor_ranges(self, names: Iterable[str]) -> list[tuple[int, Range]]:
        """Return where the named tensors are: index of the file, and bytes.

        Args:
            names: as a model's client names them: one that several files have is FILE::NAME.

        Raises:
            TensorUnknown: the model has none of that name, or several.
        """
        homes: dict[str, list[int]] = {name: [] for name in names}
        for index, header in self.headers.items():
            for name in homes.keys() & header.tensors.keys():
                homes[name].append(index)
        return [self._tensor_range(name, found) for name, found in homes.items()]

    def _tensor_range(self, name: str, homes: list[int]) -> tuple[int, Range]:
        if len(homes) > 1:
            message = f"{self.of.name} has {len(homes)} tensors named {name[:128]!r}"
            several = ", ".join(f"{self.manifest.objects[at].path}::{name}" for at in homes)
            raise TensorUnknown(message, hint=f"name one of them: {several[:400]}")
        if homes:
            return homes[0], _range_of(self.headers[homes[0]].tensors[name])
        for index, header in self.headers.items():
            prefix = f"{self.manifest.objects[index].path}::"
            tensor = header.tensors.get(name[len(prefix) :])
            if tensor is not None and name.startswith(prefix):
                return index, _range_of(tensor)
        message = f"{self.of.name} has no tensor named {name[:128]!r}"
        raise TensorUnknown(message, hint=self._names_hint())

    def _names_hint(self) -> str:
        for header in self.headers.values():
            for name in header.tensors:
                return f"names are those of its safetensors files, such as {name[:128]}"
        return "it has no tensors: none of its files is a safetensors file with some"


class Model:
    """What is known of one configured model.

    Attributes:
        state: a row of ``lifecycle.MODEL``.
        load: the current one; None unless loading, publishing or resident.
        pending: resolved, waiting for room.
        capacity_bytes: what the machine could give to all models together, when it was resolved.
        listing: number of the last ``Resolve``; the answers of earlier ones count no more.
        is_asked: a worker or the operator waits for it: then others may be evicted.
        frequency: decayed count of opens, as of ``last_used_s``.
    """

    __slots__ = (
        "attempts",
        "capacity_bytes",
        "error",
        "frequency",
        "is_asked",
        "last_used_s",
        "learnt",
        "listing",
        "load",
        "opens",
        "pending",
        "prefetch_failures",
        "ref",
        "retry_at_s",
        "state",
        "was_resident",
    )

    def __init__(self, ref: ModelRef) -> None:
        self.ref = ref
        self.state = lifecycle.ABSENT
        self.load: Load | None = None
        self.pending: Manifest | None = None
        self.capacity_bytes = 0
        self.listing = 0
        self.error: CachedError | None = None
        self.attempts = 0
        self.retry_at_s: float | None = None
        self.prefetch_failures = 0
        self.is_asked = False
        self.was_resident = False
        self.opens = 0
        self.frequency = 0.0
        self.last_used_s = 0.0
        self.learnt: tuple[str, tuple[tuple[int, int, int], ...]] = ("", ())

    @property
    def is_under_way(self) -> bool:
        """Whether its next event is awaited; not so in a back-off, which a timer has to end."""
        return self.state not in {"absent", "failed"} and self.retry_at_s is None

    def advance(self, trigger: str) -> None:
        """Change the state by the table, and in no other way."""
        self.state = lifecycle.advance(lifecycle.MODEL, self.state, trigger)


def _range_of(tensor: Tensor) -> Range:
    return Range(tensor.start, tensor.stop)


def delay_s(failures: int, jitter_ratio: float, asked_s: float | None) -> float:
    """Return the back-off after so many failures in a row: doubling, half of it random.

    ``asked_s`` is the store's Retry-After: never less than that.
    """
    longest: float = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(failures - 1, 10))
    return max(asked_s or 0.0, float(longest) * (0.5 + jitter_ratio / 2))


def footprint_bytes(manifest: Manifest) -> int:
    """Return what a version takes in memory: every file rounded up to pages."""
    return sum(-(-stored.size_bytes // PAGE_BYTES) * PAGE_BYTES for stored in manifest.objects)


class Limits(NamedTuple):
    """What the operator allows.

    Attributes:
        fetch_slots: GETs in flight.
        headroom_bytes: of available memory, never taken.
        part_attempts: GETs in a row that may fail at one byte before the load does.
    """

    fetch_slots: int = 8
    headroom_bytes: int = 0
    part_attempts: int = 8


class Shelf:
    """All models and their loads: what the parts of the engine share.

    Attributes:
        models: by name, in the order of the configuration.
        ledger: of the memory budget.
        retired: loads that are out of use, but not yet out of memory.
        effects: decided since the engine last took them.
        changed: names of models whose waiters may have an answer now.
        is_draining: nothing new is wanted.
        is_stopped: no GET is begun.
    """

    __slots__ = (
        "_last_load",
        "changed",
        "effects",
        "is_draining",
        "is_stopped",
        "ledger",
        "models",
        "retired",
    )

    def __init__(self, refs: tuple[ModelRef, ...], ledger: Ledger) -> None:
        self.models = {ref.name: Model(ref) for ref in refs}
        self.ledger = ledger
        self.retired: dict[VersionRef, Load] = {}
        self.effects: list[Effect] = []
        self.changed: dict[str, None] = {}  # a set that keeps its order
        self._last_load = 0
        self.is_draining = False
        self.is_stopped = False

    @property
    def leased_bytes(self) -> int:
        """Bytes of the versions that somebody holds, reserved ones included."""
        current = (model.load for model in self.models.values() if model.load is not None)
        held = (load for load in (*current, *self.retired.values()) if load.holders)
        return sum(self.ledger.size_of(load.of) for load in held)

    @property
    def leaving_bytes(self) -> int:
        """Bytes that retired loads are about to give back."""
        leaving = (load for load in self.retired.values() if load.is_leaving)
        return sum(self.ledger.size_of(load.of) for load in leaving)

    def free(self, load: Load) -> None:
        """Have a retired load unlinked, and its memory given back unless somebody maps it."""
        load.frees += 1
        self.effects.append(Free(load.of))

    def next_load(self) -> int:
        """Return a number for a new load."""
        self._last_load += 1
        return self._last_load

    def current(self, of: VersionRef) -> Load | None:
        """Return the load if it is still the model's current one."""
        load = self.models[of.name].load
        return load if load is not None and load.of == of else None

    def find(self, of: VersionRef) -> Load | None:
        """Return a load, current or retired."""
        return self.current(of) or self.retired.get(of)
