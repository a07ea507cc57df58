"""boto3: ``download_file``, with threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.peers.job import Job


def prepare(job: Job) -> Callable[[], None]:
    client = boto3.client(
        "s3",
        endpoint_url=job.endpoint_url,
        region_name=job.region,
        aws_access_key_id=job.access_key,
        aws_secret_access_key=job.secret_key,
        config=Config(
            s3={"addressing_style": "path"}, proxies={}, max_pool_connections=job.threads
        ),
    )
    transfer = TransferConfig(
        multipart_threshold=job.part_bytes,
        multipart_chunksize=job.part_bytes,
        max_concurrency=job.threads,
        preferred_transfer_client="classic",
    )

    def fetch() -> None:
        client.download_file(job.bucket, job.key, job.path, Config=transfer)

    return fetch
