"""Values for every option, as written and as meant; and the naive rule of precedence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MIB, GIB = 1 << 20, 1 << 30

# key: (as written in the environment, what it means)
SAMPLES: dict[str, list[tuple[str, object]]] = {
    "memory_budget": [("8GiB", 8 * GIB), ("64MiB", 64 * MIB), ("auto", None)],
    "memory_headroom": [("0", 0), ("1.5GiB", 3 * GIB // 2)],
    "segment_root": [("/dev/shm/other", "/dev/shm/other"), ("/mnt/models", "/mnt/models")],
    "segments": [("memfd", "memfd"), ("file", "file")],
    "purge_on_exit": [("true", True), ("no", False)],
    "kept_versions": [("1", 1), ("16", 16)],
    "socket": [("/run/cached.sock", "/run/cached.sock"), ("@cached-7", "@cached-7")],
    "socket_mode": [("0600", 0o600), ("666", 0o666)],
    "http_host": [("0.0.0.0", "0.0.0.0"), ("::1", "::1")],
    "http_port": [("0", 0), ("8080", 8080), ("off", None)],
    "http_token_file": [("/run/token", "/run/token"), ("/etc/cached/token", "/etc/cached/token")],
    "drain_timeout": [("0s", 0.0), ("1m30s", 90.0)],
    "endpoint_url": [
        ("http://127.0.0.1:8333", "http://127.0.0.1:8333"),
        ("https://s3.example.org/", "https://s3.example.org"),
    ],
    "region": [("eu-central-1", "eu-central-1"), ("garage", "garage")],
    "addressing_style": [("path", "path"), ("virtual", "virtual"), ("auto", "auto")],
    "ca_bundle": [("/etc/hosts", "/etc/hosts"), ("/etc/passwd", "/etc/passwd")],
    "allow_insecure_endpoint": [("true", True), ("0", False)],
    "sse_customer_key_file": [("/etc/hosts", "/etc/hosts"), ("/etc/passwd", "/etc/passwd")],
    "anonymous": [("yes", True), ("off", False)],
    "verify": [("off", "off"), ("digest", "digest")],
    "refresh_interval": [("30s", 30.0), ("1h", 3600.0)],
    "fetch_threads": [("1", 1), ("32", 32)],
    "connect_timeout": [("250ms", 0.25), ("3", 3.0)],
    "receive_timeout": [("1.5s", 1.5), ("2m", 120.0)],
    "max_attempts": [("1", 1), ("12", 12)],
    "log_level": [("debug", "debug"), ("error", "error")],
    "log_format": [("text", "text"), ("json", "json")],
    "audit": [("true", True), ("0", False)],
}

DEFAULTS: dict[str, object] = {
    "memory_budget": None,
    "memory_headroom": 256 * MIB,
    "segment_root": "/dev/shm/cached-7",
    "segments": "auto",
    "purge_on_exit": False,
    "kept_versions": 0,
    "socket": "/tmp/cached-7/cached.sock",
    "socket_mode": 0o660,
    "http_host": "127.0.0.1",
    "http_port": 9400,
    "http_token_file": None,
    "drain_timeout": 20.0,
    "endpoint_url": None,
    "region": None,
    "addressing_style": "auto",
    "ca_bundle": None,
    "allow_insecure_endpoint": False,
    "sse_customer_key_file": None,
    "anonymous": False,
    "verify": "checksum",
    "refresh_interval": 0.0,
    "fetch_threads": 8,
    "connect_timeout": 5.0,
    "receive_timeout": 10.0,
    "max_attempts": 8,
    "log_level": "info",
    "log_format": "json",
    "audit": False,
}


def together(levels: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return what levels give together, the highest first: each key from the first that has it."""
    result: dict[str, object] = {}
    for level in reversed(levels):
        result |= level
    return result
