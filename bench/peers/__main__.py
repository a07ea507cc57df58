"""Run one peer once: a job as JSON on stdin, the figures as JSON on stdout.

The call alone is measured, with all threads and processes that it starts; also where it raises:
then status and stderr say so beside the figures.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import sys
import time

from bench.peers.job import Job
from bench.process import peak_rss_bytes


def main(name: str) -> None:
    job = Job(**json.load(sys.stdin))
    fetch = importlib.import_module(f"bench.peers.{name.replace('-', '_')}").prepare(job)
    gc.collect()
    own_cpu_s = time.process_time()
    began_s = time.perf_counter()
    other_peak_bytes = None
    try:
        other_peak_bytes = fetch()
    finally:
        wall_s = time.perf_counter() - began_s
        own_cpu_s = time.process_time() - own_cpu_s
        is_own = other_peak_bytes is None
        figures = {
            "wall_s": wall_s,
            "cpu_s": own_cpu_s if is_own else _cpu_of_children_s(),
            "rss_bytes": peak_rss_bytes(os.getpid()) if is_own else other_peak_bytes,
        }
        print(json.dumps(figures), flush=True)


def _cpu_of_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


main(sys.argv[1])
