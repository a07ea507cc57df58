"""Many workers that want an absent model at once cost its store one load: each byte once."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

import cached
from tests.e2e.conftest import aws
from tests.e2e.served import MIB, environment
from tests.e2e.sparse import is_whole, name_of, write_sparse

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Daemons, Stores
    from tests.e2e.served import Served
    from tests.fakes.store_server import StoreServer

OPENERS = 50
PART_BYTES = 8 * MIB
URI = "s3://models/llm/"
OPENER = """
import sys, cached
sys.stdin.readline()
with cached.open("llm", timeout_s=60) as model:
    print(sum(view.nbytes for _, view in model.items()), flush=True)
"""


def model_of(directory: Path, shards: int, tensors: int) -> dict[str, Path]:
    """Write a model of several shards of 8 MiB tensors, and a small file; return it by key."""
    names = [f"model-{shard}.safetensors" for shard in range(shards)]
    for shard, name in enumerate(names):
        write_sparse(
            directory / name, tensors=tensors, tensor_bytes=PART_BYTES, first=shard * tensors
        )
    (directory / "config.json").write_text("{}")
    return {f"llm/{name}": directory / name for name in (*names, "config.json")}


def assert_fetched_once(served: Served, server: StoreServer, objects: dict[str, Path]) -> None:
    """Check what the store sent, and that the daemon's metrics say the same."""
    size_bytes = sum(path.stat().st_size for path in objects.values())
    hedges = served.metric("cached_hedges_total")  # a machine that stands still makes some
    assert server.served_bytes >= size_bytes
    assert server.served_bytes - size_bytes <= hedges * PART_BYTES
    assert hedges <= 2 + server.gets / 20
    assert served.metric("cached_fetch_bytes_total") == size_bytes
    assert server.gets <= math.ceil(size_bytes / PART_BYTES) + 64 + len(objects)
    assert served.metric("cached_gets_total") == server.gets
    opens = [served.metric("cached_opens_total", result=result) for result in ("hit", "miss")]
    assert sum(opens) == served.metric("cached_opens_total") == OPENERS
    assert served.metric("cached_loads_total") == 1


def test_fifty_threads_open_an_absent_model_and_it_is_fetched_once(
    daemon: Daemons, store: Stores, tmp_path: Path
):
    objects = model_of(tmp_path, shards=3, tensors=2)
    server = store(objects)
    served = daemon({"llm": URI}, more=aws(server))
    together = threading.Barrier(OPENERS)
    whole: list[bool] = []

    def work() -> None:
        together.wait()
        with cached.open("llm", timeout_s=15) as model:
            whole.append(all(is_whole(number, model[name_of(number)]) for number in range(6)))

    threads = [threading.Thread(target=work) for _ in range(OPENERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert whole == [True] * OPENERS
    served.wait_for_state("llm", "resident")
    assert_fetched_once(served, server, objects)


@pytest.mark.slow
def test_fifty_processes_open_an_absent_model_and_it_is_fetched_once(
    daemon: Daemons, store: Stores, tmp_path: Path
):
    objects = model_of(tmp_path, shards=4, tensors=16)
    server = store(objects)
    served = daemon({"llm": URI}, more=aws(server))
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER],
            env=environment(served.worker_environment()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(OPENERS)
    ]
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write("\n")
        opener.stdin.flush()
    said = [opener.communicate(timeout=60)[0] for opener in openers]
    assert said == [f"{4 * 16 * PART_BYTES}\n"] * OPENERS
    served.wait_for_state("llm", "resident")
    assert_fetched_once(served, server, objects)
