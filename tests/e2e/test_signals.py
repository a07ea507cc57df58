"""SIGTERM and Ctrl-C end the daemon with 0: who waits is answered or told, nothing is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import cached
from bench import gpt2
from tests.e2e.served import environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Daemons

HOLDER = """
import sys, cached
with cached.open("llm", timeout_s=15) as model:
    view = model["wte.weight"]
    print("held", flush=True)
    sys.stdin.read()
    print(view.tobytes().hex()[:32], flush=True)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
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
    assert "drain requested" in events


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
