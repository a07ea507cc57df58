"""Every error that the project raises on purpose.

::

    CachedError                     code, hint, transient
    ├── InvalidConfig               the operator's: a key, its rule, its value
    ├── FormatError                 bytes that are not what they should be
    │   ├── HeaderError             a safetensors file's
    │   ├── DigestsError            the list of digests of a model
    │   └── FrameError              a peer's on the socket
    ├── InvalidTransition           a bug of ours: a state table has no such row
    ├── DaemonUnavailable           transient: nobody listens, it drains, it died
    ├── ProtocolMismatch            client and daemon are of different generations
    ├── BadRequest                  the peer asked for what the protocol does not know
    ├── NotPermitted                the peer's uid may not do this
    ├── ModelUnknown                no such model is configured
    ├── VersionUnknown              the model has no such version, in memory or in the store
    ├── TensorUnknown               (also a KeyError) the model has no such tensor
    ├── OverBudget                  transient: refused, with the numbers
    ├── OutOfSpace                  the file system of the segments is full
    ├── LoadFailed                  the store's answer made the load impossible
    │   └── ChecksumMismatch        twice, bytes were not what their checksum or digest says
    ├── Stale                       the object was replaced; open again for the new version
    ├── TimedOut                    transient: the caller's own time-out
    ├── ModelClosed                 (also a ValueError) used after ``close()``
    ├── MissingPackage              (also an ImportError) an optional package is not installed
    └── StoreError                  what an object store did; ``retry_after_s``
        ├── ObjectMissing           bucket, key or prefix is not there
        ├── AccessDenied            403; names action, resource
        ├── CredentialsUnavailable  none found, or expired and not refreshable
        ├── ObjectChanged           412: replaced since it was resolved
        ├── ObjectRefused           encrypted by the client, unsafe key, no ETag
        ├── InsecureEndpoint        plain HTTP to something that is not loopback
        ├── BadReply                transient: not what was asked for, or cut short
        └── StoreUnavailable        transient: 5xx, connection, time-out
            └── StoreBusy           503 SlowDown, 429: asked too much

Ask of an error: whose fault is it, and can a retry help (``transient``)? Branch on the
type or on ``transient``, never on the text. ``str(error)`` is the fact, and after a
semicolon what to do next.
"""

from __future__ import annotations

MAX_RETRY_AFTER_S = 60.0  # a store's word is no reason to give a model up for a day


class CachedError(Exception):
    """Base of all; never raised itself.

    Attributes:
        code: the name on the wire and in metrics; one per class.
        message: a lower-case fact with values and units.
        hint: what to do next; may be empty. Both are one line without control characters, for
            parts of them are a store's or a file's own text and end on terminals.
        transient: whether the same call may succeed later.
    """

    code = "internal"
    transient = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = message = printable(message)
        self.hint = hint = printable(hint)
        super().__init__(f"{message}; {hint}" if hint else message)


def printable(text: str) -> str:
    """Return foreign text (a store's message) on one line and without what steers a terminal."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else " " for letter in text)


class InvalidConfig(CachedError):
    """A key, its rule and its value do not agree."""

    code = "invalid_config"


class FormatError(CachedError):
    """Bytes that do not follow their format."""

    code = "format"


class HeaderError(FormatError):
    """A safetensors header breaks a rule of the format."""

    code = "header"


class DigestsError(FormatError):
    """The list of digests of a model breaks a rule of its format."""

    code = "digests"


class FrameError(FormatError):
    """A frame on the socket breaks the protocol; the connection is closed."""

    code = "frame"


class InvalidTransition(CachedError):
    """The state table has no such row: a bug of ours."""

    code = "invalid_transition"


class DaemonUnavailable(CachedError):
    """Nobody answers on the socket."""

    code = "daemon_unavailable"
    transient = True


class ProtocolMismatch(CachedError):
    """Client and daemon speak different major versions; the text names both."""

    code = "protocol_mismatch"


class BadRequest(CachedError):
    """A request that the protocol does not know, or with fields missing."""

    code = "bad_request"


class NotPermitted(CachedError):
    """The peer's uid may not do this."""

    code = "not_permitted"


class ModelUnknown(CachedError):
    """No such model is configured."""

    code = "model_unknown"


class VersionUnknown(CachedError):
    """The model has no such version: not in memory, and the store does not list it now."""

    code = "version_unknown"


class TensorUnknown(CachedError, KeyError):
    """The model has no such tensor."""

    code = "tensor_unknown"

    def __str__(self) -> str:
        return str(self.args[0])


class OverBudget(CachedError):
    """The bytes do not fit beside what is leased or promised."""

    code = "over_budget"
    transient = True


class OutOfSpace(CachedError):
    """The file system that holds the segments is full."""

    code = "out_of_space"


class LoadFailed(CachedError):
    """The load cannot be completed; the text holds the store's reason."""

    code = "load_failed"


class ChecksumMismatch(LoadFailed):
    """Bytes are not what the store, or the list of digests, says that they are: twice."""

    code = "checksum_mismatch"


class Stale(CachedError):
    """The object was replaced while it was loading; open again."""

    code = "stale"


class TimedOut(CachedError, TimeoutError):
    """The caller's own time-out ended."""

    code = "timed_out"
    transient = True


class ModelClosed(CachedError, ValueError):
    """A model was used after its ``close()``; what was taken before stays valid."""

    code = "model_closed"


class MissingPackage(CachedError, ImportError):
    """An optional package is not installed in this environment."""

    code = "missing_package"


class StoreError(CachedError):
    """What an object store did.

    Attributes:
        retry_after_s: what the store asked for (``Retry-After``), ``MAX_RETRY_AFTER_S`` at most;
            ``None`` if nothing.
    """

    code = "store"

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        if retry_after_s is not None:
            retry_after_s = min(retry_after_s, MAX_RETRY_AFTER_S)
        self.retry_after_s = retry_after_s


class ObjectMissing(StoreError):
    """Bucket, key or prefix is not there."""

    code = "object_missing"


class AccessDenied(StoreError):
    """The store refuses these credentials; the text names action and resource."""

    code = "access_denied"


class CredentialsUnavailable(StoreError):
    """No credentials were found, or they expired and could not be refreshed."""

    code = "credentials_unavailable"


class ObjectChanged(StoreError):
    """412: the object was replaced since it was resolved."""

    code = "object_changed"


class ObjectRefused(StoreError):
    """The object cannot be served as weights: encrypted by its client, no ETag, unsafe key."""

    code = "object_refused"


class InsecureEndpoint(StoreError):
    """Plain HTTP to a host that is not loopback, without the explicit flag."""

    code = "insecure_endpoint"


class BadReply(StoreError):
    """Not the bytes that were asked for, or cut short."""

    code = "bad_reply"
    transient = True


class StoreUnavailable(StoreError):
    """5xx, a broken connection or a time-out."""

    code = "store_unavailable"
    transient = True


class StoreBusy(StoreUnavailable):
    """503 SlowDown, 429: the store is asked too much."""

    code = "store_busy"
