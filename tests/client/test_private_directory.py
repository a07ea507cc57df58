"""A private directory lives as long as a process needs it, and no killed process leaves one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cached.client.private_directory import PREFIX, PrivateDirectory
from tests.fakes.local_daemon import open_descriptors

if TYPE_CHECKING:
    from pathlib import Path

HOLDER = """
import os, sys
from cached.client.private_directory import PrivateDirectory
made = PrivateDirectory(sys.argv[1])
open(made.path + "/weights", "wb").write(b"1234")
if sys.argv[2] == "fork" and os.fork():
    os._exit(0)  # as if killed; the child goes on
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def holder(parent: Path, how: str) -> tuple[subprocess.Popen[str], int]:
    """Start a process that has made a directory; return it and the id of the one that holds it."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, str(parent), how]
    started = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert started.stdout is not None
    return started, int(started.stdout.readline())


def end(process: subprocess.Popen[str]) -> None:
    process.communicate()


def test_it_is_made_empty_for_this_user_alone_and_removed_with_all_below(tmp_path: Path):
    before = len(open_descriptors())
    made = PrivateDirectory(str(tmp_path))
    assert os.listdir(made.path) == []
    assert os.stat(made.path).st_mode & 0o777 == 0o700
    os.makedirs(f"{made.path}/a/b")
    made.remove()
    made.remove()
    assert list(tmp_path.iterdir()) == []
    assert len(open_descriptors()) == before


def test_the_end_of_the_process_removes_it(tmp_path: Path):
    process, _ = holder(tmp_path, "hold")
    assert len(list(tmp_path.iterdir())) == 1
    end(process)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path):
    process, pid = holder(tmp_path, "hold")
    os.kill(pid, signal.SIGKILL)
    end(process)
    (left,) = tmp_path.iterdir()
    made = PrivateDirectory(str(tmp_path))
    assert not left.exists()
    made.remove()


@pytest.mark.parametrize("how", ["hold", "fork"])
def test_what_a_living_process_or_its_fork_needs_is_kept(tmp_path: Path, how: str):
    process, pid = holder(tmp_path, how)
    (kept,) = tmp_path.iterdir()
    PrivateDirectory(str(tmp_path)).remove()
    assert (kept / "weights").read_bytes() == b"1234"
    os.kill(pid, signal.SIGKILL)
    end(process)
    PrivateDirectory(str(tmp_path)).remove()
    assert not kept.exists()


def test_only_directories_of_its_kind_are_swept(tmp_path: Path):
    other = tmp_path / "cached-0"
    other.mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").write_bytes(b"")
    PrivateDirectory(str(tmp_path)).remove()
    assert other.is_dir()
    assert target.is_dir()
    assert (tmp_path / f"{PREFIX}file").exists()


def test_a_child_of_fork_that_lets_go_removes_nothing(tmp_path: Path):
    made = PrivateDirectory(str(tmp_path))
    child = os.fork()
    if not child:
        made.remove()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.path.isdir(made.path)
    made.remove()


def test_without_a_parent_it_is_in_memory_where_there_is_shared_memory():
    made = PrivateDirectory()
    assert os.path.basename(made.path).startswith(PREFIX)
    assert os.path.dirname(made.path) == "/dev/shm" or not os.path.isdir("/dev/shm")
    made.remove()
