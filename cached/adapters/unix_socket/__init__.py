"""The Unix socket that workers connect to: who may, what they say, what they are sent."""

from __future__ import annotations

from cached.adapters.unix_socket.server import UnixSocket

__all__ = ["UnixSocket"]
