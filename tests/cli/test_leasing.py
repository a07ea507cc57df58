"""Commands that take a lease keep it as long as they say, against a real daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from cached.cli.main import main
from tests.fakes.commands import HELD, WEIGHTS, output
from tests.fakes.local_daemon import open_descriptors


def test_wait_loads_what_is_absent(daemon, capsys):
    assert output(capsys, "wait", "m", "--timeout", "10s") == ("", "")
    assert daemon.status()["state"] == "resident"


def test_wait_for_a_daemon_that_does_not_come_ends_with_the_timeout(sleeps, capsys):
    arguments = ("wait", "m", "--socket", "/nowhere/s", "--timeout", "1ms")
    sleeps += [lambda: threading.Event().wait(0.002)]
    _, err = output(capsys, *arguments, code=3)
    assert "nothing is there" in err


def test_wait_until_the_header_does_not_wait_for_the_rest(daemon, hold, capsys):
    assert output(capsys, "wait", "m", "--until", "header") == ("", "")
    assert daemon.status()["state"] == "loading"


def test_wait_gives_up_in_time(daemon, hold, capsys):
    _, err = output(capsys, "wait", "m", "--timeout", "50ms", code=4)
    assert err == (
        "cached: m: not there after 50 ms; the load goes on, see cached status; or give more time\n"
    )


def test_path_prints_the_directory(daemon, capsys):
    out, _ = output(capsys, "path", "m")
    with open(f"{out.strip()}/{HELD}", "rb") as file:
        assert file.read() == WEIGHTS


def test_path_of_a_model_without_one_says_so(scripted, capsys):
    def script(daemon):
        daemon.greet()
        request = daemon.expect("open")
        daemon.send({"id": request["id"], "path": None, "complete": True})

    scripted(script)
    _, err = output(capsys, "path", "m", code=1)
    assert "m has no directory" in err


def test_no_command_keeps_a_lease_or_a_descriptor(daemon, capsys):
    def of_the_model() -> list[str]:
        return [path for path in open_descriptors().values() if HELD in path]

    output(capsys, "prefetch", "m")
    before = of_the_model()  # those of the daemon, which runs in this process
    for _ in range(3):
        output(capsys, "path", "m")
        output(capsys, "wait", "m")
    daemon.wait_for_leases(0)
    assert of_the_model() == before
    assert output(capsys, "evict", "m")[0] == "m: evicted, 1.0 MiB freed\n"


# --- run


def python(code: str) -> list[str]:
    return ["--", sys.executable, "-c", code]


@pytest.fixture
def become(daemon, tmp_path):
    """Return a function that runs ``cached run`` as a process of its own."""

    def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "cached", "run", *arguments],
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return start


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """Return what it printed."""
    out, err = process.communicate(timeout=15)
    assert process.returncode == code, err
    return out


def test_run_tells_the_program_where_the_model_is(daemon, become):
    code = (
        "import os, sys; print(sys.argv[1:]); "
        "print([os.environ['CACHED_MODEL_' + name] for name in ('NAME', 'PATH', 'VERSION')])"
    )
    out = ended(become("m", *python(code), "{}/x", "--opt={}", "--version"))
    path = daemon.status()["path"]
    arguments, told = out.splitlines()
    assert arguments == str([f"{path}/x", f"--opt={path}", "--version"])
    assert told == str(["m", path, daemon.status()["version"]])


def test_run_is_the_program_and_its_exit_code_is_its_own(become):
    process = become("m", *python("import os; print(os.getpid()); raise SystemExit(7)"))
    assert int(ended(process, 7)) == process.pid


def test_run_holds_the_model_until_the_program_and_its_children_have_ended(daemon, become):
    code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen(['cat'], stdin=0, stdout=2, close_fds=False)\n"
        "print('up', flush=True)\n"
    )
    process = become("m", *python(code), stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.wait(15)
    assert daemon.leases == 1  # cat has it
    ended(process)
    daemon.wait_for_leases(0)


def test_a_script_that_uses_the_descriptors_of_scripts_keeps_the_model(daemon, become):
    taken = " ".join(f"{number}</dev/null" for number in range(3, 10))
    process = become("m", "--", "sh", "-c", f"exec {taken}; echo up; cat", stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert daemon.leases == 1
    ended(process)
    daemon.wait_for_leases(0)


def test_run_leaves_the_signals_to_the_program(become):
    out = ended(become("m", "--", "sh", "-c", "grep SigIgn /proc/self/status"))
    assert int(out.split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0


def test_a_program_under_run_may_use_the_client(become):
    code = "import cached; print(len(cached.open('m', until='ready')))"
    assert ended(become("m", *python(code))) == "2\n"


@pytest.mark.parametrize(
    ("command", "code", "why"),
    [
        ("no-such-program", 127, "No such file or directory; check its path, or PATH; "),
        (os.devnull, 126, "Permission denied; name a program that this user may execute: "),
    ],
)
def test_run_of_what_cannot_be_run_fails_as_in_a_shell(daemon, capsys, command, code, why):
    _, err = output(capsys, "run", "m", "--", command, code=code)
    assert err.startswith(f"cached: cannot run {command}: {why}")
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    daemon.wait_for_leases(0)


@pytest.mark.parametrize("arguments", [["m"], ["m", "--"], ["m", "ls"]])
def test_run_without_a_command_is_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(["run", *arguments])
    assert caught.value.code == 2
    assert "cached run NAME [OPTIONS] -- CMD [ARGS]" in capsys.readouterr().err


def test_run_asks_for_the_version_that_is_named(scripted, capsys):
    def script(daemon):
        daemon.greet()
        request = daemon.expect("open")
        assert (request["version"], request["until"]) == ("v1", "ready")
        error = {"code": "version_unknown", "message": "m has no v1: there is v2", "hint": ""}
        daemon.send({"id": request["id"], "error": error})

    scripted(script)
    _, err = output(capsys, "run", "m", "--version", "v1", "--", "true", code=1)
    assert err == "cached: m has no v1: there is v2\n"


def test_run_does_not_take_another_version_than_was_named(daemon, capsys):
    _, err = output(capsys, "run", "m", "--version", "v1", "--", "true", code=1)
    assert "m has no version 'v1' in memory: there are" in err


@pytest.mark.parametrize("command", [["path", "m"], ["run", "m", "--", "true"]])
def test_a_directory_that_cannot_be_opened_from_here_is_an_error(scripted, capsys, command):
    def script(daemon):
        daemon.greet()
        request = daemon.expect("open")
        files = [{"path": "w", "size": 1, "header_bytes": None}]
        daemon.send({"id": request["id"], "path": "/nowhere", "version": "v1", "files": files})

    scripted(script)
    _, err = output(capsys, *command, code=1)
    assert "m cannot be opened by path from here: /nowhere/w: No such file or directory" in err
