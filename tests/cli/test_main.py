"""Each error has its exit code and one line on stderr; ``--version`` is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cached
from cached.cli import main as main_module
from cached.cli.main import COMMANDS, EXIT_CODES, exit_code, main
from cached.core import errors

HEAVY = {"asyncio", "logging", "numpy", "boto3", "aiohttp", "ssl", "tomllib"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes the command ``status`` raise an error."""

    class Refusing:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def parse(self, arguments):
            return self

        def run(self, options):
            raise self.error

    def make(error):
        monkeypatch.setattr(main_module, "command_parser", lambda name: Refusing(error))

    return make


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cached {cached.__version__}\n"


def test_the_version_needs_little():
    done = python("-X", "importtime", "-m", "cached", "--version")
    assert done.stdout == f"cached {cached.__version__}\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "cached.cli.main" in imported
    assert imported & HEAVY == set()
    assert {name for name in imported if name.startswith("cached.")} == {
        "cached.cli",
        "cached.cli.main",
        "cached.cli.terminal",
        "cached.core",
        "cached.core.errors",
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidConfig("x"), 2),
        (errors.InsecureEndpoint("x"), 2),
        (errors.DaemonUnavailable("x"), 3),
        (errors.TimedOut("x"), 4),
        (errors.ModelUnknown("x"), 1),
        (errors.LoadFailed("x"), 1),
        (errors.NotPermitted("x"), 1),
        (errors.ProtocolMismatch("x"), 1),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_an_error_has_its_exit_code_and_one_line(fails, capsys, error, code):
    fails(type(error)("it broke\nbadly", hint="mend it"))
    assert main(["status"]) == exit_code(error) == code
    assert code in EXIT_CODES
    assert capsys.readouterr().err == "cached: it broke badly; mend it\n"


def test_ctrl_c_ends_with_130_and_no_traceback(fails, capsys):
    fails(KeyboardInterrupt())
    assert main(["status"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from cached.cli.main import main; sys.exit(main(['completion', 'bash']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 141


@pytest.mark.parametrize("arguments", ["--version", "--help", "completion bash"])
def test_a_full_disk_is_one_line_and_no_traceback(arguments):
    command = [sys.executable, "-m", "cached", *arguments.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=20
        )
    assert done.stderr.startswith("cached: cannot write the output: No space left on device; ")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("--version >&-", 1, "cached: cannot write the output: stdout is closed; "),
        ("status --socket=/nowhere/s >&-", 3, "cached: cannot connect"),
        ("status --socket=/nowhere/s 2>&-", 3, ""),
    ],
)
def test_a_closed_stream_is_no_traceback(arguments, code, words):
    command = ["sh", "-c", f'exec "$0" -m cached {arguments}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == bool(words)
    assert done.returncode == code


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().err
    for name in COMMANDS:
        assert f"\n  {name} " in shown


def test_help_lists_commands_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for code, meaning in EXIT_CODES.items():
        assert f"\n  {code:<11} {meaning}" in shown


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("stauts", "no command 'stauts'; did you mean status?"),
        ("help", "no command 'help'; cached --help shows them"),
        ("--verzion", "--version?"),
    ],
)
def test_an_unknown_word_is_answered_with_the_nearest(capsys, argument, words):
    with pytest.raises(SystemExit) as caught:
        main([argument])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: cached {name}")
    assert "\nexamples:\n  " in shown


def test_python_m_cached_is_the_command():
    done = python("-m", "cached", "status", "--socket=/nowhere/s")
    assert done.returncode == 3
    assert done.stderr.startswith("cached: cannot connect to the daemon at /nowhere/s: ")
