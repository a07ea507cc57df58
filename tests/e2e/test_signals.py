"""SIGTERM and Ctrl-C end the daemon with 0: who waits is answered or told, nothing is left."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

import cached
from bench import gpt2
from tests.e2e.conftest import aws
from tests.e2e.served import MIB, environment
from tests.e2e.sparse import name_of
from tests.fakes.store_faults import Stall

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Daemons, SparseModels, Stores

URI = "s3://models/sparse.safetensors"
HOLDER = """
import sys, cached
with cached.open("llm", timeout_s=15) as model:
    view = model["wte.weight"]
    print("held", flush=True)
    sys.stdin.read()
    print(view.tobytes().hex()[:32], flush=True)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_an_idle_daemon_at_once(daemon: Daemons, tiny: Path, signum: signal.Signals):
    served = daemon({"llm": f"file://{tiny}/"}, prefetch=True)
    served.wait_for_state("llm", "resident")
    began_s = time.monotonic()
    served.process.send_signal(signum)
    assert served.process.wait(10) == 0
    assert time.monotonic() - began_s < 2
    assert not served.socket.exists()
    assert served.left_files() == []
    events = [record["event"] for record in served.records()]
    assert events[0] == "daemon started"
    assert events[-1] == "daemon stopped"
    assert "drain began" in events


def test_a_signal_ends_a_daemon_whose_listings_hang(daemon: Daemons, store: Stores):
    server = store({}, faults={("LIST", number): Stall(math.inf, -1) for number in range(20)})
    models = {f"llm{number}": "s3://models/llm/" for number in range(6)}
    flags = ("--fetch-threads=2",)  # two listings hang, four are queued
    served = daemon(models, *flags, more=aws(server), prefetch=True)
    assert server.stalled.wait(10)
    began_s = time.monotonic()
    assert served.stop() == 0
    assert time.monotonic() - began_s < 2
    assert server.count("LIST") <= 2


@pytest.mark.parametrize("attempt", range(3))
def test_a_signal_ends_a_daemon_that_has_just_begun_to_listen(
    daemon: Daemons, tiny: Path, attempt: int
):
    served = daemon({f"llm{attempt}": f"file://{tiny}/"}, prefetch=True)
    assert served.stop() == 0


def test_a_worker_keeps_what_it_mapped_when_the_daemon_ends(daemon: Daemons, tiny: Path):
    served = daemon({"llm": f"file://{tiny}/"})
    worker = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env=environment(served.worker_environment()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "held\n"
        assert served.stop() == 0
        written, _ = worker.communicate(timeout=10)
    expected = gpt2.load_files(tiny)["wte.weight"].tobytes().hex()[:32]
    assert written == f"{expected}\n"
    assert worker.returncode == 0


def test_a_model_that_was_opened_before_the_end_is_still_read_after_it(daemon: Daemons, tiny: Path):
    served = daemon({"llm": f"file://{tiny}/"})
    with cached.open("llm", timeout_s=15, until="ready") as model:
        assert served.stop() == 0
        tensors = {name: tensor.tobytes() for name, tensor in model.items()}
    assert tensors == {name: t.tobytes() for name, t in gpt2.load_files(tiny).items()}
    with pytest.raises(cached.DaemonUnavailable):
        cached.open("llm")


@pytest.fixture
def environment_of_a_slow_store(store: Stores, sparse_model: SparseModels) -> dict[str, str]:
    """AWS_* of a store that sends eight tensors of 4 MiB at 8 MB/s."""
    path = sparse_model(tensors=8, tensor_bytes=4 * MIB)
    return aws(store({path.name: path}, throttle_bytes_per_s=8e6))


def waiting_for(model: cached.Model, name: str) -> tuple[threading.Thread, list[object]]:
    """Ask for a tensor in a thread of its own; its list is what came: a tensor or an error."""
    got: list[object] = []

    def work() -> None:
        try:
            got.append(model[name].tobytes())
        except cached.CachedError as error:
            got.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.2)  # until the daemon has the request
    return thread, got


@pytest.mark.slow
def test_a_worker_that_waits_is_still_served_while_the_daemon_drains(
    daemon: Daemons, environment_of_a_slow_store: dict[str, str]
):
    served = daemon({"llm": URI}, more=environment_of_a_slow_store)
    with cached.open("llm", timeout_s=15) as model:
        thread, got = waiting_for(model, name_of(7))
        served.process.terminate()
        time.sleep(0.05)
        with pytest.raises(cached.DaemonUnavailable, match="stopping"):
            cached.open("llm", timeout_s=15, socket=str(served.socket))
        thread.join(15)
        assert isinstance(got[0], bytes), got
        assert len(got[0]) == 4 * MIB
        assert served.process.wait(5) == 0


@pytest.mark.slow
def test_workers_and_a_prefetch_get_all_of_the_load_that_a_drain_waits_for(
    daemon: Daemons, environment_of_a_slow_store: dict[str, str]
):
    served = daemon({"llm": URI}, more=environment_of_a_slow_store)
    with (
        cached.open("llm", timeout_s=15) as one,
        cached.open("llm", timeout_s=15) as other,
        ThreadPoolExecutor(3) as threads,
    ):
        tensors = threads.submit(lambda: [len(one[name].tobytes()) for name in one])
        path = threads.submit(lambda: other.path)
        prefetched = threads.submit(served.run, "prefetch", "llm")
        time.sleep(0.5)
        served.process.terminate()
        assert tensors.result(15) == [4 * MIB] * 8
        assert path.result(15)
        assert prefetched.result(15).returncode == 0, prefetched.result().stderr
        assert served.process.wait(5) == 0


@pytest.mark.slow
def test_a_worker_that_waits_for_too_long_is_told_when_the_daemon_ends(
    daemon: Daemons, store: Stores, sparse_model: SparseModels
):
    path = sparse_model(tensors=8, tensor_bytes=16 * MIB)
    more = aws(store({path.name: path}, throttle_bytes_per_s=4e6))
    served = daemon({"llm": URI}, "--drain-timeout=500ms", more=more)
    with cached.open("llm", timeout_s=15) as model:
        thread, got = waiting_for(model, name_of(7))
        began_s = time.monotonic()
        served.process.terminate()
        thread.join(5)
        assert isinstance(got[0], cached.DaemonUnavailable)
        assert 0.4 <= time.monotonic() - began_s <= 1.5
        assert served.process.wait(5) == 0
        assert time.monotonic() - began_s <= 3


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_ends_a_drain_at_once_and_leaves_nothing(
    daemon: Daemons, store: Stores, sparse_model: SparseModels, signum: signal.Signals
):
    path = sparse_model(tensors=8, tensor_bytes=16 * MIB)
    more = aws(store({path.name: path}, throttle_bytes_per_s=4e6))
    served = daemon({"llm": URI}, more=more)
    with cached.open("llm", timeout_s=15) as model:
        thread, got = waiting_for(model, name_of(7))
        served.process.send_signal(signum)
        time.sleep(0.2)
        assert served.process.poll() is None
        began_s = time.monotonic()
        served.process.send_signal(signum)
        thread.join(5)
        assert isinstance(got[0], cached.DaemonUnavailable)
        assert served.process.wait(5) == 0
        assert time.monotonic() - began_s <= 2
    assert not served.socket.exists()
    assert served.left_files() == []
    assert "drain cut short" in [record["event"] for record in served.records()]


@pytest.mark.slow
def test_a_load_that_nobody_waits_for_does_not_delay_the_end(
    daemon: Daemons, environment_of_a_slow_store: dict[str, str]
):
    served = daemon({"llm": URI}, more=environment_of_a_slow_store, prefetch=True)
    served.wait_for_state("llm", "loading")
    began_s = time.monotonic()
    assert served.stop() == 0
    assert time.monotonic() - began_s <= 2
