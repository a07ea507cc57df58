"""The table of options: what the operator may set, how it is written, what it means.

It is the single source of the flags, of the environment variables, of the TOML keys, of ``--help``
and of docs/configuration.md. An option's names follow from its field: ``memory_budget_bytes`` is
``memory_budget`` in TOML, ``--memory-budget`` as a flag, ``CACHED_MEMORY_BUDGET`` in the
environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cached.core.kinds import (
    BYTES,
    BYTES_OR_AUTO,
    COUNT,
    ENDPOINT,
    MODE,
    PATH,
    PORT,
    REGION,
    SECONDS,
    SOCKET,
    SWITCH,
    TEXT,
    one_of,
)

if TYPE_CHECKING:
    from cached.core.kinds import Kind

MIB = 1 << 20
DAY_S = 86_400
CONFIG_ENV, MODELS_ENV = "CACHED_CONFIG", "CACHED_MODELS"  # beside those of the options
RUN_ENV = ("CACHED_MODEL_NAME", "CACHED_MODEL_PATH", "CACHED_MODEL_VERSION")  # for programs only


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
        "segments",
        one_of("auto", "tmpfs", "memfd", "file"),
        "auto",
        "What the models lie in. tmpfs: files in memory, which the next daemon takes over. memfd: "
        "sealed memory without a file system, which ends with the daemon and its workers. file: "
        "files on a disk. auto: tmpfs where the segment root is one, else memfd.",
        MEMORY,
    ),
    Option(
        "purge_on_exit",
        SWITCH,
        "false",
        "Remove the models from memory when the daemon ends. Else they stay for the next one; "
        "cached purge removes them.",
        MEMORY,
    ),
    Option(
        "kept_versions",
        COUNT,
        0,
        "Superseded versions of each model that stay in memory though nobody has them open, as "
        "long as there is room: to go back to without fetching anything.",
        MEMORY,
        least=0,
        most=16,
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
        "http_token_file",
        PATH,
        None,
        "File with a token that allows changes over HTTP (POST, Authorization: Bearer TOKEN), of "
        "16 bytes or more; nobody else may read it, and it is read at each use. Not given: over "
        "HTTP nothing can be changed.",
        SERVING,
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
        one_of("auto", "path", "virtual"),
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
    Option(
        "sse_customer_key_file",
        PATH,
        None,
        "File with the key of objects that are encrypted by your own key (SSE-C): 32 bytes, or "
        "their base64. It is read at each use, and sent over HTTPS, or to loopback, only.",
        STORE,
    ),
    Option("anonymous", SWITCH, "false", "Do not sign requests: for public buckets.", STORE),
    Option(
        "verify",
        one_of("off", "checksum", "digest"),
        "checksum",
        "What bytes are checked by before they are called complete. checksum: by what the store "
        "keeps of each object. digest: by the SHA-256 of every 8 MiB in cached.manifest.json, "
        "which cached digest writes, and before anybody can read them. off: by their length.",
        FETCHING,
    ),
    Option(
        "refresh_interval_s",
        SECONDS,
        "0s",
        "How often the store is asked for new versions of what is in memory. 0s: only when "
        "cached refresh asks for it.",
        FETCHING,
        least=0,
        most=30 * DAY_S,
    ),
    Option(
        "fetch_threads",
        COUNT,
        8,
        "GETs at a time, at most. Fewer while the store says that it is asked too much.",
        FETCHING,
        least=1,
        most=256,
    ),
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
        one_of("debug", "info", "warning", "error"),
        "info",
        "The least that is logged. info tells the story of a day in a page.",
        LOGS,
    ),
    Option(
        "log_format",
        one_of("json", "text"),
        "json",
        "json: one object a line. text: for people.",
        LOGS,
    ),
    Option(
        "audit",
        SWITCH,
        "false",
        "Log who was granted a lease and when it ended, and who evicted, refreshed or purged.",
        LOGS,
    ),
)

MODEL_OPTIONS: tuple[Option, ...] = (
    Option("uri", TEXT, None, "s3://BUCKET/PREFIX/, s3://BUCKET/KEY or file:///PATH.", "models"),
    Option("prefetch", SWITCH, "true", "Fetch at start, before anybody asks.", "models"),
    Option("pinned", SWITCH, "false", "Never evict it to make room.", "models"),
)
