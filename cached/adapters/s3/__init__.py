"""Objects in S3 and in stores that speak it: the ``ObjectStore`` port."""

from __future__ import annotations

from cached.adapters.s3.store import S3Store

__all__ = ["S3Store"]
