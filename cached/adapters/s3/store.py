"""Models in S3: what lies under a prefix, and ranged GETs of it, pinned to the ETag."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from typing import TYPE_CHECKING

from cached.adapters.s3.documents import MAX_ERROR_BYTES, MAX_LISTING_BYTES, parse_listing
from cached.adapters.s3.faults import Asked
from cached.adapters.s3.replies import (
    CHECK_STORE,
    check_object,
    check_part,
    check_plain,
    composite_of,
    facts_of,
    has_composite,
    length_of,
    pinning,
)
from cached.adapters.s3.requests import Call
from cached.adapters.s3.running import Running
from cached.cancellation import NEVER
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

    from cached.adapters.s3.connections import Head
    from cached.adapters.s3.documents import Listed
    from cached.adapters.s3.requests import Requests
    from cached.core.objects import Manifest, ModelRef, ObjectFacts, Part
    from cached.ports import Cancellation, Sink

    Stalled = Callable[[Part, int, float], None]
    """Told that a part waits: the part, the byte it waits for, seconds since the last one."""

# The largest models of the public hubs have some hundred files, and each keeps a descriptor of
# the daemon while it is in memory: more is a prefix that names something else than one model.
MAX_OBJECTS = 10_000
MAX_PAGES = 1_000  # AWS needs 10 for so many; servers with short or empty pages may need more


class S3Store:
    """The ``ObjectStore`` port. Any thread.

    Args:
        requests: sends requests.
        stalled: called by the fetch thread about every 0.05 s while a running part brings
            nothing, not even the head of its reply; may raise a StoreError to give it up.
    """

    def __init__(self, requests: Requests, stalled: Stalled | None = None) -> None:
        self._requests = requests
        self._running = Running(requests)
        self._stalled = stalled

    def resolve(self, ref: ModelRef, cancellation: Cancellation = NEVER) -> Manifest:
        """List a prefix (the URI ends with ``/``), or look at one object.

        Raises:
            ObjectMissing: nothing is there.
            ObjectRefused: a key cannot be laid out, an object has no ETag or is encrypted by
                its client.
            StoreError: the store refuses.
        """
        bucket, key = _split(ref.uri)
        if key and not key.endswith("/"):
            return manifest_of(ref.uri, [self._object(bucket, key, cancellation)])
        found = [
            StoredObject(
                key=listed.key,
                path=layout_path(listed.key, key),
                size_bytes=listed.size_bytes,
                etag=pinning(listed.etag, f"s3://{bucket}/{listed.key}"),
            )
            for listed in self._listed(Asked("s3:ListBucket", bucket, key), cancellation)
            if not listed.key.endswith("/")  # the marker of a directory, made by consoles
        ]
        if not found:
            message = f"no objects are under s3://{bucket}/{key}"
            hint = "check the prefix; the URI of one object has no / at its end"
            if self._is_object(bucket, key.rstrip("/"), cancellation):
                hint = f"did you mean the object s3://{bucket}/{key.rstrip('/')}?"
            raise ObjectMissing(message, hint=hint)
        return manifest_of(ref.uri, found)

    def describe(
        self, uri: str, stored: StoredObject, cancellation: Cancellation = NEVER
    ) -> ObjectFacts:
        """Ask for one object's head; and for its first part's, if only the parts are summed up.

        Raises:
            ObjectChanged: the object is not the one of the manifest any more.
            ObjectRefused: it is encrypted by its client.
            StoreError: anything else.
        """
        look = _pinned("HEAD", uri, stored, _WITH_CHECKSUM)
        head = self._look_at(look, cancellation)
        check_object(look.asked.url, stored, head)
        facts = facts_of(head)
        if facts.checksum is None and has_composite(head):
            part_bytes = self._part_bytes(look, stored, 1, cancellation)
            checksum = composite_of(head, part_bytes, stored.size_bytes)
            parts = -(-stored.size_bytes // part_bytes) if checksum else 0
            if parts > 1:  # the last one tells whether those between are as long as the first
                last_bytes = self._part_bytes(look, stored, parts, cancellation)
                if (parts - 1) * part_bytes + last_bytes != stored.size_bytes:
                    checksum = None
            facts = facts._replace(checksum=checksum)
        return facts

    def _part_bytes(
        self, look: Call, stored: StoredObject, number: int, cancellation: Cancellation
    ) -> int:
        """Return the length of one part of an object's upload; that of the whole if it has none."""
        query = (*look.query, ("partNumber", str(number)))
        head = self._head(look._replace(query=query), cancellation)
        check_object(look.asked.url, stored, head)
        return length_of(look.asked.url, head)

    def read(
        self, uri: str, stored: StoredObject, cancellation: Cancellation, most_bytes: int
    ) -> bytes:
        """Return a small object whole.

        Raises:
            ObjectRefused: it is longer than ``most_bytes``.
            ObjectChanged: the object is not the one of the manifest any more.
            StoreError: anything else.
        """
        call = _pinned("GET", uri, stored)
        if stored.size_bytes > most_bytes:
            message = f"{call.asked.url} has {stored.size_bytes} bytes, the limit is {most_bytes}"
            raise ObjectRefused(message, hint="look at what it holds")
        with self._running.sent(call, cancellation) as (connection, head):
            check_object(call.asked.url, stored, head)
            body = connection.read(stored.size_bytes)
        if len(body) != stored.size_bytes:
            message = f"{call.asked.url} came with {len(body)} bytes, had {stored.size_bytes}"
            raise BadReply(message, hint=CHECK_STORE)
        return body

    def put(self, uri: str, body: bytes) -> None:
        """Make or replace one small object, of JSON; the store keeps its SHA-256.

        Args:
            uri: ``s3://bucket/key``.
            body: all of it.

        Raises:
            StoreError: the store refuses.
        """
        bucket, key = _split(uri)
        checksum = b64encode(hashlib.sha256(body).digest()).decode()
        headers = (("content-type", "application/json"), ("x-amz-checksum-sha256", checksum))
        call = Call("PUT", Asked("s3:PutObject", bucket, key), key, (), headers, body)
        with self._running.sent(call, NEVER) as (connection, _):
            connection.read(MAX_ERROR_BYTES)

    def fetch(self, part: Part, sink: Sink, cancellation: Cancellation = NEVER) -> float | None:
        """Fetch what is missing of a part.

        Returns:
            Seconds from the request to the head of its reply.

        Raises:
            ObjectChanged: the object is not the one of the manifest any more.
            StoreUnavailable: also when another call brought all while this one waited.
            StoreError: anything else.
        """
        start = sink.watermark
        if start >= part.stop:
            return None
        wanted = ("range", f"bytes={start}-{part.stop - 1}")
        call = _pinned("GET", part.uri, part.stored, wanted)
        on_idle = self._watch(part, sink)
        began_s = self._requests.now_s()
        with self._running.sent(call, cancellation, on_idle) as (connection, head):
            first_byte_s = self._requests.now_s() - began_s
            check_part(call.asked.url, part, start, head)
            connection.stream(start, part.stop, sink)
        return first_byte_s

    def close(self) -> None:
        """Cut whatever runs, begin nothing more, close kept connections."""
        self._running.close()

    def _watch(self, part: Part, sink: Sink) -> Callable[[float], None]:
        def idle(idle_s: float) -> None:
            if sink.watermark >= part.stop:
                message = f"bytes {part.start} to {part.stop} of {part.stored.key} came otherwise"
                raise StoreUnavailable(message)
            if self._stalled is not None:
                self._stalled(part, sink.watermark, idle_s)

        return idle

    def _listed(self, asked: Asked, cancellation: Cancellation) -> Iterator[Listed]:
        token = ""
        count = 0
        for _ in range(MAX_PAGES):
            query = [("list-type", "2"), ("prefix", asked.key), ("encoding-type", "url")]
            if token:
                query.append(("continuation-token", token))
            call = Call("GET", asked, "", tuple(query))
            with self._running.sent(call, cancellation) as (connection, _):
                page = parse_listing(connection.read(MAX_LISTING_BYTES))
            count += len(page.objects)
            if count > MAX_OBJECTS:
                message = f"more than {MAX_OBJECTS} objects are under {asked.url}"
                raise ObjectRefused(message, hint="name the prefix of one model, with / at its end")
            yield from page.objects
            if not page.next_token:
                return
            if page.next_token == token:
                raise BadReply("the store lists the same page again and again", hint=CHECK_STORE)
            token = page.next_token
        message = f"the listing of {asked.url} does not end after {MAX_PAGES} pages"
        raise ObjectRefused(message, hint=CHECK_STORE)

    def _object(self, bucket: str, key: str, cancellation: Cancellation) -> StoredObject:
        asked = Asked("s3:GetObject", bucket, key)
        try:
            head = self._look_at(_look(asked), cancellation)
        except ObjectMissing as error:
            below = Asked("s3:ListBucket", bucket, f"{key}/")
            if not self._is_prefix(below, cancellation):
                raise
            hint = f"did you mean the objects under {below.url}?"
            raise ObjectMissing(error.message, hint=hint) from error
        check_plain(asked.url, head)
        facts = facts_of(head)
        return StoredObject(
            key=key,
            path=layout_path(key.rpartition("/")[2], ""),
            size_bytes=length_of(asked.url, head),
            etag=pinning(head.headers.get("etag", ""), asked.url),
            version_id=facts.version_id,
            checksum=facts.checksum,
        )

    def _look_at(self, look: Call, cancellation: Cancellation) -> Head:
        """Return the head of an object.

        The reply to a HEAD request has no body that tells what is wrong. So a GET is refused
        as well, for its reason; if it is not, that reason was mended, and HEAD works now.
        """
        try:
            return self._head(look, cancellation)
        except StoreError as error:
            if error.transient or isinstance(error, ObjectChanged):
                raise
            headers = (*look.headers, ("range", "bytes=0-0"))
            try:
                self._head(look._replace(method="GET", headers=headers), cancellation)
            except ObjectChanged:
                if "if-match" in dict(look.headers):
                    raise  # else 416: it is empty
            return self._head(look, cancellation)

    def _head(self, call: Call, cancellation: Cancellation) -> Head:
        with self._running.sent(call, cancellation) as (_, head):
            return head

    def _is_object(self, bucket: str, key: str, cancellation: Cancellation) -> bool:
        """Return whether there surely is such an object: only for a hint."""
        if not key:
            return False
        try:
            self._look_at(_look(Asked("s3:GetObject", bucket, key)), cancellation)
        except StoreError:
            return False
        return True

    def _is_prefix(self, asked: Asked, cancellation: Cancellation) -> bool:
        """Return whether there surely are objects below a prefix: only for a hint."""
        try:
            return next(self._listed(asked, cancellation), None) is not None
        except StoreError:
            return False


_WITH_CHECKSUM = ("x-amz-checksum-mode", "ENABLED")


def _look(asked: Asked) -> Call:
    return Call("HEAD", asked, asked.key, (), (_WITH_CHECKSUM,))


def _pinned(method: str, uri: str, stored: StoredObject, *headers: tuple[str, str]) -> Call:
    """Return a request of the very version of an object that was listed."""
    asked = Asked("s3:GetObject", _split(uri)[0], stored.key)
    query = (("versionId", stored.version_id),) if stored.version_id else ()
    return Call(method, asked, stored.key, query, (("if-match", stored.etag), *headers))


def _split(uri: str) -> tuple[str, str]:
    """Return bucket and key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
