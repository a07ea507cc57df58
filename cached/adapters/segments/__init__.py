"""Shared memory for files: where models lie, how bytes get in, and how workers get at them."""

from __future__ import annotations

from cached.adapters.segments.directory import DirectorySegments
from cached.adapters.segments.memfd import MemfdSegments
from cached.adapters.segments.opening import open_segments
from cached.adapters.segments.store import Segments

__all__ = ["DirectorySegments", "MemfdSegments", "Segments", "open_segments"]
