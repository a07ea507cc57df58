"""What a peer is asked to do, and how the parts of an object are counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator


class Job(NamedTuple):
    """Fetch one object into one file.

    Attributes:
        endpoint_url: of the store, for example ``http://127.0.0.1:9000``.
        url: of the object; signed in the query where the store wants it.
        bucket, key: the object.
        path: the destination, in a tmpfs; not there yet.
        size_bytes: of the object.
        threads: GETs in flight.
        part_bytes: bytes of one GET.
        access_key, secret_key, region: for peers that sign.
    """

    endpoint_url: str
    url: str
    bucket: str
    key: str
    path: str
    size_bytes: int
    threads: int
    part_bytes: int
    access_key: str
    secret_key: str
    region: str


def parts(job: Job) -> Iterator[tuple[int, int]]:
    """Yield the half-open byte ranges of the GETs, in file order."""
    for start in range(0, job.size_bytes, job.part_bytes):
        yield start, min(start + job.part_bytes, job.size_bytes)
