"""awscrt: an S3Client that writes the file itself."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from awscrt.auth import AwsCredentialsProvider
from awscrt.http import HttpHeaders, HttpRequest
from awscrt.io import ClientBootstrap, DefaultHostResolver, EventLoopGroup
from awscrt.s3 import (
    S3Client,
    S3RequestTlsMode,
    S3RequestType,
    create_default_s3_signing_config,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.peers.job import Job

END_TIMEOUT_S = 120


def prepare(job: Job) -> Callable[[], None]:
    group = EventLoopGroup(job.threads)
    signing = create_default_s3_signing_config(
        region=job.region,
        credential_provider=AwsCredentialsProvider.new_static(job.access_key, job.secret_key),
    )
    client = S3Client(
        bootstrap=ClientBootstrap(group, DefaultHostResolver(group)),
        region=job.region,
        tls_mode=S3RequestTlsMode.DISABLED,
        signing_config=signing,
        part_size=job.part_bytes,
        max_active_connections_override=job.threads,
    )
    host = urlsplit(job.endpoint_url).netloc
    request = HttpRequest("GET", f"/{job.bucket}/{job.key}", HttpHeaders([("Host", host)]))

    def fetch() -> None:
        client.make_request(
            type=S3RequestType.GET_OBJECT,
            operation_name="GetObject",
            request=request,
            recv_filepath=job.path,
        ).finished_future.result(END_TIMEOUT_S)

    return fetch
