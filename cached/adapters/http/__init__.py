"""The HTTP side: what probes, scrapers and, with a token, operators are answered."""

from __future__ import annotations

from cached.adapters.http.server import HttpServer
from cached.adapters.http.token_file import TokenFile

__all__ = ["HttpServer", "TokenFile"]
