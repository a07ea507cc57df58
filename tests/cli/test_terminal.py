"""Colours and drawing only where somebody looks at a terminal and did not forbid them."""

from __future__ import annotations

import io
import os
import pty

import pytest

from cached.cli.terminal import Terminal, terminal_of


@pytest.fixture
def tty():
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as stream:
        yield stream
    os.close(leader)


def test_a_terminal_has_colours_and_can_be_drawn_over(tty):
    terminal = terminal_of(tty, {"TERM": "xterm"})
    assert terminal == Terminal(is_terminal=True, has_colour=True, columns=80, has_blocks=True)


@pytest.mark.parametrize(
    ("environ", "is_terminal", "has_colour"),
    [
        ({"NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": ""}, True, True),
    ],
)
def test_colours_can_be_forbidden(tty, environ, is_terminal, has_colour):
    terminal = terminal_of(tty, environ)
    assert (terminal.is_terminal, terminal.has_colour) == (is_terminal, has_colour)


def test_a_pipe_has_neither():
    terminal = terminal_of(io.StringIO(), {"TERM": "xterm"})
    assert terminal == Terminal()


def test_states_are_coloured_sparingly():
    terminal = Terminal(has_colour=True)
    assert terminal.state("resident") == "\x1b[32mresident\x1b[0m"
    assert terminal.state("failed") == "\x1b[31mfailed\x1b[0m"
    assert terminal.state("loading") == "\x1b[33mloading\x1b[0m"
    assert terminal.state("absent") == "absent"
    assert Terminal().state("failed") == "failed"
