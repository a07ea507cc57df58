"""obstore: ``get_range`` from threads, each part copied to the file."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import obstore
from obstore.store import S3Store

from bench.peers.job import parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.peers.job import Job


def prepare(job: Job) -> Callable[[], None]:
    store = S3Store(
        job.bucket,
        endpoint=job.endpoint_url,
        access_key_id=job.access_key,
        secret_access_key=job.secret_key,
        region=job.region,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )

    def fetch() -> None:
        descriptor = os.open(job.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

        def fetch_part(part: tuple[int, int]) -> None:
            start, stop = part
            view = memoryview(obstore.get_range(store, job.key, start=start, end=stop))
            while view:
                written = os.pwrite(descriptor, view, start)
                start += written
                view = view[written:]

        try:
            with ThreadPoolExecutor(job.threads) as pool:
                for _ in pool.map(fetch_part, parts(job)):
                    pass
        finally:
            os.close(descriptor)

    return fetch
