"""Completion scripts: right for their shell, and they know the models."""

from __future__ import annotations

import subprocess

import pytest

from cached.cli.completion import bash, fish, zsh
from cached.cli.main import COMMANDS, main


@pytest.mark.parametrize("script", [bash, zsh, fish])
def test_a_script_names_every_command(script):
    text = script()

    assert all(command in text for command in COMMANDS)
    assert "--until" in text or "-l until" in text


def test_bash_accepts_its_script():
    subprocess.run(["bash", "-n"], input=bash().encode(), check=True)


def test_names_are_those_of_the_daemon(served, capsys):
    assert main(["completion", "names"]) == 0
    assert capsys.readouterr().out == "m\n"


def test_without_a_daemon_there_are_no_names_and_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CACHED_SOCKET", str(tmp_path / "none"))

    assert main(["completion", "names"]) == 0
    assert capsys.readouterr() == ("", "")
