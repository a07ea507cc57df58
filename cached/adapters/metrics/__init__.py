"""Metrics: what there is, what is counted, and how a scrape reads it."""

from __future__ import annotations

from cached.adapters.metrics.counting import Metrics
from cached.adapters.metrics.rows import reference

__all__ = ["Metrics", "reference"]
