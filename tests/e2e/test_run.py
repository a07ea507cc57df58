"""``cached run`` keeps a model for a program that knows only its path, as long as it runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

import cached
from tests.e2e.conftest import aws
from tests.e2e.editions import OWN, Edition, edition, put, uri_of, wrong_in
from tests.e2e.kernel import pages
from tests.e2e.served import COMMAND, MIB, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.conftest import Daemons, Stores
    from tests.e2e.served import Served

BUDGET = f"--memory-budget={64 * MIB}"  # for one of two models
ENDED_S = 1.0  # from the end of a program to that of its lease
SEGMENTS = pytest.mark.parametrize("segments", ["tmpfs", "memfd"])

# Each reads a file by its path, says what it found and closes it; and again for every line that it
# is sent. In between it has nothing of the model open.
CAT = f"""
while found=$(sha256sum < "$CACHED_MODEL_PATH/{OWN}") && echo "${{found%% *}}" && read line
do :
done
"""
SAFE_OPEN = f"""
import json, sys, zlib
from safetensors import safe_open
while True:
    with safe_open(sys.argv[1] + "/{OWN}", "np") as file:
        found = {{name: zlib.crc32(file.get_tensor(name).tobytes()) for name in file.keys()}}
    print(json.dumps(found), flush=True)
    if not sys.stdin.readline():
        break
"""
CHILD = f"exec 3<&0\n{CAT.strip()} <&3 &\nexec sleep 60"  # a shell gives its children no input


def told_by_cat(given: Edition) -> str:
    return hashlib.sha256(given.objects[f"a/{OWN}"].content_of(0, 1 << 40)).hexdigest()


def told_by_safe_open(given: Edition) -> str:
    return json.dumps({name: each for name, each in given.sums.items() if name.startswith("own.")})


PROGRAMS = pytest.mark.parametrize(
    ("command", "told_by"),
    [
        (("sh", "-c", CAT), told_by_cat),
        ((sys.executable, "-c", SAFE_OPEN, "{}"), told_by_safe_open),
    ],
    ids=["cat", "safe_open"],
)


class Program:
    """What ``cached run a`` has become."""

    def __init__(self, served: Served, *command: str) -> None:
        self.process = subprocess.Popen(
            [COMMAND, "run", "a", "--timeout=30s", "--", *command],
            env=environment(served.worker_environment()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the program ended"
        return line.strip()

    def read_again(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        """Kill it and all that it started; again: does nothing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def served(daemon: Daemons, store: Stores, segments: str) -> Served:
    """A daemon of the models ``a`` and ``b``, with room for one of them."""
    server = store({})
    for name in ("a", "b"):
        put(server, edition(name, 0))
    models = {name: uri_of(name) for name in ("a", "b")}
    return daemon(models, BUDGET, f"--segments={segments}", more=aws(server))


@pytest.fixture
def run(served: Served) -> Iterator[Callable[..., Program]]:
    """Start programs that have ended when the test has."""
    started: list[Program] = []

    def start(*command: str) -> Program:
        started.append(Program(served, *command))
        return started[-1]

    yield start
    for each in started:
        each.end()


def wait_for_no_lease(served: Served, since_s: float) -> None:
    """Return once nobody holds ``a``; that must be soon after the moment that is given."""
    deadline_s = time.monotonic() + 10
    while served.model("a")["leases"]:
        assert time.monotonic() < deadline_s, "the lease does not end"
    asking_s = 1.0  # ``cached status`` itself, on a busy machine
    assert time.monotonic() - since_s < ENDED_S + asking_s


def assert_is_kept(served: Served) -> None:
    """See that the model ``a`` goes for nobody."""
    with pytest.raises(cached.OverBudget, match=r"b needs 40\..* of it leased"):
        cached.open("b", timeout_s=30)
    evicted = served.run("evict", "a")
    assert (evicted.returncode, "leased by 1 worker" in evicted.stderr) == (1, True)
    assert served.model("a")["leases"] == 1


def assert_goes(served: Served) -> None:
    """See that ``b`` comes in its place, right, and that all memory is that of ``b``."""
    given = edition("b", 0)
    with cached.open("b", timeout_s=30, until="ready") as model:
        assert wrong_in(model, {given.version: given.sums}) == []
    assert served.model("a")["state"] == "absent"
    assert sum(pages(served).values()) == given.size_bytes


@pytest.mark.slow
@SEGMENTS
@PROGRAMS
def test_a_program_keeps_the_model_until_it_is_killed(
    served: Served, run: Callable[..., Program], command: tuple[str, ...], told_by: Any
):
    expected = told_by(edition("a", 0))
    program = run(*command)
    assert program.hear() == expected
    assert_is_kept(served)
    assert program.read_again() == expected
    since_s = time.monotonic()
    program.process.kill()
    wait_for_no_lease(served, since_s)
    assert_goes(served)


@pytest.mark.slow
@pytest.mark.parametrize("segments", ["tmpfs"])
def test_what_a_program_has_started_keeps_the_model_too(
    served: Served, run: Callable[..., Program]
):
    expected = told_by_cat(edition("a", 0))
    program = run("sh", "-c", CHILD)
    assert program.hear() == expected
    program.process.kill()
    program.process.wait()
    assert_is_kept(served)
    assert program.read_again() == expected
    since_s = time.monotonic()
    program.end()
    wait_for_no_lease(served, since_s)
    assert_goes(served)


@pytest.mark.slow
@SEGMENTS
def test_a_path_alone_keeps_nothing_between_one_file_and_the_next(served: Served):
    path = served.run("path", "a").stdout.strip()
    assert os.path.exists(f"{path}/{OWN}")
    assert_goes(served)
    assert not os.path.exists(f"{path}/{OWN}")


@pytest.mark.slow
@SEGMENTS
def test_a_program_that_ends_by_itself_tells_its_code_and_lets_go(served: Served):
    done = served.run("run", "a", "--", "sh", "-c", 'test -s "$0/config.json"; exit 7', "{}")
    assert done.returncode == 7, done.stderr
    assert_goes(served)
