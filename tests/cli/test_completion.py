"""The shells complete commands, options, their values, and the models of the daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from cached.cli.completion import bash, fish, zsh
from cached.cli.main import COMMANDS, main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which ``cached`` knows two models."""
    program = tmp_path / "cached"
    program.write_text('#!/bin/sh\n[ "$*" = "completion names" ] && printf "llm\\nclip\\n"\n')
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def completed(path: str, *words: str) -> set[str]:
    """Return what bash offers for the last of these words."""
    script = (
        f"{bash()}\nCOMP_WORDS=({' '.join(repr(word) for word in words)})\n"
        f'COMP_CWORD={len(words) - 1}\n_cached\nprintf "%s\\n" "${{COMPREPLY[@]}}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_commands_are_completed(path: str):
    assert completed(path, "cached", "") == {*COMMANDS, "--version", "--help"}
    assert completed(path, "cached", "pre") == {"prefetch"}


def test_options_and_models_are_completed(path: str):
    assert completed(path, "cached", "evict", "") == {"--socket", "llm", "clip"}
    assert completed(path, "cached", "path", "--t") == {"--timeout"}
    assert completed(path, "cached", "prefetch", "llm", "c") == {"clip"}
    assert "--memory-budget" in completed(path, "cached", "serve", "--mem")
    assert "--no-anonymous" in completed(path, "cached", "serve", "--no")


def test_values_of_options_are_completed(path: str):
    assert completed(path, "cached", "wait", "--until", "") == {"header", "ready"}
    assert completed(path, "cached", "wait", "--timeout", "") == set()
    assert completed(path, "cached", "serve", "--log-format", "") == {"json", "text"}
    assert completed(path, "cached", "serve", "--addressing-style", "p") == {"path"}
    assert completed(path, "cached", "serve", "--memory-budget", "") == set()
    assert completed(path, "cached", "completion", "") == {"bash", "zsh", "fish"}


def test_paths_are_completed(path: str, tmp_path: Path):
    (tmp_path / "one.toml").touch()
    assert completed(path, "cached", "serve", "--config", f"{tmp_path}/o") == {
        f"{tmp_path}/one.toml"
    }


@pytest.mark.parametrize(
    ("shell", "script"), [("zsh", zsh()), ("fish", fish())], ids=["zsh", "fish"]
)
def test_scripts_of_other_shells_can_be_read(shell: str, script: str):
    for name, command in COMMANDS.items():
        assert name in script
        assert command.about in script
    assert "--until" in script or "-l until" in script
    program = shutil.which(shell)
    if program is not None:  # most machines have bash only
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=10)


def test_the_script_of_a_shell_is_printed(capsys):
    assert main(["completion", "fish"]) == 0
    assert capsys.readouterr().out == fish()


def test_without_a_daemon_there_are_no_models_and_no_error(capsys, monkeypatch):
    monkeypatch.setenv("CACHED_SOCKET", "/nowhere/s")
    assert main(["completion", "names"]) == 0
    assert capsys.readouterr() == ("", "")
