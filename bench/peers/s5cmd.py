"""s5cmd: the program itself, from its start to its end."""

from __future__ import annotations

import os
import select
import subprocess
from importlib.metadata import distribution
from typing import TYPE_CHECKING

from bench.process import peak_rss_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.peers.job import Job

LOOK_EVERY_MS = 20


def prepare(job: Job) -> Callable[[], int]:
    command = [
        str(distribution("s5cmd").locate_file("s5cmd/bin/s5cmd")),
        "--log=error",
        f"--endpoint-url={job.endpoint_url}",
        "cp",
        f"--concurrency={job.threads}",
        f"--part-size={job.part_bytes >> 20}",
        f"s3://{job.bucket}/{job.key}",
        job.path,
    ]
    environment = dict(
        os.environ,
        AWS_ACCESS_KEY_ID=job.access_key,
        AWS_SECRET_ACCESS_KEY=job.secret_key,
        AWS_REGION=job.region,
    )

    def fetch() -> int:
        with subprocess.Popen(command, env=environment) as process:
            peak_bytes = _watch(process.pid)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return peak_bytes

    return fetch


def _watch(pid: int) -> int:
    """Return the peak RSS, seen from outside, of a process that has ended by then.

    Not from wait4: its figure begins with the memory of the process that started this one.
    """
    peak_bytes = 0
    end = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(end, select.POLLIN)
    try:
        while not poll.poll(LOOK_EVERY_MS):
            peak_bytes = max(peak_bytes, peak_rss_bytes(pid))
    finally:
        os.close(end)
    return peak_bytes
