"""A leased model: tensors by name while the rest is still on its way, and a directory."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Protocol

from cached.client import table
from cached.client.arrays import Arrays, import_torch, torch_tensor
from cached.client.deadline import Deadline
from cached.client.mappings import File, close_all, private_mapping
from cached.core.errors import CachedError, ModelClosed, TensorUnknown, TimedOut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    import numpy as np
    import torch

    from cached.client.mappings import Lease
    from cached.core.header import Tensor

    Array = np.ndarray[Any, Any]
    Range = tuple[int, int, int]  # file, start, stop

PROGRESS_S = 0.02  # to learn how far a load is, after a time-out; a daemon that hangs says nothing


class Source(Protocol):
    """Where a model's bytes come from: the daemon, or the store itself."""

    lease: Lease

    def wait(self, ranges: Sequence[Range], deadline: Deadline, what: str) -> bool:
        """Wait for byte ranges; return whether the whole version is there.

        Args:
            ranges: file, start, stop of each.
            deadline: when to give up.
            what: they are, for the error.
        """

    def path(self, deadline: Deadline) -> str:
        """Wait for the whole version; return its directory."""

    def arrivals(self, seen_bytes: int, deadline: Deadline) -> tuple[int, list[Range], bool]:
        """Wait for more than ``seen_bytes``; return how many and which are there, and if all."""

    def descriptors(self, files: Sequence[int], deadline: Deadline) -> list[int]:
        """Return one new read-only descriptor for each file; the caller closes them."""

    def is_stale(self, deadline: Deadline) -> bool:
        """Return whether this version failed to load, or another is current."""


class Model:
    """One version of a model, leased.

    Made by ``cached.open``. Use it as a mapping of tensor names, as a context manager, or
    both; any thread, and children of fork. The lease lasts until it is closed (or collected)
    *and* the last view of its tensors is gone; views stay valid whatever happens to the
    model, to the daemon or to the version.

    Attributes:
        name: as configured.
        version: id of the version that is leased.
        metadata: ``__metadata__`` of its safetensors files, together.
    """

    def __init__(  # noqa: PLR0913 - made in one place, by keywords
        self,
        *,
        name: str,
        version: str,
        files: list[File],
        source: Source,
        is_complete: bool,
        path: str | None,
        timeout_s: float | None,
    ) -> None:
        self.name = name
        self.version = version
        self._files = files
        self._source = source
        self._is_closed = False
        self._is_complete = is_complete
        self._path = path
        self._timeout_s = timeout_s
        self._arrays: Arrays | None = None
        self._confirmed: set[str] = set()
        self._release: Callable[[], object] = source.lease.hold_for(self)
        self._tensors, self.metadata, self._ambiguous = table.read(files)

    def __repr__(self) -> str:
        return f"<cached.Model {self.name}@{self.version}: {len(self._tensors)} tensors>"

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lease back once the last view is gone. Again: does nothing.

        A thread that waits for a tensor meanwhile gets ``ModelClosed``, at the end of its wait.
        """
        self._is_closed = True
        for file in self._files:
            file.drop()
        self._release()

    # --- a mapping of tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Array:
        """Return a tensor as a read-only numpy view; waits for just this tensor.

        Raises:
            TensorUnknown: the model has no such tensor.
            TimedOut: its bytes did not come within the ``timeout_s`` of ``cached.open``.
            DaemonUnavailable: the daemon is gone and the bytes are not there.
            Stale, LoadFailed: they will not come.
            ModelClosed: after ``close``.
        """
        index, tensor = self._ready(name)
        return self._view(index, tensor)

    def keys(self) -> Iterator[str]:
        """Return the names of all tensors."""
        return iter(self._tensors)

    def items(self, order: str = "file") -> Iterator[tuple[str, Array]]:
        """Yield every tensor with its name, waiting for each.

        Args:
            order: ``file``: as they lie in the files; ``arrival``: as their bytes come.
        """
        if order not in {"file", "arrival"}:
            message = f"order must be 'file' or 'arrival', was {order!r}"
            raise ValueError(message)
        self._check_open()
        if self._is_complete:
            return self._made().views(self._files, self._tensors)
        return self._pairs(iter(self._tensors) if order == "file" else self._arriving())

    def _pairs(self, names: Iterator[str]) -> Iterator[tuple[str, Array]]:
        for name in names:
            yield name, self._view(*self._ready(name))

    def buffer(self, name: str) -> memoryview:
        """Return the raw bytes of a tensor, read-only; waits for just this tensor. No numpy."""
        index, tensor = self._ready(name)
        return self._files[index].view(tensor.start, tensor.stop)

    def dtype(self, name: str) -> str:
        """Return a tensor's type by its safetensors name (``BF16``); waits for nothing."""
        return self._find(name)[1].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; waits for nothing."""
        return self._find(name)[1].shape

    def torch(self) -> dict[str, torch.Tensor]:
        """Return every tensor as a zero-copy torch tensor; waits for the whole version.

        A write to one stays private to this process. torch is imported only here.
        """
        import_torch()  # that it is missing should not come up after a long wait
        self.wait()
        deadline = self._deadline()
        indices = sorted({index for index, _ in self._tensors.values()})
        descriptors = self._source.descriptors(indices, deadline)[::-1]
        mappings = {}
        try:
            for index in indices:
                file = self._files[index]
                mappings[index] = private_mapping(descriptors.pop(), file, self._source.lease)
        finally:
            close_all(descriptors)
        return {
            name: torch_tensor(mappings[index], tensor)
            for name, (index, tensor) in self._tensors.items()
        }

    # --- the model as a whole

    @property
    def path(self) -> str:
        """Return a directory that any library opens; waits for the whole version.

        The files stay there while the lease does and the daemon runs: one that ends removes them
        (``cached serve`` after SIGTERM at once, after SIGKILL when the next one starts). What is
        mapped stays mapped, the tensors of this model included.

        Raises:
            TimedOut, DaemonUnavailable, Stale, LoadFailed: as for a tensor.
        """
        return self._whole(self._deadline())

    @property
    def is_stale(self) -> bool:
        """Return whether this version failed to load, or another is current: open it again.

        The daemon notices a replaced object only while it loads a version; a resident one stays
        current until it is evicted. Without a daemon (``fallback``) the store is asked.
        """
        self._check_open()
        return self._source.is_stale(self._deadline())

    @property
    def files(self) -> tuple[str, ...]:
        """Return the paths of all files, below ``path``."""
        return tuple(file.path for file in self._files)

    def file(self, path: str) -> memoryview:
        """Return a file's bytes (``config.json``), read-only; waits for just this file.

        Raises:
            KeyError: the model has no such file.
        """
        self._check_open()
        for index, file in enumerate(self._files):
            if file.path == path:
                self._wait([(index, 0, file.size_bytes)], self._deadline(), f"file {path!r}")
                return file.view(0, file.size_bytes)
        message = f"{self.name} has no file {path!r}; see files"
        raise KeyError(message)

    def wait(self, names: Sequence[str] | None = None, *, timeout_s: float | None = None) -> None:
        """Wait for some tensors together, or for the whole version.

        Args:
            names: of tensors; ``None``: all files.
            timeout_s: ``None``: that of ``cached.open``.
        """
        self._check_open()
        deadline = self._deadline(timeout_s)
        if names is None:
            self._whole(deadline)
            return
        found = [self._find(name) for name in names]
        ranges = _joined([(index, tensor.start, tensor.stop) for index, tensor in found])
        what = f"tensor {names[0]!r:.200}" if len(names) == 1 else f"{len(names)} tensors"
        self._wait(ranges, deadline, what)
        self._confirmed.update(names)

    # --- inside

    def _find(self, name: str) -> tuple[int, Tensor]:
        try:
            return self._tensors[name]
        except (KeyError, TypeError):
            message = f"{self.name} has no tensor named {name!r:.200}"
            hint = f"it has {len(self)}: see keys()"
            several = self._ambiguous.get(str(name))
            if several:
                message = f"{self.name} has {len(several)} tensors named {name!r:.200}"
                hint = f"ask for one of them: {', '.join(several)[:400]}"
            raise TensorUnknown(message, hint=hint) from None

    def _ready(self, name: str) -> tuple[int, Tensor]:
        index, tensor = self._find(name)
        self._check_open()
        if not self._is_complete and name not in self._confirmed:
            wanted = [(index, tensor.start, tensor.stop)]
            self._wait(wanted, self._deadline(), f"tensor {name!r:.200}")
            self._confirmed.add(name)
        return index, tensor

    def _wait(self, ranges: list[Range], deadline: Deadline, what: str) -> None:
        wanted = [(index, start, stop) for index, start, stop in ranges if start < stop]
        if wanted and not self._is_complete:
            try:
                is_all = self._source.wait(wanted, deadline, f"{what} of {self.name}")
            except TimedOut as error:
                raise self._how_far(error, wanted) from error
            if is_all:
                self._is_complete = True
            self._check_open()

    def _whole(self, deadline: Deadline) -> str:
        """Wait for the whole version; return its directory."""
        self._check_open()
        if self._path is None:
            try:
                self._path = self._source.path(deadline)
            except TimedOut as error:
                everything = [(index, 0, file.size_bytes) for index, file in enumerate(self._files)]
                raise self._how_far(error, everything) from error
            self._is_complete = True
        return self._path

    def _how_far(self, error: TimedOut, wanted: list[Range]) -> TimedOut:
        """Return the error, and in it how much of what was waited for is there, if known."""
        try:
            _, there, _ = self._source.arrivals(0, Deadline(PROGRESS_S))
        except CachedError:
            return error
        spans = _by_file(there)
        come_bytes = sum(
            max(0, min(stop, span_stop) - max(start, span_start))
            for index, start, stop in wanted
            for span_start, span_stop in spans.get(index, [])
        )
        wanted_bytes = sum(stop - start for _, start, stop in wanted)
        message = f"{error.message}: {come_bytes} of {wanted_bytes} bytes are there"
        return TimedOut(message, hint=error.hint)

    def _view(self, index: int, tensor: Tensor) -> Array:
        return self._made().view(self._files[index], tensor)

    def _made(self) -> Arrays:
        if self._arrays is None:
            self._arrays = Arrays()
        return self._arrays

    def _arriving(self) -> Iterator[str]:
        """Yield names as their bytes come; each once."""
        missing = dict(self._tensors)
        seen_bytes = 0
        while missing and not self._is_complete:
            self._check_open()
            seen_bytes, there, is_all = self._source.arrivals(seen_bytes, self._deadline())
            if is_all:
                self._is_complete = True
                break
            spans = _by_file(there)
            come = [name for name, wanted in missing.items() if _covers(spans, *wanted)]
            self._confirmed.update(come)
            for name in come:
                del missing[name]
                yield name
        yield from missing

    def _deadline(self, timeout_s: float | None = None) -> Deadline:
        return Deadline(self._timeout_s if timeout_s is None else timeout_s)

    def _check_open(self) -> None:
        if self._is_closed:
            message = f"{self.name} is closed"
            raise ModelClosed(message, hint="take what you need before close(): views stay valid")


def _joined(ranges: list[Range]) -> list[Range]:
    """Return the same bytes in as few ranges as there can be."""
    joined: list[Range] = []
    for index, start, stop in sorted(ranges):
        if joined and joined[-1][0] == index and start <= joined[-1][2]:
            joined[-1] = (index, joined[-1][1], max(stop, joined[-1][2]))
        else:
            joined.append((index, start, stop))
    return joined


def _by_file(ranges: list[Range]) -> dict[int, list[tuple[int, int]]]:
    """Return start and stop of ranges by file, sorted."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for index, start, stop in sorted(ranges):
        spans.setdefault(index, []).append((start, stop))
    return spans


def _covers(spans: dict[int, list[tuple[int, int]]], index: int, tensor: Tensor) -> bool:
    """Return whether one of a file's spans holds all of a tensor."""
    if tensor.start == tensor.stop:
        return True
    found = spans.get(index, [])
    at = bisect_right(found, tensor.start, key=lambda span: span[0]) - 1
    return at >= 0 and tensor.stop <= found[at][1]
