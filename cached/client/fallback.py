"""A model straight from its store, for a worker that no daemon answers.

Every process that does this has its own copy in memory and fetches it alone; so it is asked
for by ``cached.open(fallback="s3")``, warns, and is imported only then.
"""

from __future__ import annotations

import math
import os
import random
import threading
import warnings
from typing import TYPE_CHECKING, TypeVar

from cached.adapters.clock import SystemClock
from cached.adapters.credentials import Credentials
from cached.adapters.http_reader.dialer import Dialer
from cached.adapters.http_reader.heads import request_head
from cached.adapters.local_files import LocalFiles
from cached.adapters.s3 import S3Store
from cached.adapters.s3.addresses import Addresses
from cached.adapters.s3.customer_key import headers_of
from cached.adapters.s3.requests import Requests, Tools
from cached.adapters.segments.part_sink import OpenFile, PartSink
from cached.adapters.sigv4 import Signer, quote_path, quote_query
from cached.client import settings
from cached.client.mappings import File, Lease, close_all
from cached.client.model import Model
from cached.client.private_directory import PrivateDirectory
from cached.client.source import There
from cached.core import header
from cached.core.backoff import delay_s
from cached.core.config import resolve
from cached.core.errors import (
    CachedError,
    InvalidConfig,
    LoadFailed,
    OutOfSpace,
    StoreError,
    TimedOut,
    VersionUnknown,
)
from cached.core.objects import FileRef, Part, VersionRef
from cached.core.parts import MAX_PART_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cached.client.deadline import Deadline
    from cached.client.spans import Range
    from cached.core.config import Config
    from cached.core.objects import Manifest, ModelRef, StoredObject
    from cached.ports import ObjectStore

    Parts = Sequence[tuple[Part, PartSink]]

T = TypeVar("T")

CUT_S = 0.05  # what is cut when time is up mostly ends and tidies up within this


def read(name: str, *, why: str, deadline: Deadline, version: str | None = None) -> Model:
    """Return a model that is complete, in memory of this process alone.

    Its files lie in a private directory, which is removed when the model is closed and the
    last view is gone, or when the process ends; of a killed one, when the next one is made.

    Args:
        name: of the model; ``CACHED_MODELS`` or the file must say where it is stored.
        why: the daemon cannot be asked, for the warning.
        deadline: of all that this does.
        version: that it must be; ``None``: whichever the store has.

    Raises:
        VersionUnknown: the store has another version.
        InvalidConfig: nobody says where the model is stored; or a setting is wrong.
        StoreError: what the store did.
        LoadFailed: a file is not what its name says.
        OutOfSpace: it does not fit into memory.
        TimedOut: the deadline has passed.
    """
    levels = settings.levels()
    if not any(name in level.models for level in levels):
        message = f"{why}; and where {name} is stored is not known"
        raise InvalidConfig(message, hint=f"set CACHED_MODELS='{name}=s3://BUCKET/PREFIX/'")
    config = resolve(levels)
    ref = next(model for model in config.models if model.name == name)
    message = (
        f"{why}: reading {name} from {ref.uri} into memory of this process alone, "
        "which every worker does again; start the daemon to share it"
    )
    warnings.warn(message, RuntimeWarning, stacklevel=3)
    reading = _Reading(ref, config, deadline)
    manifest, directory = reading.in_time(lambda: _fetched(reading, version))
    lease = Lease(directory.remove)
    try:
        source = LocalSource(ref, config, manifest, directory.path, lease)
        return Model(
            name=name,
            version=manifest.version,
            source=source,
            is_complete=True,
            path=directory.path,
            timeout_s=deadline.timeout_s,
        )
    finally:
        lease.release(None)


class LocalSource:
    """A complete directory (``model.Source``).

    Args:
        ref: to the model.
        config: that it was read with.
        manifest: of the files.
        directory: they are in.
        lease: that its ``close`` removes it.
    """

    def __init__(
        self, ref: ModelRef, config: Config, manifest: Manifest, directory: str, lease: Lease
    ) -> None:
        self.lease = lease
        self._ref = ref
        self._config = config
        self._version = manifest.version
        self._directory = directory
        self.files: list[File] = []
        for stored in manifest.objects:
            path = f"{directory}/{stored.path}"
            file = File(stored.path, stored.size_bytes, _header_bytes(path, stored))
            self.files.append(file)
            file.map(os.open(path, os.O_RDONLY | os.O_CLOEXEC), lease)

    def wait(self, ranges: Sequence[Range], deadline: Deadline, what: str) -> There:
        """Return that all is there."""
        return There(self.files, is_all=True)

    def path(self, deadline: Deadline) -> tuple[str, list[File]]:
        """Return the directory."""
        return self._directory, self.files

    def arrivals(self, seen_bytes: int, deadline: Deadline) -> There:
        """Return that all is there."""
        sizes = [file.size_bytes for file in self.files]
        ranges = [(index, 0, size) for index, size in enumerate(sizes)]
        return There(self.files, is_all=True, ranges=ranges, seen_bytes=sum(sizes))

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
        reading = _Reading(self._ref, self._config, deadline)
        return reading.in_time(reading.resolve).version != self._version

    def drop(self) -> None:
        """Let go of all mappings."""
        for file in self.files:
            file.drop()


def _store(uri: str, config: Config, deadline: Deadline) -> ObjectStore:
    """Return the store of a URI; the caller closes it. No wait of it outlasts the deadline much."""
    if uri.startswith("file:"):
        return LocalFiles()
    left_s = math.inf if deadline.left_s is None else deadline.left_s
    clock = SystemClock()
    dialer = Dialer(
        connect_timeout_s=min(config.connect_timeout_s, left_s),
        receive_timeout_s=min(config.receive_timeout_s, left_s),
        ca_bundle=config.ca_bundle,
    )
    key_file = config.sse_customer_key_file
    tools = Tools(
        connect=dialer.connect,
        request_head=request_head,
        sign=Signer().sign,
        quote_query=quote_query,
        credentials=None if config.anonymous else Credentials(dialer.exchange, clock),
        warn=lambda event, fields: None,  # a library that is imported does not log
        customer_key=None if key_file is None else lambda: headers_of(key_file),
    )
    addresses = Addresses(
        config.endpoint_url,
        config.addressing_style,
        quote_path,
        allow_insecure=config.allow_insecure_endpoint,
        sends_key=config.sse_customer_key_file is not None,
    )
    return S3Store(Requests(addresses, tools, clock, config.region, config.fetch_threads))


class _Reading:
    """A model on its way from its store: over when one request failed, or nobody waits any more.

    ``in_time`` closes its store, and is called once.

    Args:
        ref: to the model.
        config: of the store.
        deadline: of whoever waits.
    """

    def __init__(self, ref: ModelRef, config: Config, deadline: Deadline) -> None:
        self._ref = ref
        self._config = config
        self._deadline = deadline
        self._store = _store(ref.uri, config, deadline)
        self._errors: list[CachedError] = []
        self._is_over = threading.Event()

    def in_time(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns; it runs in a thread of its own.

        Not everything can be cut in time (looking up a name, connecting, asking for credentials).
        So a thread that is late is left behind: it ends with its next request, and tidies up.

        Raises:
            TimedOut: the deadline has passed.
        """
        found: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                found.append(work())
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                errors.append(error)

        thread = threading.Thread(target=run, name="cached-fallback", daemon=True)
        thread.start()
        try:
            while thread.is_alive() and not self._deadline.has_passed:
                thread.join(self._deadline.left_s)
            is_late = thread.is_alive()
        finally:
            self._stop()
        thread.join(CUT_S)
        if found:
            return found[0]
        if is_late:
            message = f"waited {self._deadline.timeout_s or 0:g} s for {self._ref.uri} in vain"
            hint = "give more time (timeout_s), or start the daemon"
            raise TimedOut(message, hint=hint) from (errors[0] if errors else None)
        raise errors[0]

    def resolve(self) -> Manifest:
        """Return the objects of the model; try again after what may pass.

        Raises:
            StoreError: what the store did.
        """
        failures = 0
        while True:
            try:
                return self._store.resolve(self._ref)
            except StoreError as error:
                failures += 1
                self._pause(error, failures)

    def fetch(self, parts: Parts) -> None:
        """Fetch all parts, in threads that have ended when it returns.

        Raises:
            StoreError: what the store did; also when nobody waits any more.
            LoadFailed: a thread died.
        """
        left = list(parts[::-1])
        threads = [
            threading.Thread(target=self._run, args=(left,), name=f"cached-fallback-{number}")
            for number in range(min(self._config.fetch_threads, len(left)))
        ]
        for thread in threads:
            thread.daemon = True
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        if self._is_over.is_set() or any(sink.watermark != part.stop for part, sink in parts):
            message = f"reading {self._ref.uri} ended before all was there"
            raise LoadFailed(message, hint="this is a defect of cached: please report it")

    def _run(self, left: list[tuple[Part, PartSink]]) -> None:
        """Fetch one part after another; in each thread."""
        try:
            while not self._is_over.is_set():
                self._fetch(*left.pop())
        except IndexError:
            pass  # nothing is left
        except CachedError as error:
            self._errors.append(error)
            self._stop()

    def _fetch(self, part: Part, sink: PartSink) -> None:
        """Fetch a part; go on after what may pass, unless no byte comes time and again."""
        failures = 0
        while True:
            before = sink.watermark
            try:
                self._store.fetch(part, sink)
            except StoreError as error:
                failures = 1 if sink.watermark > before else failures + 1
                self._pause(error, failures)
            else:
                return

    def _pause(self, error: StoreError, failures: int) -> None:
        """Wait before the next attempt; raise the error if there will be none."""
        if not error.transient or failures >= self._config.max_attempts:
            raise error
        jitter_ratio = random.random()  # noqa: S311 - no secret
        if self._is_over.wait(delay_s(failures, jitter_ratio, error.retry_after_s)):
            raise error

    def _stop(self) -> None:
        """Cut what runs; may be called again."""
        self._is_over.set()
        self._store.close()


def _fetched(reading: _Reading, version: str | None) -> tuple[Manifest, PrivateDirectory]:
    """Return a model's files in a directory; nothing is left of it after an error."""
    manifest = reading.resolve()
    if version not in {None, manifest.version}:
        message = f"version {version} is not to be had: the store has {manifest.version}"
        raise VersionUnknown(message, hint="leave version out, or start the daemon that keeps it")
    directory = PrivateDirectory()
    opened: list[OpenFile] = []
    try:
        opened.extend(_made(directory.path, stored) for stored in manifest.objects)
        reading.fetch(_parts(manifest, opened))
    except BaseException:
        directory.remove()
        raise
    finally:
        for file in opened:
            file.close()
    return manifest, directory


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
        for start in range(0, stored.size_bytes, MAX_PART_BYTES):
            stop = min(start + MAX_PART_BYTES, stored.size_bytes)
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
