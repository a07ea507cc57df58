"""Models in S3: what lies under a prefix, and ranged GETs of it, pinned to the ETag."""

from __future__ import annotations

import contextlib
import re
import threading
from typing import TYPE_CHECKING, NoReturn

from cached.adapters.s3.documents import MAX_LISTING_BYTES, parse_listing
from cached.adapters.s3.faults import Asked
from cached.adapters.s3.requests import Call
from cached.core.errors import (
    BadReply,
    ObjectChanged,
    ObjectMissing,
    ObjectRefused,
    StoreError,
    StoreUnavailable,
)
from cached.core.manifest import layout_path, manifest_of
from cached.core.objects import StoredObject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cached.adapters.s3.documents import Listed
    from cached.adapters.s3.requests import Connection, Head, Requests
    from cached.core.objects import Manifest, ModelRef, Part
    from cached.ports import Sink

    Stalled = Callable[[Part, int, float], None]
    """Told that a part waits: the part, the byte it waits for, seconds since the last one."""
    IsCancelled = Callable[[], bool]

_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_ETAG = re.compile(r"[\x20-\x7e\x80-\xff]+")  # what a header can hold: RFC 9110, 8.8.3
_LENGTH = re.compile(r"[0-9]{1,18}")
# Metadata of the Amazon S3 Encryption Client, all its versions: the object is ciphertext.
_ENCRYPTED = re.compile(
    r"x-amz-meta-x-amz-(key|key-v2|iv|cek-alg|wrap-alg|matdesc|tag-len|c|3|w|m|d|i|t)"
)
_CHECKSUM = "x-amz-checksum-"
# The largest models of the public hubs have some hundred files, and each keeps a descriptor of
# the daemon while it is in memory: more is a prefix that names something else than one model.
MAX_OBJECTS = 10_000
MAX_PAGES = 1_000  # AWS needs 10 for so many; servers with short or empty pages may need more
_NO_PART = -1  # what runs for a listing or a look at an object
_CHECK_STORE = "check that the endpoint is an S3-compatible server"
_MUST_DO_RANGES = "the store, and any proxy before it, must support Range and If-Match"


class S3Store:
    """The ``ObjectStore`` port. Any thread.

    Args:
        requests: sends requests.
        stalled: called by the fetch thread about every 0.1 s while a running part brings
            nothing; may raise a StoreError to give it up.
    """

    def __init__(self, requests: Requests, stalled: Stalled | None = None) -> None:
        self._requests = requests
        self._stalled = stalled
        self._lock = threading.Lock()
        self._running: dict[_Run, int] = {}  # the part id of each request that is under way
        self._is_closed = False

    def resolve(self, ref: ModelRef, is_cancelled: IsCancelled = lambda: False) -> Manifest:
        """List a prefix (the URI ends with ``/``), or look at one object.

        Args:
            ref: its name and URI.
            is_cancelled: asked before each request, and every 0.1 s while nothing comes.

        Raises:
            ObjectMissing: nothing is there.
            ObjectRefused: a key cannot be laid out, an object has no ETag or is encrypted by
                its client.
            StoreError: the store refuses.
        """
        bucket, _, key = ref.uri.removeprefix("s3://").partition("/")
        if key and not key.endswith("/"):
            return manifest_of(ref.uri, [self._object(bucket, key, is_cancelled)])
        found = [
            StoredObject(
                key=listed.key,
                path=layout_path(listed.key, key),
                size_bytes=listed.size_bytes,
                etag=_pinning(listed.etag, f"s3://{bucket}/{listed.key}"),
            )
            for listed in self._listed(Asked("s3:ListBucket", bucket, key), is_cancelled)
            if not listed.key.endswith("/")  # the marker of a directory, made by consoles
        ]
        if not found:
            message = f"no objects are under s3://{bucket}/{key}"
            hint = "check the prefix; the URI of one object has no / at its end"
            if self._is_object(bucket, key.rstrip("/"), is_cancelled):
                hint = f"did you mean the object s3://{bucket}/{key.rstrip('/')}?"
            raise ObjectMissing(message, hint=hint)
        return manifest_of(ref.uri, found)

    def fetch(self, part: Part, sink: Sink, is_cancelled: IsCancelled = lambda: False) -> None:
        """Fetch what is missing of a part.

        Raises:
            ObjectChanged: the object is not the one of the manifest any more.
            StoreError: anything else, also after ``cancel``.
        """
        start = sink.watermark
        if start >= part.stop:
            return
        stored = part.stored
        bucket = part.uri.removeprefix("s3://").partition("/")[0]
        asked = Asked("s3:GetObject", bucket, stored.key)
        call = Call(
            "GET",
            asked,
            stored.key,
            (("versionId", stored.version_id),) if stored.version_id else (),
            (("if-match", stored.etag), ("range", f"bytes={start}-{part.stop - 1}")),
        )
        run = _Run(self._watch(part, sink))
        with self._sent(call, is_cancelled, run, part.part_id) as (connection, head):
            _check_part(asked.url, part, start, head)
            connection.stream(start, part.stop, sink)

    def cancel(self, part: Part) -> None:
        """Cut running fetches of this part; they end with ``StoreUnavailable``."""
        with self._lock:
            runs = [run for run, part_id in self._running.items() if part_id == part.part_id]
        for run in runs:
            run.cancel()

    def close(self) -> None:
        """Cut whatever runs, begin nothing more, close kept connections."""
        with self._lock:
            self._is_closed = True
            runs = list(self._running)
        for run in runs:
            run.cancel()
        self._requests.close()

    @contextlib.contextmanager
    def _sent(
        self,
        call: Call,
        is_cancelled: IsCancelled,
        run: _Run | None = None,
        part_id: int = _NO_PART,
    ) -> Iterator[tuple[Connection, Head]]:
        """Send a request that can be cut from outside; then keep its connection or close it."""
        run = run or _Run(_cutting(is_cancelled))
        with self._lock:
            self._running[run] = part_id
        try:
            if self._is_closed or is_cancelled():
                run.cancel()
            run.check()
            connection, head = self._requests.send(call, run.use)
            try:
                yield connection, head
            except BaseException:
                connection.close()
                raise
        finally:
            with self._lock:
                del self._running[run]
            run.end()
        self._requests.keep(connection)
        if self._is_closed:
            self._requests.close()

    def _watch(self, part: Part, sink: Sink) -> Callable[[float], None] | None:
        stalled = self._stalled
        if stalled is None:
            return None
        return lambda idle_s: stalled(part, sink.watermark, idle_s)

    def _listed(self, asked: Asked, is_cancelled: IsCancelled) -> Iterator[Listed]:
        token = ""
        count = 0
        for _ in range(MAX_PAGES):
            query = [("list-type", "2"), ("prefix", asked.key), ("encoding-type", "url")]
            if token:
                query.append(("continuation-token", token))
            call = Call("GET", asked, "", tuple(query))
            with self._sent(call, is_cancelled) as (connection, _head):
                page = parse_listing(connection.read(MAX_LISTING_BYTES))
            count += len(page.objects)
            if count > MAX_OBJECTS:
                message = f"more than {MAX_OBJECTS} objects are under {asked.url}"
                raise ObjectRefused(message, hint="name the prefix of one model, with / at its end")
            yield from page.objects
            if not page.next_token:
                return
            if page.next_token == token:
                raise BadReply("the store lists the same page again and again", hint=_CHECK_STORE)
            token = page.next_token
        message = f"the listing of {asked.url} does not end after {MAX_PAGES} pages"
        raise ObjectRefused(message, hint=_CHECK_STORE)

    def _object(self, bucket: str, key: str, is_cancelled: IsCancelled) -> StoredObject:
        asked = Asked("s3:GetObject", bucket, key)
        try:
            head = self._look_at(asked, is_cancelled)
        except ObjectMissing as error:
            below = Asked("s3:ListBucket", bucket, f"{key}/")
            if not self._is_prefix(below, is_cancelled):
                raise
            hint = f"did you mean the objects under {below.url}?"
            raise ObjectMissing(error.message, hint=hint) from error
        _check_plain(asked.url, head)
        length = head.headers.get("content-length", "")
        if not _LENGTH.fullmatch(length):
            message = f"the store does not tell the size of {asked.url}"
            raise BadReply(message, hint=_CHECK_STORE)
        return StoredObject(
            key=key,
            path=layout_path(key.rpartition("/")[2], ""),
            size_bytes=int(length),
            etag=_pinning(head.headers.get("etag", ""), asked.url),
            version_id=_version(head),
            checksum=_checksum(head),
        )

    def _look_at(self, asked: Asked, is_cancelled: IsCancelled) -> Head:
        """Return the head of an object.

        The reply to a HEAD request has no body that tells what is wrong. So a GET is refused
        as well, for its reason; if it is not, that reason was mended, and HEAD works now.
        """
        look = Call("HEAD", asked, asked.key, (), (("x-amz-checksum-mode", "ENABLED"),))
        try:
            return self._head(look, is_cancelled)
        except StoreError as error:
            if error.transient:
                raise
            ask_why = Call("GET", asked, asked.key, (), (("range", "bytes=0-0"),))
            with contextlib.suppress(ObjectChanged):  # 416: it is empty
                self._head(ask_why, is_cancelled)
            return self._head(look, is_cancelled)

    def _head(self, call: Call, is_cancelled: IsCancelled) -> Head:
        with self._sent(call, is_cancelled) as (_, head):
            return head

    def _is_object(self, bucket: str, key: str, is_cancelled: IsCancelled) -> bool:
        """Return whether there surely is such an object: only for a hint."""
        if not key:
            return False
        try:
            self._look_at(Asked("s3:GetObject", bucket, key), is_cancelled)
        except StoreError:
            return False
        return True

    def _is_prefix(self, asked: Asked, is_cancelled: IsCancelled) -> bool:
        """Return whether there surely are objects below a prefix: only for a hint."""
        try:
            return next(self._listed(asked, is_cancelled), None) is not None
        except StoreError:
            return False


class _Run:
    """One request under way: the connection it uses now, and whether it was cancelled."""

    __slots__ = ("_connection", "_is_cancelled", "_lock", "_on_idle")

    def __init__(self, on_idle: Callable[[float], None] | None) -> None:
        self._on_idle = on_idle
        self._connection: Connection | None = None
        self._is_cancelled = False
        self._lock = threading.Lock()

    def use(self, connection: Connection) -> None:
        """Take note of the connection that is used from now on."""
        connection.watch(self._on_idle)
        with self._lock:
            self._connection = connection
        self.check()

    def check(self) -> None:
        """Raise if it was cancelled."""
        if self._is_cancelled:
            _refuse_cancelled()

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
            if self._connection is not None:
                self._connection.cancel()

    def end(self) -> None:
        """Leave the connection alone from now on: it may serve another request."""
        with self._lock:
            self._connection = None


def _cutting(is_cancelled: IsCancelled) -> Callable[[float], None]:
    """Return what ends a request, while nothing comes, that nobody wants any more."""

    def idle(_idle_s: float) -> None:
        if is_cancelled():
            _refuse_cancelled()

    return idle


def _refuse_cancelled() -> NoReturn:
    raise StoreUnavailable("the request was cancelled")


def _check_part(url: str, part: Part, start: int, head: Head) -> None:
    """Raise unless the reply is exactly what was asked for; its length is checked later."""
    _check_plain(url, head)
    etag = _pinning(head.headers.get("etag", ""), url)
    if etag != part.stored.etag:
        message = f"{url} has the ETag {etag} now, had {part.stored.etag}"
        raise ObjectChanged(message, hint="open the model again for its new version")
    size_bytes = part.stored.size_bytes
    if head.status == 200:
        if start == 0 and part.stop == size_bytes:
            return  # all of it was asked for
        message = f"the store answered 200 and all of {url} instead of a range"
        raise BadReply(message, hint=_MUST_DO_RANGES)
    told = head.headers.get("content-range", "")
    match = _RANGE.fullmatch(told)
    wanted = (start, part.stop - 1, size_bytes)
    if head.status != 206 or match is None or tuple(map(int, match.groups())) != wanted:
        message = (
            f"asked for bytes {start}-{part.stop - 1}/{size_bytes} of {url}, "
            f"got {head.status} with {told[:80]!r}"
        )
        raise BadReply(message, hint=_MUST_DO_RANGES)


def _check_plain(url: str, head: Head) -> None:
    name = next((name for name in head.headers if _ENCRYPTED.fullmatch(name)), None)
    if name is not None:
        message = f"{url} was encrypted by its client ({name.removeprefix('x-amz-meta-')})"
        hint = "weights must be readable as they lie: encrypt them with SSE-S3 or SSE-KMS instead"
        raise ObjectRefused(message, hint=hint)


def _pinning(etag: str, url: str) -> str:
    """Return an ETag that If-Match works with."""
    if not etag:
        _unpinned(f"the store tells no ETag of {url}")
    if etag.startswith("W/"):
        _unpinned(f"the store tells only a weak ETag of {url}: {etag[:80]}")
    if not _ETAG.fullmatch(etag):
        message = f"the store tells an ETag of {url} that no header can hold: {etag[:80]!r}"
        raise BadReply(message, hint=_CHECK_STORE)
    return etag


def _unpinned(message: str) -> NoReturn:
    hint = "without a strong ETag a replaced object goes unnoticed: use a store that has them"
    raise ObjectRefused(message, hint=hint)


def _version(head: Head) -> str | None:
    version = head.headers.get("x-amz-version-id")
    return None if version in {None, "", "null"} else version


def _checksum(head: Head) -> str | None:
    """Return the checksum of the whole object; one of the parts of an upload is of no use."""
    if head.headers.get(f"{_CHECKSUM}type") == "COMPOSITE":
        return None
    for name, value in head.headers.items():
        if name.startswith(_CHECKSUM) and name != f"{_CHECKSUM}type" and "-" not in value:
            return f"{name.removeprefix(_CHECKSUM)}:{value}"
    return None
