"""What starting costs: a worker that imports cached, and the daemon up to its first request."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.served import environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Daemons

HEAVY = {
    "aiohttp", "asyncio", "boto3", "botocore", "concurrent", "dataclasses", "email", "http",
    "inspect", "logging", "ml_dtypes", "multiprocessing", "numpy", "prometheus_client", "psutil",
    "torch", "unittest", "uvloop",
}  # fmt: skip
ROUNDS = 25

# A program around the command: when the first connection goes out, it writes what is imported.
SPY = """
import sys

def note(event, arguments, told=[]):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and not told:
        told.append(True)
        with open({path!r}, "w") as file:
            file.write("\\n".join(sorted(sys.modules)))

sys.addaudithook(note)
from cached.cli.main import main
sys.exit(main())
"""


def modules_after(code: str) -> set[str]:
    """Return the names of top-level modules that a program has imported at its end."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    return set(ended.stdout.split())


def start_s(code: str, compiled: Path) -> float:
    """Return how long a process lives that runs this; it finds its modules compiled."""
    more = {"PYTHONPYCACHEPREFIX": str(compiled), "PYTHONDONTWRITEBYTECODE": ""}
    began_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment(more), check=True)
    return time.perf_counter() - began_s


def test_importing_cached_imports_nothing_heavy():
    assert modules_after("import cached") & HEAVY == set()


def test_importing_all_that_opens_a_model_imports_nothing_heavy():
    assert modules_after("import cached; cached.open; cached.Model") & HEAVY == set()


def test_opening_a_model_without_numpy_imports_nothing_heavy(daemon: Daemons, tiny: Path):
    served = daemon({"llm": f"file://{tiny}/"})
    code = f"""
import cached
with cached.open("llm", timeout_s=15, socket={str(served.socket)!r}) as model:
    assert model.path and len(model.buffer("wte.weight")) == 300 * 32 * 2
"""
    assert modules_after(code) & HEAVY == set()


@pytest.mark.parametrize("uri", ["s3://models/llm/", "s3://models/llm.safetensors"])
def test_the_daemon_imports_nothing_heavy_before_its_first_request(
    daemon: Daemons, tmp_path: Path, uri: str
):
    path = tmp_path / "modules"
    served = daemon(
        {"llm": uri},
        "--endpoint-url=http://127.0.0.1:1",  # nobody listens: the connection is what counts
        more={"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_REGION": "r"},
        prefetch=True,
        command=(sys.executable, "-c", SPY.format(path=str(path))),
    )
    served.get("/healthz")  # it imports the HTTP side only now
    imported = set(path.read_text().split())
    assert "cached.adapters.s3.store" in imported
    assert {name.partition(".")[0] for name in imported} & HEAVY == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "max_ratio"),
    [("import cached", 1.5), ("import cached; cached.open", 1.75)],
    ids=["import", "all that opens a model"],
)
def test_importing_cached_costs_little_more_than_what_any_client_needs(
    tmp_path: Path, code: str, max_ratio: float
):
    least = "import socket, json, mmap"
    start_s(least, tmp_path)
    start_s(code, tmp_path)
    pairs = [(start_s(least, tmp_path), start_s(code, tmp_path)) for _ in range(ROUNDS)]
    ratio = statistics.median(ours_s / least_s for least_s, ours_s in pairs)
    assert ratio <= max_ratio
