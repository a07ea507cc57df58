"""How the values of options are written: parsed at the border, shown in messages and pages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from cached.core.units import format_bytes, format_seconds, parse_bytes, parse_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_SOCKET_BYTES = 107  # sun_path holds 108 with its NUL: unix(7)


class Kind(NamedTuple):
    """How a value is written.

    Attributes:
        parse: makes the value; TypeError, ValueError or InvalidConfig if it is not one.
        rule: continues "must be ".
        metavar: stands for the value in --help.
        show: writes the value back.
    """

    parse: Callable[[object], object]
    rule: str
    metavar: str
    show: Callable[[object], str] = str


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or _CONTROL.search(value):
        raise ValueError
    return value


_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # and what was not UTF-8


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return parse_bytes(value)


def _size_or_auto(value: object) -> int | None:
    return None if value in ("auto", None) else _size(value)


def _show_size(value: object) -> str:
    return format_bytes(value) if isinstance(value, int) else "auto"


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    return parse_seconds(value)


def _show_seconds(value: object) -> str:
    return format_seconds(value) if isinstance(value, int | float) else str(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return int(value)


def _port_or_off(value: object) -> int | None:
    return None if value in ("off", None) else _whole(value)


def _mode(value: object) -> int:
    return int(_text(value), 8)


def _show_mode(value: object) -> str:
    return f"{value:04o}" if isinstance(value, int) else str(value)


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = _text(value).lower()
    if text not in _SWITCH:
        raise ValueError
    return _SWITCH[text]


_SWITCH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(
    ("0", "false", "no", "off"), False
)


def _socket(value: object) -> str:
    text = _text(value)
    if len(text.encode()) > MAX_SOCKET_BYTES or text == "@":
        raise ValueError
    return text


def _endpoint(value: object) -> str:
    text = _text(value).rstrip("/")
    if not re.fullmatch(r"https?://[^?#@\s]+", text):
        raise ValueError
    return text


def _region(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
        raise ValueError
    return text


def one_of(*choices: str) -> Kind:
    """Return the kind whose values are these words."""

    def parse(value: object) -> str:
        if value not in choices:
            raise ValueError
        return str(value)

    return Kind(parse, f"one of {', '.join(choices)}", "|".join(choices))


BYTES = Kind(_size, "a size such as 8GiB or 512MiB", "SIZE", _show_size)
BYTES_OR_AUTO = Kind(
    _size_or_auto, "a size such as 8GiB or 512MiB, or auto", "SIZE|auto", _show_size
)
SECONDS = Kind(_seconds, "a duration such as 30s, 1m30s or 250ms", "DURATION", _show_seconds)
COUNT = Kind(_whole, "a whole number", "N")
PORT = Kind(_port_or_off, "a port number, or off", "PORT|off")
MODE = Kind(_mode, 'octal digits in a string, such as "0660"', "MODE", _show_mode)
SWITCH = Kind(_switch, "true or false", "true|false")
TEXT = Kind(_text, "text without control characters", "TEXT")
PATH = Kind(_text, "a path", "PATH")
SOCKET = Kind(
    _socket, f"a path of at most {MAX_SOCKET_BYTES} bytes, or @NAME (abstract)", "PATH|@NAME"
)
ENDPOINT = Kind(_endpoint, "http[s]://HOST[:PORT][/PATH]", "URL")
REGION = Kind(_region, "a region such as eu-central-1", "REGION")
