"""A daemon that has nothing to do costs nothing: no thread wakes up, no CPU is used."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import cached
from tests.e2e.conftest import aws
from tests.e2e.sparse import name_of

if TYPE_CHECKING:
    from tests.e2e.conftest import Daemons, SparseModels, Stores

IDLE_S = 3.0
SETTLE_S = 1.0  # for what ends after the last request: connections are closed, memory is given back


def activity(pid: int) -> dict[str, tuple[int, int]]:
    """Return, for each thread: how often it has slept and woken up, and ticks of CPU (proc(5))."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        facts = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        after_name = (task / "stat").read_text().rpartition(")")[2].split()
        user, system = after_name[11:13]
        found[task.name] = (int(facts["voluntary_ctxt_switches"]), int(user) + int(system))
    return found


@pytest.mark.slow
def test_an_idle_daemon_with_a_leased_model_never_wakes_up(
    daemon: Daemons, store: Stores, sparse_model: SparseModels
):
    path = sparse_model(tensors=4, tensor_bytes=1 << 20)
    server = store({path.name: path})
    served = daemon({"llm": f"s3://models/{path.name}"}, more=aws(server), prefetch=True)
    with cached.open("llm", timeout_s=15, until="ready") as model:
        view = model[name_of(0)]
        assert served.get("/readyz")[0] == 200
        time.sleep(SETTLE_S)
        before = activity(served.pid)
        time.sleep(IDLE_S)
        after = activity(served.pid)
        assert after == before
        assert served.get("/metrics")[0] == 200
        woken = activity(served.pid)
        assert sum(count for count, _ in woken.values()) > sum(count for count, _ in after.values())
        assert view.nbytes == 1 << 20
