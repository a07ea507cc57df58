"""s3torchconnector: a reader of the whole object, written to the file as it comes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from s3torchconnector import S3ClientConfig
from s3torchconnector._s3client import S3Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.peers.job import Job

PIECE_BYTES = 1 << 20


def prepare(job: Job) -> Callable[[], None]:
    os.environ.update(
        AWS_ACCESS_KEY_ID=job.access_key,
        AWS_SECRET_ACCESS_KEY=job.secret_key,
        AWS_EC2_METADATA_DISABLED="true",
    )
    client = S3Client(
        region=job.region,
        endpoint=job.endpoint_url,
        s3client_config=S3ClientConfig(force_path_style=True, part_size=job.part_bytes),
    )

    def fetch() -> None:
        reader = client.get_object(job.bucket, job.key)
        with open(job.path, "xb", buffering=0) as file:
            while piece := reader.read(PIECE_BYTES):
                file.write(piece)

    return fetch
