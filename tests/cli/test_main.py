"""The command line as a whole: commands, exit codes, the version."""

from __future__ import annotations

import pytest

from cached import __version__
from cached.cli.main import COMMANDS, command_parser, exit_code, main
from cached.core.errors import DaemonUnavailable, InvalidConfig, LoadFailed, TimedOut


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cached {__version__}\n"


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["prefetsh"])

    assert ended.value.code == 2
    assert "did you mean prefetch?" in capsys.readouterr().err


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help_with_examples(command):
    text = command_parser(command).format_help()

    assert "examples:" in text
    assert f"cached {command}" in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LoadFailed("x"), 1),
        (InvalidConfig("x"), 2),
        (DaemonUnavailable("x"), 3),
        (TimedOut("x"), 4),
    ],
)
def test_errors_have_exit_codes(error, code):
    assert exit_code(error) == code
