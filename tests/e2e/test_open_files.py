"""Every file in memory takes a descriptor: the soft limit is raised, the hard one is told of.

HTTP connections take few, however many somebody opens.
"""

from __future__ import annotations

import contextlib
import resource
import socket
from typing import TYPE_CHECKING

import pytest

import cached
from tests.e2e.served import COMMAND

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Daemons

FILES = 200
FEW = 100  # descriptors
CROWD = 1224  # more than a daemon with the usual limit has


@pytest.fixture
def many_files(tmp_path: Path) -> str:
    """A model of more files than there are descriptors; its URI."""
    for number in range(FILES):
        (tmp_path / f"{number:03}.txt").write_text("x")
    return f"file://{tmp_path}/"


def limited(limit: str, most: int = FEW) -> tuple[str, ...]:
    """Return the command of a daemon that starts with a limit of open files."""
    return ("sh", "-c", f'ulimit {limit} {most} && exec "$0" "$@"', str(COMMAND))


def test_a_low_soft_limit_does_not_bind_the_daemon(daemon: Daemons, many_files: str):
    daemon({"llm": many_files}, command=limited("-S -n"))
    with cached.open("llm", timeout_s=15, until="ready") as model:
        assert len(model.files) == FILES


def test_a_model_with_more_files_than_descriptors_is_refused_and_the_daemon_serves_on(
    daemon: Daemons, many_files: str, tiny: Path
):
    daemon({"llm": many_files, "tiny": f"file://{tiny}/"}, command=limited("-n"))
    with pytest.raises(cached.LoadFailed, match=r"[Tt]oo many open files; raise .* \(ulimit -n\)"):
        cached.open("llm", timeout_s=15, until="ready")
    with cached.open("tiny", timeout_s=15, until="ready") as model:
        assert model.path


@pytest.fixture
def enough_files() -> Iterator[None]:
    """Let this process open as many connections as the test needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * CROWD:
        pytest.skip(f"NO TEST OF A CROWD ON HTTP: this process may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * CROWD), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.usefixtures("enough_files")
@pytest.mark.parametrize(("limit", "most"), [(1024, 64), (FEW, 6)])
def test_a_crowd_of_idle_http_connections_leaves_workers_and_probes_their_place(
    daemon: Daemons, tiny: Path, limit: int, most: int
):
    served = daemon({"tiny": f"file://{tiny}/"}, prefetch=True, command=limited("-n", limit))
    served.wait_for_state("tiny", "resident")
    assert served.get("/healthz")[0] == 200
    with contextlib.ExitStack() as stack:
        for _ in range(CROWD):
            address = ("127.0.0.1", served.http_port)
            stack.enter_context(socket.create_connection(address, timeout=10))
        with cached.open("tiny", timeout_s=5) as model:
            assert model.path
        assert served.get("/healthz")[0] == 200  # the crowd is still there
    assert served.get("/healthz")[0] == 200
    event = "http connections closed for newer ones"
    (told,) = [record for record in served.records() if record["event"] == event]
    assert (told["closed"], told["most"]) == (1, most)
