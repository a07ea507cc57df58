"""A worker hears of the daemon's death at once, by a typed error, and keeps what it mapped."""

from __future__ import annotations

import math
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

import cached
from bench import gpt2
from tests.e2e.conftest import aws
from tests.e2e.served import MIB
from tests.e2e.sparse import name_of
from tests.fakes.store_faults import Stall

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.conftest import Daemons, SparseModels, Stores
    from tests.e2e.served import Served

ROUNDS = 7
MAX_WAIT_S = 0.05
SETTLE_S = 0.3  # until the request is known to wait in the daemon
TENSORS = 16
LAST = name_of(TENSORS - 1)
URI = "s3://models/sparse.safetensors"

WAITS: dict[str, Callable[[cached.Model], object]] = {
    "tensor": lambda model: model[LAST],
    "path": lambda model: model.path,
    "all": lambda model: model.wait(),
    "arrival": lambda model: list(model.items(order="arrival")),
}


@pytest.fixture
def environment(store: Stores, sparse_model: SparseModels) -> dict[str, str]:
    """AWS_* of a store that sends 256 MiB at 4 MB/s: no load ends while a test lasts."""
    path = sparse_model(tensors=TENSORS, tensor_bytes=16 * MIB)
    return aws(store({path.name: path}, throttle_bytes_per_s=4e6))


class Waiting:
    """A call in a thread of its own, and when it ended with which error."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self.ended_s = 0.0
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except cached.CachedError as error:
            self.error = error
        self.ended_s = time.monotonic()

    def join(self) -> None:
        self._thread.join(15)
        assert not self._thread.is_alive(), "the call still waits"


def killed(served: Served, waiting: list[Waiting]) -> list[float]:
    """Kill the daemon; return after how many seconds each call ended, all with the right error."""
    time.sleep(SETTLE_S)
    killed_s = time.monotonic()
    served.process.kill()
    for each in waiting:
        each.join()
        assert isinstance(each.error, cached.DaemonUnavailable), each.error
    served.process.wait()
    return [each.ended_s - killed_s for each in waiting]


@pytest.mark.slow
@pytest.mark.parametrize("kind", WAITS)
def test_a_waiting_worker_hears_of_the_death_at_once(
    daemon: Daemons, environment: dict[str, str], kind: str
):
    waits_s = []
    for _ in range(ROUNDS):
        served = daemon({"llm": URI}, more=environment)
        with cached.open("llm", timeout_s=15) as model:
            waits_s += killed(served, [Waiting(partial(WAITS[kind], model))])
    assert max(waits_s) <= MAX_WAIT_S


@pytest.mark.slow
def test_a_worker_that_waits_for_the_header_hears_of_the_death_at_once(
    daemon: Daemons, store: Stores, tiny: Path
):
    shard = min(tiny.glob("*.safetensors"))
    server = store({"m.safetensors": shard}, faults=dict.fromkeys(range(9), Stall(math.inf)))
    served = daemon({"llm": "s3://models/m.safetensors"}, more=aws(server))
    (wait_s,) = killed(served, [Waiting(lambda: cached.open("llm", timeout_s=15))])
    assert wait_s <= MAX_WAIT_S


@pytest.mark.slow
def test_many_waiting_workers_hear_of_the_death_at_once(
    daemon: Daemons, environment: dict[str, str]
):
    served = daemon({"llm": URI}, more=environment)
    models = [cached.open("llm", timeout_s=15) for _ in range(20)]
    waits_s = killed(served, [Waiting(partial(WAITS["tensor"], model)) for model in models])
    for model in models:
        model.close()
    assert max(waits_s) <= MAX_WAIT_S


@pytest.mark.slow
def test_the_next_call_does_not_wait_either(daemon: Daemons, environment: dict[str, str]):
    served = daemon({"llm": URI}, more=environment)
    with cached.open("llm", timeout_s=15) as model:
        served.kill()
        calls: list[Callable[[], object]] = [
            lambda: model[LAST],
            lambda: model.is_stale,
            lambda: cached.open("llm"),
        ]
        for call in calls:
            began_s = time.monotonic()
            with pytest.raises(cached.DaemonUnavailable):
                call()
            assert time.monotonic() - began_s <= MAX_WAIT_S


def test_a_killed_daemon_takes_nothing_from_who_had_mapped_it(daemon: Daemons, tiny: Path):
    served = daemon({"llm": f"file://{tiny}/"})
    expected = gpt2.load_files(tiny)
    with cached.open("llm", timeout_s=15, until="ready") as model:
        early = model["wte.weight"]
        served.kill()
        assert early.tobytes() == expected["wte.weight"].tobytes()
        for name, tensor in model.items():
            assert tensor.tobytes() == expected[name].tobytes()
