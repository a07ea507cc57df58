"""A leased model: tensors by name while the rest is still on its way, and a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cached.client import paths, spans, table
from cached.client.arrays import Arrays, import_torch, torch_tensor
from cached.client.deadline import Deadline
from cached.client.mappings import close_all, private_mapping
from cached.core.errors import CachedError, ModelClosed, TensorUnknown, TimedOut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    import numpy as np
    import torch

    from cached.client.mappings import File
    from cached.client.source import Source
    from cached.client.spans import Range
    from cached.core.header import Tensor

    Array = np.ndarray[Any, Any]

PROGRESS_S = 0.02  # to learn how far a load is, after a time-out; a daemon that hangs says nothing


class Model:
    """One version of a model, leased.

    Made by ``cached.open``. Use it as a mapping of tensor names, as a context manager, or
    both; any thread, and children of fork. The lease lasts until it is closed (or collected)
    *and* the last view of its tensors is gone; views stay valid whatever happens to the
    model, to the daemon or to the version. A daemon that was killed and is back is asked again by
    the next call that needs it, for the same version.

    Attributes:
        name: as configured.
        version: id of the version that is leased.
        metadata: ``__metadata__`` of its safetensors files, together.
    """

    def __init__(
        self,
        *,
        name: str,
        version: str,
        source: Source,
        is_complete: bool,
        path: str | None,
        timeout_s: float | None,
    ) -> None:
        self.name = name
        self.version = version
        self._files = source.files  # those that a reply was about last
        self._complete = source.files if is_complete else None  # all their bytes are there
        self._source = source
        self._is_closed = False
        self._path = path
        self._timeout_s = timeout_s
        self._arrays: Arrays | None = None
        self._release: Callable[[], object] = source.lease.hold_for(self)
        self._tensors, self.metadata, self._ambiguous = table.read(source.files)

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
        self._source.drop()
        for file in (*self._files, *(self._complete or ())):
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
            Stale, LoadFailed: they will not come; also when a daemon that is back has this
                version no more.
            ModelClosed: after ``close``.
        """
        return self._view(*self._ready(name))

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
        if self._complete is not None:
            return self._made().views(self._complete, self._tensors)
        return self._pairs(iter(self._tensors) if order == "file" else self._arriving())

    def _pairs(self, names: Iterator[str]) -> Iterator[tuple[str, Array]]:
        for name in names:
            yield name, self._view(*self._ready(name))

    def buffer(self, name: str) -> memoryview:
        """Return the raw bytes of a tensor, read-only; waits for just this tensor. No numpy."""
        file, tensor = self._ready(name)
        return file.view(tensor.start, tensor.stop)

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

        The files stay there while the lease does. A daemon that keeps models in sealed memory
        gives links to its own open files: they end with it, and only who runs as its user and
        sees its processes can follow them. What is mapped stays mapped, the tensors of this model
        included.

        Raises:
            TimedOut, DaemonUnavailable, Stale, LoadFailed: as for a tensor.
            NotPermitted: this process cannot open what is there: it runs as another user, or sees
                other processes or other file systems than the daemon.
        """
        path = self._whole(self._deadline())
        first = self._files[0].path if self._files else ""
        if not paths.can_open(f"{path}/{first}"):
            self._path = None  # a daemon that came back may have it elsewhere
            path = self._whole(self._deadline())
            paths.check(self.name, f"{path}/{first}")
        return path

    @property
    def is_stale(self) -> bool:
        """Return whether this version failed to load, or another is current: open it again.

        The daemon notices a replaced object while it loads a version, and when it asks the store
        (``cached refresh``). Without a daemon (``fallback``) the store is asked. A daemon that is
        back gives this version a new lease by the way.
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
                whole = [(index, 0, file.size_bytes)]
                there = self._wait(whole, self._deadline(), f"file {path!r}")[index]
                return there.view(0, file.size_bytes)
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
        ranges = spans.joined((index, tensor.start, tensor.stop) for index, tensor in found)
        what = f"tensor {names[0]!r:.200}" if len(names) == 1 else f"{len(names)} tensors"
        files = self._wait(ranges, deadline, what)
        for name, (index, _) in zip(names, found, strict=True):
            files[index].there.add(name)

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

    def _ready(self, name: str) -> tuple[File, Tensor]:
        index, tensor = self._find(name)
        self._check_open()
        if self._complete is not None:
            return self._complete[index], tensor
        file = self._files[index]
        if name not in file.there:
            wanted = [(index, tensor.start, tensor.stop)]
            file = self._wait(wanted, self._deadline(), f"tensor {name!r:.200}")[index]
            file.there.add(name)
        return file, tensor

    def _wait(self, ranges: list[Range], deadline: Deadline, what: str) -> list[File]:
        """Return the files in which the ranges are there."""
        wanted = [(index, start, stop) for index, start, stop in ranges if start < stop]
        if self._complete is not None:
            return self._complete
        if not wanted:
            return self._files
        try:
            there = self._source.wait(wanted, deadline, f"{what} of {self.name}")
        except TimedOut as error:
            raise self._how_far(error, wanted) from error
        self._learn(there.files, is_all=there.is_all)
        self._check_open()
        return there.files

    def _learn(self, files: list[File], *, is_all: bool) -> None:
        self._files = files
        if is_all and self._complete is None:
            self._complete = files

    def _whole(self, deadline: Deadline) -> str:
        """Wait for the whole version; return its directory."""
        self._check_open()
        if self._path is None:
            try:
                self._path, files = self._source.path(deadline)
            except TimedOut as error:
                everything = [(index, 0, file.size_bytes) for index, file in enumerate(self._files)]
                raise self._how_far(error, everything) from error
            self._learn(files, is_all=True)
        return self._path

    def _how_far(self, error: TimedOut, wanted: list[Range]) -> TimedOut:
        """Return the error, and in it how much of what was waited for is there, if known."""
        try:
            there = self._source.arrivals(0, Deadline(PROGRESS_S))
        except CachedError:
            return error
        come_bytes = spans.common_bytes(wanted, spans.by_file(there.ranges))
        wanted_bytes = sum(stop - start for _, start, stop in wanted)
        message = f"{error.message}: {come_bytes} of {wanted_bytes} bytes are there"
        return TimedOut(message, hint=error.hint)

    def _view(self, file: File, tensor: Tensor) -> Array:
        return self._made().view(file, tensor)

    def _made(self) -> Arrays:
        if self._arrays is None:
            self._arrays = Arrays()
        return self._arrays

    def _arriving(self) -> Iterator[str]:
        """Yield names as their bytes come; each once."""
        missing = dict(self._tensors)
        seen_bytes = 0
        while missing and self._complete is None:
            self._check_open()
            there = self._source.arrivals(seen_bytes, self._deadline())
            self._learn(there.files, is_all=there.is_all)
            if there.is_all:
                break
            seen_bytes = there.seen_bytes
            found = spans.by_file(there.ranges)
            come = [name for name, wanted in missing.items() if spans.covers(found, *wanted)]
            for name in come:
                there.files[missing.pop(name)[0]].there.add(name)
                yield name
        yield from missing

    def _deadline(self, timeout_s: float | None = None) -> Deadline:
        return Deadline(self._timeout_s if timeout_s is None else timeout_s)

    def _check_open(self) -> None:
        if self._is_closed:
            message = f"{self.name} is closed"
            raise ModelClosed(message, hint="take what you need before close(): views stay valid")
