"""Arguments that are wrong are answered with what was meant."""

from __future__ import annotations

import argparse

import pytest

from cached.cli.arguments import (
    Argument,
    Parser,
    add_option,
    add_socket,
    add_timeout,
    described,
    duration,
    nearest,
)
from cached.core.kinds import SECONDS, SWITCH
from cached.core.options import Option


@pytest.fixture
def parser() -> Parser:
    parser = Parser("wait", "Wait.", ["cached wait llm"])
    parser.add_argument("name", metavar="NAME", help="a model")
    parser.add_argument("--until", choices=("header", "ready"), help="100%% or not")
    add_socket(parser)
    add_timeout(parser)
    return parser


def test_an_unknown_option_is_answered_with_the_nearest(parser, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse(["llm", "--timout=3"])
    assert caught.value.code == 2
    assert "unknown argument --timout=3; did you mean --timeout?" in capsys.readouterr().err


def test_an_option_is_not_guessed_from_its_beginning(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse(["llm", "--time", "3"])
    assert "did you mean --timeout?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "meant"),
    [("--kept", "--kept-versions"), ("--lo", "--log-level or --log-format"), ("--xyzzy", "")],
)
def test_the_beginning_of_an_option_is_answered_with_those_that_begin_so(word: str, meant: str):
    known = ["--socket", "--kept-versions", "--log-level", "--log-format"]
    assert nearest(word, known) == (f"; did you mean {meant}?" if meant else "")


def test_durations_are_parsed_at_the_border(parser, capsys):
    assert parser.parse(["llm", "--timeout", "1m30s"]).timeout_s == 90.0
    assert parser.parse(["llm"]).timeout_s is None
    with pytest.raises(argparse.ArgumentTypeError, match="a duration must be"):
        duration("soon")
    with pytest.raises(SystemExit):
        parser.parse(["llm", "--timeout", "soon"])
    assert "a duration must be" in capsys.readouterr().err


def test_help_shows_the_examples(parser):
    assert parser.format_help().endswith("examples:\n  cached wait llm\n")


def test_a_parser_can_be_described(parser):
    assert described(parser)[:2] == [
        Argument((), "NAME", (), "a model"),
        Argument(("--until",), "UNTIL", ("header", "ready"), "100% or not"),
    ]
    assert [argument.names for argument in described(parser)] == [
        (),
        ("--until",),
        ("--socket",),
        ("--timeout",),
    ]


def test_an_option_of_the_daemon_becomes_a_flag():
    parser = Parser("c", "C.")
    add_option(parser, Option("rest_s", SECONDS, "5s", "50% of it.", "g"))
    add_option(parser, Option("loud", SWITCH, "false", "Or not.", "g"))
    assert described(parser)[0] == Argument(
        ("--rest",), "DURATION", (), "50% of it. (CACHED_REST; default: 5s)"
    )
    given = vars(parser.parse(["--rest=3s", "--no-loud"]))
    assert given == {"rest": "3s", "loud": False}
    assert vars(parser.parse([])) == {"rest": None, "loud": None}
