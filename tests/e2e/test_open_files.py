"""Every file in memory takes a descriptor: the soft limit is raised, the hard one is told of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import cached
from tests.e2e.served import COMMAND

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Daemons

FILES = 200
FEW = 100  # descriptors


@pytest.fixture
def many_files(tmp_path: Path) -> str:
    """A model of more files than there are descriptors; its URI."""
    for number in range(FILES):
        (tmp_path / f"{number:03}.txt").write_text("x")
    return f"file://{tmp_path}/"


def limited(limit: str) -> tuple[str, ...]:
    """Return the command of a daemon that starts with a limit of open files."""
    return ("sh", "-c", f'ulimit {limit} {FEW} && exec "$0" "$@"', str(COMMAND))


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
