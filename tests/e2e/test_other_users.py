"""Who is served cannot change what it reads: as another user, and through a read-only mount."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import cached
from tests.e2e.served import environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Daemons
    from tests.e2e.served import Served

STRANGER = 65534

# Prints NAME=OUTCOME for each try: "done", or the name of the error. A try that should have failed
# and did not may well have harmed the file: what is there afterwards is compared outside.
TRIES = """
import errno, mmap, os

def tried(name, call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        print(f"{name}={errno.errorcode[error.errno]}")
    else:
        print(f"{name}=done")

def try_path(path):
    tried("open to read", os.open, path, os.O_RDONLY)
    tried("open to write", os.open, path, os.O_RDWR)
    tried("open to truncate", os.open, path, os.O_WRONLY | os.O_TRUNC)
    tried("truncate", os.truncate, path, 0)
    tried("chmod", os.chmod, path, 0o666)
    tried("unlink", os.unlink, path)
    tried("rename", os.rename, path, path + "-")
    tried("create beside", os.open, path + "+", os.O_WRONLY | os.O_CREAT)

def try_descriptor(fd):
    again = f"/proc/self/fd/{fd}"
    tried("fd read", os.pread, fd, 1, 0)
    tried("fd map to read", mmap.mmap, fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    tried("fd write", os.pwrite, fd, b"x", 0)
    tried("fd truncate", os.ftruncate, fd, 0)
    tried("fd map to write", mmap.mmap, fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    tried("fd chmod", os.fchmod, fd, 0o666)
    tried("fd open to read", os.open, again, os.O_RDONLY)
    tried("fd open to write", os.open, again, os.O_RDWR)
    tried("fd truncate by path", os.truncate, again, 0)
"""

AS_ANOTHER_USER = """
import sys
import cached
from cached.client.deadline import Deadline

cached.open("llm", timeout_s=15).close()  # imports all that a stranger may be unable to read
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
with cached.open("llm", timeout_s=15) as model:
    assert model.buffer("wte.weight").readonly
    name = model.files[0]
    try_path(f"{model.path}/{name}")
    try_descriptor(model._source.descriptors([0], Deadline(15))[0])
"""

BY_PATH = """
import sys
try_path(sys.argv[1])
"""

READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || { echo "mount: no" >&2; exit 1; }
exec "$2" -c "$3" "$4"
"""


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return dict(line.split("=") for line in done.stdout.splitlines())


def run(*command: str, served: Served) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment(served.worker_environment()),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def contents(directory: str | Path) -> dict[str, tuple[int, bytes]]:
    """Return mode and bytes of every file below a directory."""
    found = {}
    for where, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(where, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, directory)] = (os.stat(path).st_mode, file.read())
    return found


@pytest.fixture
def served(daemon: Daemons, tiny: Path) -> Served:
    """A daemon whom every user may ask, with a model that is resident."""
    served = daemon({"llm": f"file://{tiny}/"}, "--socket-mode=0666", prefetch=True)
    served.directory.chmod(0o755)
    served.root.chmod(0o755)
    served.wait_for_state("llm", "resident")
    return served


def test_another_user_reads_what_is_published_and_changes_nothing(served: Served, tiny: Path):
    if os.geteuid() != 0:
        pytest.skip("NOT PROVEN HERE: only root can become another user; run this as root")
    before = contents(served.root / "models")
    tried = outcomes(
        run(sys.executable, "-c", TRIES + AS_ANOTHER_USER, str(STRANGER), served=served)
    )
    assert tried == {
        "open to read": "done",
        "open to write": "EACCES",
        "open to truncate": "EACCES",
        "truncate": "EACCES",
        "chmod": "EPERM",
        "unlink": "EACCES",
        "rename": "EACCES",
        "create beside": "EACCES",
        "fd read": "done",
        "fd map to read": "done",
        "fd write": "EBADF",
        "fd truncate": "EINVAL",
        "fd map to write": "EACCES",
        "fd chmod": "EPERM",
        "fd open to read": "done",
        "fd open to write": "EACCES",
        "fd truncate by path": "EACCES",
    }
    assert contents(served.root / "models") == before


def test_nobody_changes_by_path_what_a_read_only_mount_shows(served: Served):
    with cached.open("llm", timeout_s=15) as model:
        path = f"{model.path}/{model.files[0]}"
    before = contents(served.root / "models")
    # The daemon's own user, with every capability over its files: the mount alone protects.
    command = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, "sh")
    done = run(*command, str(served.root), sys.executable, TRIES + BY_PATH, path, served=served)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"NOT PROVEN HERE: no read-only mount can be made: {done.stderr.strip()}")
    assert outcomes(done) == {
        "open to read": "done",
        "open to write": "EROFS",
        "open to truncate": "EROFS",
        "truncate": "EROFS",
        "chmod": "EROFS",
        "unlink": "EROFS",
        "rename": "EROFS",
        "create beside": "EROFS",
    }
    assert contents(served.root / "models") == before
