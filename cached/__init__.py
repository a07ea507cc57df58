"""Model weights in shared memory, mapped before they are asked for."""

from __future__ import annotations

__version__ = "0.1.0"
