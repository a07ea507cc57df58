"""A model straight from its store, for a worker that no daemon answers.

Every process that does this has its own copy in memory and fetches it alone; so it is asked
for by ``cached.open(fallback="s3")``, warns, and is imported only then.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import TYPE_CHECKING

from cached.adapters.clock import SystemClock
from cached.adapters.credentials import Credentials
from cached.adapters.http_reader.dialer import Dialer
from cached.adapters.http_reader.heads import request_head
from cached.adapters.local_files import LocalFiles
from cached.adapters.s3 import S3Store
from cached.adapters.s3.addresses import Addresses
from cached.adapters.s3.requests import Requests, Tools
from cached.adapters.segments.part_sink import OpenFile, PartSink
from cached.adapters.sigv4 import Signer, quote_path, quote_query
from cached.client import settings
from cached.client.deadline import Deadline
from cached.client.mappings import File, Lease, close_all
from cached.client.model import Model
from cached.client.private_directory import PrivateDirectory
from cached.core import header
from cached.core.errors import (
    CachedError,
    InvalidConfig,
    LoadFailed,
    OutOfSpace,
    StoreError,
    TimedOut,
)
from cached.core.objects import FileRef, ModelRef, Part, VersionRef

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cached.client.model import Range
    from cached.core.objects import Manifest, StoredObject
    from cached.ports import ObjectStore

PART_BYTES = 8 << 20
THREADS = 8
ATTEMPTS = 6
FIRST_PAUSE_S = 0.05  # doubles with each attempt
LOOK_S = 0.05  # how soon the end of the time is noticed
CONNECT_TIMEOUT_S = 3.0
RECEIVE_TIMEOUT_S = 10.0


def read(name: str, *, why: str, timeout_s: float | None) -> Model:
    """Return a model that is complete, in memory of this process alone.

    Its files lie in a private directory, which is removed when the model is closed and the
    last view is gone, or when the process ends; of a killed one, when the next one is made.

    Args:
        name: of the model; ``CACHED_MODELS`` or the file must say where it is stored.
        why: the daemon cannot be asked, for the warning.
        timeout_s: ``None``: no limit.

    Raises:
        InvalidConfig: nobody says where the model is stored.
        StoreError: what the store did.
        LoadFailed: a file is not what its name says.
        OutOfSpace: it does not fit into memory.
        TimedOut: ``timeout_s`` ended.
    """
    deadline = Deadline(timeout_s)
    uri = settings.model_uri(name)
    if uri is None:
        message = f"{why}; and where {name} is stored is not known"
        raise InvalidConfig(message, hint=f"set CACHED_MODELS='{name}=s3://BUCKET/PREFIX/'")
    message = (
        f"{why}: reading {name} from {uri} into memory of this process alone, "
        "which every worker does again; start the daemon to share it"
    )
    warnings.warn(message, RuntimeWarning, stacklevel=3)
    store = _store(uri)
    try:
        manifest = store.resolve(ModelRef(name, uri))
        directory = PrivateDirectory()
        lease = Lease(directory.remove)
        try:
            _fill(store, manifest, directory.path, deadline)
            source = LocalSource(name, manifest, directory.path, lease)
            return Model(
                name=name,
                version=manifest.version,
                files=source.files,
                source=source,
                is_complete=True,
                path=directory.path,
                timeout_s=timeout_s,
            )
        finally:
            lease.release(None)
    finally:
        store.close()


class LocalSource:
    """A complete directory (``model.Source``).

    Args:
        name: of the model, for errors.
        manifest: of the files.
        directory: they are in.
        lease: that its ``close`` removes it.
    """

    def __init__(self, name: str, manifest: Manifest, directory: str, lease: Lease) -> None:
        self.lease = lease
        self._uri = manifest.uri
        self._version = manifest.version
        self._name = name
        self._directory = directory
        self.files: list[File] = []
        for stored in manifest.objects:
            path = f"{directory}/{stored.path}"
            file = File(stored.path, stored.size_bytes, _header_bytes(path, stored))
            self.files.append(file)
            file.map(os.open(path, os.O_RDONLY | os.O_CLOEXEC), lease)

    def wait(self, ranges: Sequence[Range], deadline: Deadline, what: str) -> bool:
        """Return True: all is there."""
        return True

    def path(self, deadline: Deadline) -> str:
        """Return the directory."""
        return self._directory

    def arrivals(self, seen_bytes: int, deadline: Deadline) -> tuple[int, list[Range], bool]:
        """Return that all is there."""
        sizes = [file.size_bytes for file in self.files]
        return sum(sizes), [(index, 0, size) for index, size in enumerate(sizes)], True

    def descriptors(self, files: Sequence[int], deadline: Deadline) -> list[int]:
        """Return new read-only descriptors of files; the caller closes them."""
        found: list[int] = []
        try:
            for index in files:
                path = f"{self._directory}/{self.files[index].path}"
                found.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            close_all(found)
            raise
        return found

    def is_stale(self, deadline: Deadline) -> bool:
        """Ask the store whether it holds another version now."""
        store = _store(self._uri)
        try:
            return store.resolve(ModelRef(self._name, self._uri)).version != self._version
        finally:
            store.close()


def _store(uri: str) -> ObjectStore:
    """Return the store of a URI; the caller closes it."""
    if uri.startswith("file:"):
        return LocalFiles()
    if not uri.startswith("s3:"):
        message = f"{uri} must begin with s3:// or file://"
        raise InvalidConfig(message, hint="correct it in CACHED_MODELS")
    given: Mapping[str, str] = settings.store_settings()
    clock = SystemClock()
    dialer = Dialer(
        connect_timeout_s=CONNECT_TIMEOUT_S,
        receive_timeout_s=RECEIVE_TIMEOUT_S,
        ca_bundle=given.get("ca_bundle"),
    )
    tools = Tools(
        connect=dialer.connect,
        request_head=request_head,
        sign=Signer().sign,
        quote_query=quote_query,
        credentials=None if "anonymous" in given else Credentials(dialer.exchange, clock),
        warn=lambda event, fields: None,  # a library that is imported does not log
    )
    addresses = Addresses(
        given.get("endpoint_url"),
        given.get("addressing_style", "auto"),
        quote_path,
        allow_insecure="allow_insecure_endpoint" in given,
    )
    return S3Store(Requests(addresses, tools, clock, given.get("region")))


class _Filling:
    """Parts that threads fetch until none is left, one fails, or time is up.

    Args:
        store: to fetch from.
        parts: each with where its bytes go.
    """

    def __init__(self, store: ObjectStore, parts: list[tuple[Part, PartSink]]) -> None:
        self._store = store
        self._all = parts
        self._left = parts[::-1]
        self._running: dict[int, Part] = {}
        self._errors: list[CachedError] = []
        self._is_stopped = threading.Event()

    def run(self, uri: str, deadline: Deadline) -> None:
        """Fetch all parts, in threads that have ended when it returns.

        Raises:
            StoreError: what the store did.
            TimedOut: time was up.
            LoadFailed: a thread died.
        """
        threads = [
            threading.Thread(target=self._run, name=f"cached-fallback-{number}", daemon=True)
            for number in range(min(THREADS, len(self._left)))
        ]
        is_late = False
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not is_late:
                _join(threads)
                is_late = deadline.has_passed
        finally:
            while any(thread.is_alive() for thread in threads):
                self._stop()
                _join(threads)
        if all(sink.watermark == part.stop for part, sink in self._all):
            return
        if is_late:
            message = f"waited {deadline.timeout_s or 0:g} s for {uri} to be read in vain"
            raise TimedOut(message, hint="give more time (timeout_s), or start the daemon")
        if self._errors:
            raise self._errors[0]
        message = f"reading {uri} ended before all was there"
        raise LoadFailed(message, hint="this is a defect of cached: please report it")

    def _run(self) -> None:
        """Fetch one part after another; in each thread."""
        while not self._is_stopped.is_set():
            try:
                part, sink = self._left.pop()
            except IndexError:
                return
            self._running[part.part_id] = part
            try:
                self._fetch(part, sink)
            except CachedError as error:
                self._errors.append(error)
                self._stop()
            finally:
                del self._running[part.part_id]

    def _stop(self) -> None:
        """Cut what runs; may be called again."""
        self._is_stopped.set()
        for part in list(self._running.values()):
            self._store.cancel(part)

    def _fetch(self, part: Part, sink: PartSink) -> None:
        """Fetch a part; go on after what may pass, unless no byte comes time and again."""
        attempt = 0
        while True:
            before = sink.watermark
            try:
                self._store.fetch(part, sink)
            except StoreError as error:
                attempt = 1 if sink.watermark > before else attempt + 1
                if not error.transient or attempt == ATTEMPTS or self._is_stopped.is_set():
                    raise
                pause_s = max(FIRST_PAUSE_S * 2**attempt, error.retry_after_s or 0.0)
                self._is_stopped.wait(pause_s)
            else:
                return


def _join(threads: list[threading.Thread]) -> None:
    """Wait a moment for the first that still runs."""
    next((thread for thread in threads if thread.is_alive()), threads[0]).join(LOOK_S)


def _fill(store: ObjectStore, manifest: Manifest, directory: str, deadline: Deadline) -> None:
    """Make all files and fetch them."""
    opened: list[OpenFile] = []
    try:
        opened.extend(_made(directory, stored) for stored in manifest.objects)
        _Filling(store, _parts(manifest, opened)).run(manifest.uri, deadline)
    finally:
        for file in opened:
            file.close()


def _made(directory: str, stored: StoredObject) -> OpenFile:
    """Make a file at its full length, with its pages."""
    path = f"{directory}/{stored.path}"
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if stored.size_bytes:
            os.posix_fallocate(fd, 0, stored.size_bytes)
    except OSError as error:
        os.close(fd)
        message = f"cannot reserve {stored.size_bytes} bytes for {stored.path}: {error.strerror}"
        hint = "free memory, or start the daemon: it holds one copy for all workers"
        raise OutOfSpace(message, hint=hint) from error
    return OpenFile(fd, stored.path, stored.size_bytes)


def _parts(manifest: Manifest, opened: list[OpenFile]) -> list[tuple[Part, PartSink]]:
    of = VersionRef("fallback", manifest.version)
    found: list[tuple[Part, PartSink]] = []
    for index, stored in enumerate(manifest.objects):
        for start in range(0, stored.size_bytes, PART_BYTES):
            stop = min(start + PART_BYTES, stored.size_bytes)
            part = Part(len(found), FileRef(of, index), manifest.uri, stored, start, stop)
            found.append((part, PartSink(opened[index], start, stop)))
    return found


def _header_bytes(path: str, stored: StoredObject) -> int | None:
    """Check a file's header as the daemon does; return where its data begin."""
    if not stored.is_safetensors:
        return None
    try:
        with open(path, "rb") as file:
            first = file.read(header.LENGTH_BYTES)
            size_bytes = header.header_bytes(first, stored.size_bytes)
            raw = first + file.read(size_bytes - len(first))
        return header.parse(raw, stored.size_bytes).header_bytes
    except CachedError as error:
        message = f"{stored.path}: {error.message}"
        raise LoadFailed(message, hint=error.hint) from error
