"""tensorizer: its stream of an object, of which its deserializer reads, written to the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorizer.stream_io import open_stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.peers.job import Job

PIECE_BYTES = 1 << 20


def prepare(job: Job) -> Callable[[], None]:
    def fetch() -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        got_bytes = 0
        with (
            open_stream(
                f"s3://{job.bucket}/{job.key}",
                s3_access_key_id=job.access_key,
                s3_secret_access_key=job.secret_key,
                s3_endpoint=job.endpoint_url,
                s3_region_name=job.region,
                force_http=True,
            ) as stream,
            open(job.path, "xb", buffering=0) as file,
        ):
            while got_bytes < job.size_bytes:
                piece = buffer[: job.size_bytes - got_bytes]
                stream.readinto(piece)  # all of it, or an error
                file.write(piece)
                got_bytes += len(piece)

    return fetch
