"""Shared memory for files: where models lie, how bytes get in, and how workers get at them."""

from __future__ import annotations

from cached.adapters.segments.root import survey
from cached.adapters.segments.tmpfs import TmpfsSegments

__all__ = ["TmpfsSegments", "survey"]
