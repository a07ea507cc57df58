"""Signed requests on kept connections; what can be mended at once is mended here.

Mended, each at most once for a request: a kept connection that the store had closed, a region
that was another, credentials that had expired, a clock that is wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, NamedTuple

from cached.adapters.s3.addresses import DEFAULT_REGION
from cached.adapters.s3.connections import Connections
from cached.adapters.s3.documents import MAX_ERROR_BYTES, parse_fault
from cached.adapters.s3.faults import EXPIRED, SKEWED, Refusal, date_s, error_of
from cached.core.errors import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    from cached.adapters.s3.addresses import Addresses, Place
    from cached.adapters.s3.connections import Connect, Connection, Head
    from cached.adapters.s3.documents import Fault
    from cached.adapters.s3.faults import Asked
    from cached.ports import Clock

    class Keys(Protocol):
        """What a request is signed with."""

        @property
        def access_key_id(self) -> str: ...  # noqa: D102
        @property
        def secret_access_key(self) -> str: ...  # noqa: D102
        @property
        def session_token(self) -> str | None: ...  # noqa: D102

    class Sign(Protocol):
        """Returns the headers to send: see adapters/sigv4.py."""

        def __call__(  # noqa: D102
            self,
            keys: Keys,
            request: tuple[str, str, str],
            headers: Mapping[str, str],
            *,
            region: str,
            wall_s: float,
            payload: str,
        ) -> dict[str, str]: ...

    class Credentials(Protocol):
        """Finds keys: see adapters/credentials.py."""

        def keys(self) -> Keys: ...  # noqa: D102
        # Any: what keys() returned, of whatever class the finder's keys are.
        def replace(self, refused: Any, /) -> Keys: ...  # noqa: D102


MAX_CONNECTIONS = 256  # as many as GETs may run at a time


class Tools(NamedTuple):
    """What the composer hands over, of other adapters.

    Attributes:
        connect: opens a connection.
        request_head: method, target, headers → bytes.
        sign: makes the headers of a signed request.
        quote_query: pairs → the query that is signed and sent.
        credentials: read at each use; ``None``: requests are not signed.
        warn: takes a line for the log, and its fields.
        customer_key: returns the headers of a key that objects are encrypted with (SSE-C);
            asked for each request of an object. ``None``: they are not.
    """

    connect: Connect
    request_head: Callable[[str, str, Mapping[str, str]], bytes]
    sign: Sign
    quote_query: Callable[[tuple[tuple[str, str], ...]], str]
    credentials: Credentials | None
    warn: Callable[[str, Mapping[str, object]], None]
    customer_key: Callable[[], Mapping[str, str]] | None = None


class Call(NamedTuple):
    """One request.

    Attributes:
        asked: its bucket, and words for messages.
        key: in the path; empty for the bucket itself.
        query: names and values, not quoted.
        headers: besides host and what a signature needs.
        body: of a PUT.
    """

    method: str
    asked: Asked
    key: str
    query: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


class Requests:
    """Sends requests; any thread. ``keep``, ``drop`` and ``close`` are those of ``Connections``.

    Args:
        addresses: where buckets are.
        tools: of other adapters.
        clock: for signatures, and the age of idle connections.
        region: of the buckets, until the store says another.
        most_connections: that are open at a time, unless more requests run at a time.
    """

    def __init__(
        self,
        addresses: Addresses,
        tools: Tools,
        clock: Clock,
        region: str | None,
        most_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._addresses = addresses
        self._tools = tools
        self._clock = clock
        self._region = region or DEFAULT_REGION
        self._regions: dict[str, str] = {}  # of buckets that are elsewhere
        self._skew_s = 0.0  # the store's clock minus ours, where ours is too wrong to sign with
        self._connections = Connections(tools.connect, clock, most_connections)
        self.keep = self._connections.keep
        self.drop = self._connections.drop
        self.close = self._connections.close

    def now_s(self) -> float:
        """Return monotonic seconds."""
        return self._clock.now_s()

    def send(
        self, call: Call, using: Callable[[Connection], None] = lambda _: None
    ) -> tuple[Connection, Head]:
        """Return the connection and head of a successful reply; then ``keep`` or ``drop`` it.

        Args:
            call: the request.
            using: told of each connection before anything is sent on it.

        Raises:
            StoreError: the store refused, or could not be reached.
        """
        mended: set[str] = set()
        credentials = self._tools.credentials
        keys = credentials.keys() if credentials else None
        while True:
            region = self._region_of(call)
            connection, head = self._exchange(call, region, keys, using)
            if 200 <= head.status < 300:
                return connection, head
            fault = self._fault(call, connection)
            refusal = Refusal(
                call.asked, region, head.status, head.headers, fault, self._has_customer_key
            )
            mend = self._mend(refusal)
            if mend is None or mend in mended:
                raise error_of(refusal, self._clock.wall_s())
            mended.add(mend)
            if mend == "credentials" and credentials and keys:
                keys = credentials.replace(keys)

    def _exchange(
        self, call: Call, region: str, keys: Keys | None, using: Callable[[Connection], None]
    ) -> tuple[Connection, Head]:
        """Send a request and read the head of its reply.

        A kept connection may have been closed by the store at the same moment: a request that
        met this is sent again.
        """
        place = self._addresses.of(call.asked.bucket, call.key, region)
        request = self._request(call, place, region, keys)
        connection, is_kept = self._connections.take(place)
        try:
            using(connection)
            connection.send(request)
            return connection, connection.head(has_body=call.method != "HEAD")
        except StoreUnavailable:
            # A quiet one is still open: nothing came in time.
            is_closed = connection.is_untouched and not connection.is_quiet()
            is_stale = is_kept and is_closed and not connection.is_cancelled
            self.drop(connection)
            if not is_stale:
                raise
        except BaseException:
            self.drop(connection)
            raise
        return self._exchange(call, region, keys, using)

    def _region_of(self, call: Call) -> str:
        return self._regions.get(call.asked.bucket, self._region)

    def _request(self, call: Call, place: Place, region: str, keys: Keys | None) -> bytes:
        query = self._tools.quote_query(call.query)
        headers = {"host": place.authority, **dict(call.headers)}
        if call.method == "PUT":
            headers["content-length"] = str(len(call.body))
        if self._tools.customer_key is not None and call.key:
            headers.update(self._tools.customer_key())
        if keys is not None:
            headers = self._tools.sign(
                keys,
                (call.method, place.path, query),
                headers,
                region=region,
                wall_s=self._clock.wall_s() + self._skew_s,
                payload=hashlib.sha256(call.body).hexdigest(),
            )
        target = f"{place.path}?{query}" if query else place.path
        return self._tools.request_head(call.method, target, headers) + call.body

    @property
    def _has_customer_key(self) -> bool:
        return self._tools.customer_key is not None

    def _fault(self, call: Call, connection: Connection) -> Fault:
        """Read what an error's body says; the status alone must do if that fails."""
        body = b""
        try:
            if call.method != "HEAD":
                with contextlib.suppress(StoreError):
                    body = connection.read(MAX_ERROR_BYTES, may_cut=True)
        finally:
            self.keep(connection)
        return parse_fault(body)

    def _mend(self, refusal: Refusal) -> str | None:
        """Do something about a refusal; return what it was about, None if nothing helps."""
        code, region = refusal.fault.code, refusal.bucket_region
        if region and region != refusal.region and refusal.status in {301, 307, 400, 403}:
            self._regions[refusal.asked.bucket] = region
            return "region"
        if code in EXPIRED and self._tools.credentials is not None:
            return "credentials"
        store_s = date_s(refusal.headers.get("date", ""))
        if code in SKEWED and store_s is not None:
            self._skew_s = store_s - self._clock.wall_s()
            fields = {"skew_s": round(self._skew_s), "bucket": refusal.asked.bucket}
            self._tools.warn("clock differs from the store's, signing with the store's", fields)
            return "clock"
        return None
