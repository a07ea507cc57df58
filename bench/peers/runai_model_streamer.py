"""Run:ai Model Streamer: the object in chunks, each written to the file as it comes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from bench.peers.job import parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.peers.job import Job


def prepare(job: Job) -> Callable[[], None]:
    os.environ.update(  # its library reads them when it is loaded
        AWS_ENDPOINT_URL=job.endpoint_url,
        AWS_ACCESS_KEY_ID=job.access_key,
        AWS_SECRET_ACCESS_KEY=job.secret_key,
        AWS_REGION=job.region,
        AWS_EC2_METADATA_DISABLED="true",
        RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING="0",
        RUNAI_STREAMER_CONCURRENCY=str(job.threads),
        RUNAI_STREAMER_CHUNK_BYTESIZE=str(job.part_bytes),
    )
    from runai_model_streamer.file_streamer.file_streamer import FileStreamer
    from runai_model_streamer.file_streamer.requests_iterator import FileChunks

    ranges = list(parts(job))
    chunks = FileChunks(
        0,
        f"s3://{job.bucket}/{job.key}",
        [start for start, _ in ranges],
        [stop - start for start, stop in ranges],
    )

    def fetch() -> None:
        descriptor = os.open(job.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with FileStreamer() as streamer:
                streamer.stream_files([chunks])
                for _, index, chunk in streamer.get_chunks():
                    _write(descriptor, memoryview(chunk.numpy()).cast("B"), ranges[index][0])
        finally:
            os.close(descriptor)

    return fetch


def _write(descriptor: int, view: memoryview, at: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, at)
        at += written
        view = view[written:]
