"""What the engine remembers of a model and of one attempt to load it.

A *load* is one attempt to hold one version. Of a model, one may be *coming* (it is being filled),
one is *current* (complete: who opens the model gets it), others are *kept*: complete, but
superseded or on their way out, as long as somebody has them open or mapped. A load that failed,
or was given up, is *retired* (core/shelf.py). All of them count until the kernel has their memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cached.core import lifecycle
from cached.core.errors import BadRequest, TensorUnknown
from cached.core.manifest import MAX_PATH_BYTES
from cached.core.objects import Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cached.core.errors import CachedError
    from cached.core.header import Header, Tensor
    from cached.core.integrity import Integrity
    from cached.core.objects import FileRef, Manifest, ModelRef, Part, PeerId, VersionRef
    from cached.core.parts import Planner

PAGE_BYTES = 4096
VOID = -1  # in header_asked: a header is being read, from bytes that were found wrong meanwhile


class Flight:
    """A part under way.

    Attributes:
        attempts: GETs of it that are under way: two after a hedge.
        began_s: when the first was sent.
        is_hedged: a second one was sent.
        is_whole: all of it came; what another attempt says afterwards does not count.
    """

    __slots__ = ("attempts", "began_s", "is_hedged", "is_whole", "part")

    def __init__(self, part: Part, now_s: float) -> None:
        self.part = part
        self.attempts = 1
        self.began_s = now_s
        self.is_hedged = False
        self.is_whole = False


class Load:
    """One attempt to hold one version in memory.

    Attributes:
        integrity: which bytes were found right.
        shared: files that it has in common with another load of the model, whole: by index.
        headers: of safetensors files, by index, as they become known.
        holders: peers with a lease.
        healed: indices of files whose beginning was no header, and was fetched once more.
        looked: indices of files that the store was, or is to be, asked about.
        undescribed: those of them that wait for their turn.
        is_list_asked: the list of digests is being read, or was.
        error: why it failed; waiters get it. None while it goes well.
        frees: attempts to free it that are under way.
        leaving: why it is to go; empty if it is not.
        is_mapped: a process that holds no lease was found to have it open or mapped.
        is_adopted: an earlier daemon left it.
        is_aside: it is complete, and to be kept beside what is current; it is not opened yet.
        wide_parts: GETs shall be few: each costs a call of KMS.
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
        "healed",
        "holders",
        "in_flight",
        "integrity",
        "is_adopted",
        "is_aside",
        "is_list_asked",
        "is_mappable",
        "is_mapped",
        "leaving",
        "load_s",
        "looked",
        "manifest",
        "of",
        "path",
        "planner",
        "resume_at_s",
        "shared",
        "undescribed",
        "wide_parts",
    )

    def __init__(  # noqa: PLR0913 - made in two places, by keywords
        self,
        of: VersionRef,
        manifest: Manifest,
        planner: Planner,
        now_s: float,
        *,
        integrity: Integrity,
        shared: Mapping[int, FileRef] | None = None,
        is_adopted: bool = False,
    ) -> None:
        self.of = of
        self.manifest = manifest
        self.planner = planner
        self.integrity = integrity
        self.shared: dict[int, FileRef] = dict(shared or {})
        self.headers: dict[int, Header] = {}
        self.header_asked: dict[int, int] = {}
        self.holders: set[PeerId] = set()
        self.in_flight: dict[int, Flight] = {}
        self.healed: set[int] = set()
        self.looked: set[int] = set()
        self.undescribed: dict[int, None] = {}
        self.is_list_asked = False
        self.failures: dict[tuple[int, int], int] = {}
        self.frees = 0
        self.leaving = ""
        self.is_mappable = False
        self.is_mapped = False
        self.is_adopted = is_adopted
        self.is_aside = False
        self.wide_parts = False
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

    def doubt_header(self, index: int) -> None:
        """Have a header read anew that came from bytes which are wrong."""
        was_read = self.headers.pop(index, None) is not None
        if self.header_asked.pop(index, 1) == 0 and not was_read:
            self.header_asked[index] = VOID

    @property
    def is_complete(self) -> bool:
        """Whether it is published."""
        return self.path is not None

    @property
    def is_filled(self) -> bool:
        """Whether every byte is there, and found right as far as that can be told."""
        return self.has_headers and self.planner.is_complete and self.integrity.is_complete

    @property
    def is_held(self) -> bool:
        """Whether somebody has it, with a lease or by path alone."""
        return bool(self.holders) or self.is_mapped

    def covers(self, ranges: Iterable[tuple[int, Range]]) -> bool:
        """Return whether all these bytes are there, and may be read."""
        return self.is_complete or all(
            self.integrity.releases(index, wanted.start, wanted.stop) for index, wanted in ranges
        )

    def there(self) -> Iterator[tuple[int, Range]]:
        """Yield what may be read: index of the file, and bytes."""
        for index in range(len(self.manifest.objects)):
            for span in self.integrity.released(index):
                yield index, span

    def own_bytes(self) -> int:
        """Return what it takes in memory, apart from what it shares."""
        return sum(
            file_bytes(stored.size_bytes)
            for index, stored in enumerate(self.manifest.objects)
            if index not in self.shared
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
        by_path = {self.manifest.objects[index].path: index for index in self.headers}
        return [self._tensor_range(name, found, by_path) for name, found in homes.items()]

    def _tensor_range(
        self, name: str, homes: list[int], by_path: Mapping[str, int]
    ) -> tuple[int, Range]:
        if len(homes) > 1:
            message = f"{self.of.name} has {len(homes)} tensors named {name[:128]!r}"
            several = ", ".join(f"{self.manifest.objects[at].path}::{name}" for at in homes)
            raise TensorUnknown(message, hint=f"name one of them: {several[:400]}")
        if homes:
            return homes[0], _range_of(self.headers[homes[0]].tensors[name])
        at = name.find("::")
        while 0 <= at <= MAX_PATH_BYTES:
            index = by_path.get(name[:at], -1)
            tensor = self.headers[index].tensors.get(name[at + 2 :]) if index >= 0 else None
            if tensor is not None:
                return index, _range_of(tensor)
            at = name.find("::", at + 1)
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
        state: a row of ``lifecycle.MODEL``: how the next version comes.
        coming: the load that is being filled or published.
        current: the complete one that is given to those who open the model.
        kept: complete ones that are superseded or shall go, the newest last.
        left: what an earlier daemon left beside the one that goes on: complete ones, the newest
            first, each opened in its turn; at most one that was being filled, until the store has
            said whether it is what there is.
        pending: resolved, waiting for room.
        capacity_bytes: what the machine could give to all models together, when it was resolved.
        listing: number of the last ``Resolve``; the answers of earlier ones count no more.
        listed_s: when the store told last what there is; None: never.
        is_asked: a worker or the operator waits for it: then others may be evicted.
        is_confirmed: the store has said that ``current`` is what there is, since we have it.
        passed_over: versions that the operator went back from: the store lists one of them still.
        is_refusal_told: that there is no room beside the current one, of ``pending``.
        frequency: decayed count of opens, as of ``last_used_s``.
        look_at_s: when the store is to be asked for a new version, if that is done at times.
    """

    __slots__ = (
        "attempts",
        "capacity_bytes",
        "coming",
        "current",
        "error",
        "frequency",
        "is_asked",
        "is_confirmed",
        "is_refusal_told",
        "kept",
        "last_used_s",
        "learnt",
        "left",
        "listed_s",
        "listing",
        "look_at_s",
        "opens",
        "passed_over",
        "pending",
        "prefetch_failures",
        "ref",
        "retry_at_s",
        "state",
        "was_resident",
    )

    def __init__(self, ref: ModelRef) -> None:
        self.ref = ref
        self.state = lifecycle.IDLE
        self.coming: Load | None = None
        self.current: Load | None = None
        self.kept: list[Load] = []
        self.left: list[Load] = []
        self.pending: Manifest | None = None
        self.capacity_bytes = 0
        self.listing = 0
        self.listed_s: float | None = None
        self.error: CachedError | None = None
        self.attempts = 0
        self.retry_at_s: float | None = None
        self.look_at_s: float | None = None
        self.prefetch_failures = 0
        self.is_asked = False
        self.is_confirmed = True
        self.is_refusal_told = False
        self.was_resident = False
        self.passed_over: tuple[str, ...] = ()
        self.opens = 0
        self.frequency = 0.0
        self.last_used_s = 0.0
        self.learnt: tuple[str, tuple[tuple[int, int, int], ...]] = ("", ())

    @property
    def is_under_way(self) -> bool:
        """Whether its next event is awaited; not so in a back-off, which a timer has to end."""
        return self.state not in {"idle", "failed"} and self.retry_at_s is None

    @property
    def offered(self) -> Load | None:
        """Return what is given to those who open the model: complete, or being filled."""
        return self.current or self.coming

    @property
    def is_taking_over(self) -> bool:
        """Whether complete versions that an earlier daemon left are not all opened yet."""
        return any(load is not None and load.is_aside for load in (self.coming, *self.left))

    def loads(self) -> Iterator[Load]:
        """Yield all that has memory, or will have: the one to offer first."""
        if self.current is not None:
            yield self.current
        if self.coming is not None:
            yield self.coming
        yield from reversed(self.kept)
        yield from self.left

    def offers(self) -> Iterator[Load]:
        """Yield what is in memory, or on its way there."""
        return (load for load in self.loads() if load.is_aside or load not in self.left)

    def having(self, version: str) -> Load | None:
        """Return the load of a version, if it is in memory or on its way there."""
        return next((load for load in self.offers() if load.of.version == version), None)

    def advance(self, trigger: str) -> None:
        """Change the state by the table, and in no other way."""
        self.state = lifecycle.advance(lifecycle.MODEL, self.state, trigger)


def _range_of(tensor: Tensor) -> Range:
    return Range(tensor.start, tensor.stop)


def file_bytes(size_bytes: int) -> int:
    """Return what a file takes in memory: whole pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


class Limits(NamedTuple):
    """What the operator allows.

    Attributes:
        fetch_slots: GETs in flight, at most.
        headroom_bytes: of available memory, never taken.
        part_attempts: GETs in a row that may fail at one byte before the load does.
        verify: ``off``, ``checksum`` or ``digest``.
        can_check: checksum algorithms that this host computes.
        kept_versions: superseded versions of a model that stay in memory though nobody has them.
        refresh_interval_s: how often the store is asked for a new version; 0: never.
    """

    fetch_slots: int = 8
    headroom_bytes: int = 0
    part_attempts: int = 8
    verify: str = "checksum"
    can_check: frozenset[str] = frozenset()
    kept_versions: int = 0
    refresh_interval_s: float = 0.0
