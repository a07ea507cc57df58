"""The wire protocol of docs/wire.md: frames, error bodies, and the members of requests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, NoReturn

from cached.core import errors
from cached.core.errors import BadRequest, CachedError, FrameError, LoadFailed, ProtocolMismatch
from cached.core.objects import Range

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PROTOCOL: Final = (1, 1)
# What a request may hold costs others some 2 ms: so long one thread of the daemon looks at it.
MAX_REQUEST_BYTES: Final = 128 << 10
MAX_VALUES: Final = 8192  # in a request: names, numbers, lists
MAX_NAMES: Final = 1024  # of one open; our client waits for more once it is open
MAX_RANGES: Final = 512  # of one wait; ours of longer lists come in several
MAX_REPLY_BYTES: Final = 64 << 20
MAX_DESCRIPTORS: Final = 128
MAX_OUTSTANDING: Final = 16  # 60 us each: so long a peer that floods may hold up all others
MAX_DEPTH: Final = 8  # of lists and objects in a frame; ours need 4
LENGTH_BYTES: Final = 4
MAX_NUMBER: Final = 2**53 - 1


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))


def encode(body: Mapping[str, object]) -> bytes:
    """Return a frame: its length and compact JSON."""
    text = _ENCODER.encode(body).encode()
    return len(text).to_bytes(LENGTH_BYTES, "big") + text


def _refuse_constant(text: str) -> NoReturn:
    message = f"{text} is not JSON"
    raise ValueError(message)


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)  # no NaN, no Infinity


class FrameBuffer:
    """Bytes of a stream in, frames out.

    Args:
        limit_bytes: the longest body that is taken.
        limit_values: and the most values that may be in it; None: as many as fit.
    """

    __slots__ = ("_buffer", "_limit_bytes", "_limit_values")

    def __init__(self, limit_bytes: int, limit_values: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._limit_values = limit_values
        self._buffer = bytearray()

    def __len__(self) -> int:
        """Return how many bytes are kept."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes as they come, in pieces of any size."""
        self._buffer += data

    def clear(self) -> None:
        """Forget what came."""
        self._buffer.clear()

    def next_frame(self) -> dict[str, object] | None:
        """Return the next whole frame; None if there is none yet.

        Raises:
            FrameError: the stream breaks the protocol; close it.
        """
        if len(self._buffer) < LENGTH_BYTES:
            return None
        size_bytes = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
        if size_bytes > self._limit_bytes:
            message = f"frame of {size_bytes} bytes: at most {self._limit_bytes} are allowed"
            raise FrameError(message)
        stop = LENGTH_BYTES + size_bytes
        if len(self._buffer) < stop:
            return None
        raw = bytes(self._buffer[LENGTH_BYTES:stop])
        del self._buffer[:stop]
        if self._limit_values is not None and _most_values(raw) > self._limit_values:
            message = f"frame holds more than {self._limit_values} values"
            raise FrameError(message)
        try:
            body = _DECODER.decode(raw.decode())  # json.loads would guess UTF-16 and UTF-32
        except (ValueError, RecursionError) as error:
            message = f"frame of {size_bytes} bytes is not JSON in UTF-8"
            raise FrameError(message) from error
        if not isinstance(body, dict):
            message = f"frame holds a {type(body).__name__}, not an object"
            raise FrameError(message)
        if _is_deep(body):
            message = f"frame of {size_bytes} bytes is nested deeper than {MAX_DEPTH}"
            raise FrameError(message)
        return body

    def __iter__(self) -> Iterator[dict[str, object]]:
        while (frame := self.next_frame()) is not None:
            yield frame


def _most_values(raw: bytes) -> int:
    """Return how many values JSON can hold, at the most; each stands behind one of these."""
    return sum(map(raw.count, (b",", b":", b"[", b"{")))


def _is_deep(body: dict[str, object]) -> bool:
    """Return whether something in it lies deeper than ``MAX_DEPTH``; recurses into nothing."""
    level: list[dict[str, object] | list[object]] = [body]
    for _ in range(MAX_DEPTH):
        level = [
            value
            for outer in level
            for value in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(value, (dict, list))
        ]
        if not level:
            return False
    return True


_CLASSES = {
    value.code: value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, CachedError) and value is not CachedError
}


def error_body(error: CachedError) -> dict[str, object]:
    """Return the member of an error reply."""
    return {"error": {"code": error.code, "message": error.message, "hint": error.hint}}


def error_from(body: Mapping[str, object]) -> CachedError:
    """Return the error of an error reply; a code that nobody knows is a ``LoadFailed``."""
    told = body.get("error")
    if not isinstance(told, dict):
        told = {}
    kind = _CLASSES.get(str(told.get("code")), LoadFailed)
    return kind(str(told.get("message", "")), hint=str(told.get("hint", "")))


def check_protocol(theirs: object, *, peer: str = "client") -> None:
    """Raise unless a peer's version can be spoken with: any of the same major number.

    Args:
        theirs: as JSON gave it.
        peer: what the peer is, ``client`` or ``daemon``; we are the other.

    Raises:
        ProtocolMismatch: another major number; the text names both and which to upgrade.
        BadRequest: it is not a version.
    """
    if (
        not isinstance(theirs, list)
        or len(theirs) != 2
        or not all(type(part) is int for part in theirs)
    ):
        raise _wrong("protocol", "[major, minor]", theirs)
    if theirs[0] != PROTOCOL[0]:
        we = "daemon" if peer == "client" else "client"
        older = peer if theirs[0] < PROTOCOL[0] else we
        message = (
            f"the {peer} speaks protocol {theirs[0]}.{theirs[1]}, "
            f"the {we} {PROTOCOL[0]}.{PROTOCOL[1]}"
        )
        raise ProtocolMismatch(message, hint=f"upgrade the {older}")


def text(fields: Mapping[str, object], key: str) -> str:
    """Return a member that must be text."""
    value = fields.get(key)
    if not isinstance(value, str):
        raise _wrong(key, "text", value)
    return value


def optional_text(fields: Mapping[str, object], key: str) -> str | None:
    """Return a member that may be absent."""
    return None if fields.get(key) is None else text(fields, key)


def number(fields: Mapping[str, object], key: str) -> int:
    """Return a member that must be a whole number from 0 to 2^53 - 1."""
    return _number(fields.get(key), key)


def numbers(fields: Mapping[str, object], key: str) -> list[int]:
    """Return a member that must be a list of whole numbers."""
    value = fields.get(key)
    if not isinstance(value, list):
        raise _wrong(key, "a list of whole numbers", value)
    return [_number(item, key) for item in value]


def names(fields: Mapping[str, object], key: str) -> tuple[str, ...] | None:
    """Return a member that is a list of names; None if it is absent."""
    value = fields.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(key, "a list of names", value)
    if len(value) > MAX_NAMES:
        message = f"{key} must be at most {MAX_NAMES} names, were {len(value)}"
        raise BadRequest(message, hint="wait for the others once the model is open")
    return tuple(value)


def until(fields: Mapping[str, object]) -> str:
    """Return what an ``open`` waits for: ``header``, if it says nothing, or ``ready``.

    Raises:
        BadRequest: it is something else.
    """
    found = optional_text(fields, "until") or "header"
    if found not in {"header", "ready"}:
        raise _wrong("until", "header or ready", found)
    return found


def ranges(fields: Mapping[str, object]) -> list[tuple[int, Range]] | None:
    """Return ``ranges`` of a wait; None for ``"all"``."""
    value = fields.get("ranges")
    if value == "all":
        return None
    if not isinstance(value, list):
        raise _wrong("ranges", 'a list or "all"', value)
    if len(value) > MAX_RANGES:
        message = f"ranges must be at most {MAX_RANGES}, were {len(value)}"
        raise BadRequest(message, hint="ask for some of them at a time")
    found = []
    for item in value:
        if not isinstance(item, list) or len(item) != 3:
            raise _wrong("ranges", "a list of [file, start, stop]", item)
        index, start, stop = (_number(part, "ranges") for part in item)
        if stop < start:
            raise _wrong("ranges", "start <= stop", item)
        found.append((index, Range(start, stop)))
    return found


def _number(value: object, key: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise _wrong(key, "a whole number from 0 to 2^53 - 1", value)
    return value


def _wrong(key: str, rule: str, value: object) -> BadRequest:
    """Return the refusal; of a list or an object it shows the length only, whatever is in it."""
    if isinstance(value, str):
        shown = repr(value[:64])
    elif isinstance(value, (dict, list)):
        shown = f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    else:
        shown = f"{value!r:.64}"
    return BadRequest(f"{key} must be {rule}, was {shown}")
