"""The table of options: what the operator may set, how it is written, what it means.

It is the single source of the flags, of the environment variables, of the TOML keys, of ``--help``
and of docs/configuration.md. An option's names follow from its field: ``memory_budget_bytes`` is
``memory_budget`` in TOML, ``--memory-budget`` as a flag, ``CACHED_MEMORY_BUDGET`` in the
environment.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from cached.core.units import format_bytes, format_seconds, parse_bytes, parse_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
DAY_S = 86_400
MAX_SOCKET_BYTES = 107  # sun_path holds 108 with its NUL: unix(7)
CONFIG_ENV, MODELS_ENV = "CACHED_CONFIG", "CACHED_MODELS"  # beside those of the options


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


class Option(NamedTuple):
    """One row of the table.

    Attributes:
        field: of Config.
        kind: how its value is written.
        default: as it would be written; ``None``: not set, or found by the command line.
        help: one or two sentences.
        group: headline in --help.
        least: the smallest value that is allowed.
        most: the largest.
        aws: variables of the AWS SDKs that are read where ``env`` is not set, in this order.
        shown: the default in words, where ``default`` does not say it.
    """

    field: str
    kind: Kind
    default: object
    help: str
    group: str
    least: float | None = None
    most: float | None = None
    aws: tuple[str, ...] = ()
    shown: str = ""

    @property
    def key(self) -> str:
        """The name in TOML and in messages: the field without its unit."""
        return self.field.removesuffix("_bytes").removesuffix("_s")

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return "--" + self.key.replace("_", "-")

    @property
    def env(self) -> str:
        """The name in the environment."""
        return "CACHED_" + self.key.upper()

    @property
    def default_text(self) -> str:
        """The default as the documentation shows it."""
        return self.shown or ("none" if self.default is None else str(self.default))


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


def _one_of(*choices: str) -> Kind:
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

MEMORY, SERVING, STORE, FETCHING, LOGS = "memory", "serving", "object store", "fetching", "logs"

OPTIONS: tuple[Option, ...] = (
    Option(
        "memory_budget_bytes",
        BYTES_OR_AUTO,
        "auto",
        "The most that all models together may hold, if the machine has so much. auto: what the "
        "control group, the file system of the segments and the kernel have left at start, less "
        "the headroom.",
        MEMORY,
        least=64 * MIB,
    ),
    Option(
        "memory_headroom_bytes",
        BYTES,
        "256MiB",
        "Left free beside the models, for the daemon and the workers.",
        MEMORY,
        least=0,
    ),
    Option(
        "segment_root",
        PATH,
        None,
        "Directory of the models; on a tmpfs, so that it is memory.",
        MEMORY,
        shown="/dev/shm/cached-UID",  # noqa: S108 - where shm_open puts segments
    ),
    Option(
        "socket",
        SOCKET,
        None,
        "The Unix socket that workers connect to; a leading @ means an abstract one.",
        SERVING,
        shown="where workers look",
    ),
    Option(
        "socket_mode",
        MODE,
        "0660",
        "Who may connect: the mode of the socket's file.",
        SERVING,
        least=0,
        most=0o777,
    ),
    Option(
        "http_host",
        TEXT,
        "127.0.0.1",
        "Address of the HTTP side: /healthz, /readyz, /metrics, /models.",
        SERVING,
    ),
    Option(
        "http_port",
        PORT,
        9400,
        "Port of the HTTP side. 0: a free one, which the log names; off: no HTTP side.",
        SERVING,
        least=0,
        most=65535,
    ),
    Option(
        "drain_timeout_s",
        SECONDS,
        "20s",
        "How long SIGTERM waits for requests under way. Keep it below the time after which your "
        "supervisor kills (Kubernetes: 30 s).",
        SERVING,
        least=0,
        most=DAY_S,
    ),
    Option(
        "endpoint_url",
        ENDPOINT,
        None,
        "An S3-compatible server instead of AWS.",
        STORE,
        aws=("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        shown="AWS",
    ),
    Option(
        "region",
        REGION,
        None,
        "Region of the buckets.",
        STORE,
        aws=("AWS_REGION", "AWS_DEFAULT_REGION"),
    ),
    Option(
        "addressing_style",
        _one_of("auto", "path", "virtual"),
        "auto",
        "Where the bucket stands in a URL. auto: in the host name on AWS, in the path elsewhere.",
        STORE,
    ),
    Option(
        "ca_bundle",
        PATH,
        None,
        "Certificates (PEM) that are trusted instead of the system's.",
        STORE,
        aws=("AWS_CA_BUNDLE",),
        shown="the system's",
    ),
    Option(
        "allow_insecure_endpoint",
        SWITCH,
        "false",
        "Allow plain HTTP to a host that is not loopback. Weights and signatures can be read and "
        "changed on the way.",
        STORE,
    ),
    Option("anonymous", SWITCH, "false", "Do not sign requests: for public buckets.", STORE),
    Option("fetch_threads", COUNT, 8, "GETs at a time.", FETCHING, least=1, most=256),
    Option(
        "connect_timeout_s",
        SECONDS,
        "5s",
        "A connection that takes longer is given up and tried again.",
        FETCHING,
        least=0.1,
        most=DAY_S,
    ),
    Option(
        "receive_timeout_s",
        SECONDS,
        "10s",
        "A GET that brings nothing for so long is cut and resumed at its last byte.",
        FETCHING,
        least=0.1,
        most=DAY_S,
    ),
    Option(
        "max_attempts",
        COUNT,
        8,
        "A load fails after so many attempts in a row that brought nothing.",
        FETCHING,
        least=1,
        most=1000,
    ),
    Option(
        "log_level",
        _one_of("debug", "info", "warning", "error"),
        "info",
        "The least that is logged. info tells the story of a day in a page.",
        LOGS,
    ),
    Option(
        "log_format",
        _one_of("json", "text"),
        "json",
        "json: one object a line. text: for people.",
        LOGS,
    ),
)

MODEL_OPTIONS: tuple[Option, ...] = (
    Option("uri", TEXT, None, "s3://BUCKET/PREFIX/, s3://BUCKET/KEY or file:///PATH.", "models"),
    Option("prefetch", SWITCH, "true", "Fetch at start, before anybody asks.", "models"),
    Option("pinned", SWITCH, "false", "Never evict it to make room.", "models"),
)
