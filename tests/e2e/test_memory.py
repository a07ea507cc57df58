"""One copy of a model for all workers, and a daemon that stays small whatever it loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench import process
from cached.core.loads import file_bytes
from tests.e2e.served import COMMAND, MIB, TMPFS, environment
from tests.e2e.sparse import write_sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Daemons
    from tests.e2e.served import Served

ROOT = Path(__file__).parents[2]
TENSOR_BYTES = 16 * MIB
WORKERS = 8
MAX_PRIVATE_BYTES = 60 * MIB
MAX_GROWTH_BYTES = 16 * MIB  # what Python and the HTTP side take while a load goes on

WORKER = """
import json, sys
import cached, numpy

print("null", flush=True)
sys.stdin.readline()
model = cached.open("llm", timeout_s=60)
views = dict(model.items())
total = sum(int(view[::4096].sum(dtype=numpy.int64)) for view in views.values())
print(json.dumps([total, len(views)]), flush=True)
sys.stdin.readline()
"""


class Worker:
    """A process that maps a model and touches every page of it."""

    def __init__(self, served: Served) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment(served.worker_environment()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the worker ended"
        return json.loads(line)

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture
def big(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A directory with one file of so many bytes."""
    size_bytes: int = request.param
    needed_bytes = size_bytes + 512 * MIB
    free_bytes = shutil.disk_usage(TMPFS).free if TMPFS.is_dir() else 0
    if free_bytes < needed_bytes:
        pytest.skip(f"{TMPFS} HAS {free_bytes // MIB} MiB FREE, this needs {needed_bytes // MIB}")
    write_sparse(
        tmp_path / "m.safetensors",
        tensors=size_bytes // TENSOR_BYTES,
        tensor_bytes=TENSOR_BYTES,
    )
    return tmp_path


def memory_while_loading(served: Served) -> Iterator[tuple[int, int]]:
    """Yield private and resident bytes of the daemon while it loads."""
    command = [str(COMMAND), "prefetch", "llm"]
    with subprocess.Popen(
        command,
        env=environment(served.worker_environment()),
        stdout=subprocess.DEVNULL,
    ) as prefetch:
        while prefetch.poll() is None:
            yield process.private_bytes(served.pid), process.rss_bytes(served.pid)
            time.sleep(0.02)
    assert prefetch.returncode == 0


@contextmanager
def stored(path: Path, scheme: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield a model's URI in a store of this scheme, and the environment of its users."""
    if scheme == "file":
        yield f"file://{path}", {}
        return
    command = [sys.executable, "-m", "tests.fakes.store_server", str(path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        more = {
            "AWS_ENDPOINT_URL": server.stdout.readline().strip(),
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "key",
        }
        yield f"s3://models/{path.name}", more
        server.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["file", "s3"])
@pytest.mark.parametrize("big", [2048 * MIB], indirect=True, ids=["2GiB"])
def test_the_daemon_stays_small_and_flat_while_it_loads(daemon: Daemons, big: Path, scheme: str):
    path = big / "m.safetensors"
    with stored(path, scheme) as (uri, more):
        served = daemon({"llm": uri}, more=more)
        served.get("/metrics")  # the HTTP side is imported, as it is in real use
        samples = list(memory_while_loading(served))
    assert served.model("llm")["committed_bytes"] == file_bytes(path.stat().st_size)
    assert len(samples) > 10
    resident = [rss_bytes for _, rss_bytes in samples]
    assert max(private_bytes for private_bytes, _ in samples) <= MAX_PRIVATE_BYTES
    assert max(resident) - resident[0] <= MAX_GROWTH_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("big", [512 * MIB], indirect=True, ids=["512MiB"])
def test_eight_workers_share_one_copy(daemon: Daemons, big: Path):
    served = daemon({"llm": f"file://{big}/"}, prefetch=True)
    model_bytes = (big / "m.safetensors").stat().st_size
    workers = [Worker(served) for _ in range(WORKERS)]
    try:
        for each in workers:
            each.read()
        without_bytes = sum(process.pss_bytes(each.process.pid) for each in workers)
        for each in workers:
            each.go_on()
        for each in workers:
            total, tensors = each.read()
            assert tensors == model_bytes // TENSOR_BYTES
            assert total > 0
        with_bytes = sum(process.pss_bytes(each.process.pid) for each in workers)
        for each in workers:
            each.go_on()
    finally:
        for each in workers:
            each.process.communicate(timeout=30)
    assert with_bytes <= 1.1 * model_bytes + without_bytes
    assert with_bytes >= model_bytes  # else nothing was touched, and nothing measured
