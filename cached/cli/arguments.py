"""The parser that every command starts from, and arguments that several share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from cached.cli.terminal import say
from cached.core.errors import InvalidConfig
from cached.core.kinds import SWITCH
from cached.core.units import parse_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _typeshed import SupportsWrite

    from cached.core.options import Option


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest option to one that it does not know.

    Args:
        command: with ``cached`` in front, it is the program's name.
        about: one sentence or two.
        examples: lines that can be typed as they stand; shown below the options.
    """

    def __init__(self, command: str, about: str, examples: Sequence[str] = ()) -> None:
        epilog = "\n  ".join(["examples:", *examples]) if examples else None
        super().__init__(
            prog=f"cached {command}".strip(),
            description=about,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the parsed arguments; leaves the process with 2 if they are wrong."""
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [name for argument in described(self) for name in argument.names]
            self.error(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
        return options

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help; where argparse itself hides that it could not be written."""
        if file is None:
            say(self.format_help())
        else:
            super().print_help(file)


class Argument(NamedTuple):
    """One argument of a parser, for completion and documentation.

    Attributes:
        names: the option's spellings; empty for a positional argument.
        metavar: stands for its value; empty if it takes none.
        choices: the values that are allowed; empty: any.
        about: its help.
    """

    names: tuple[str, ...]
    metavar: str
    choices: tuple[str, ...]
    about: str


def described(parser: argparse.ArgumentParser) -> list[Argument]:
    """Return the arguments of a parser in the order of its help, ``--help`` left out."""
    return [
        Argument(
            names=tuple(action.option_strings),
            metavar="" if action.nargs == 0 else str(action.metavar or action.dest.upper()),
            choices=tuple(str(choice) for choice in action.choices or ()),
            about=(action.help or "").replace("%%", "%"),
        )
        for action in parser._actions  # argparse has no public way to them
        if "--help" not in action.option_strings
    ]


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean X?"`` with the known word that is most like ``word``, or nothing.

    It is one of those that begin so, if any do; where none of them is much like it, all are told.
    """
    import difflib  # only where it is needed: it costs 3 ms

    longer = [each for each in known if word.strip("-") and each.startswith(word)]
    close = difflib.get_close_matches(word, longer or known, n=1) or longer
    return f"; did you mean {' or '.join(close)}?" if close else ""


def add_socket(parser: argparse.ArgumentParser) -> None:
    """Add ``--socket``: which daemon a command talks to."""
    parser.add_argument(
        "--socket",
        metavar="PATH|@NAME",
        help="the daemon's socket (CACHED_SOCKET; default: where a daemon of this user listens)",
    )


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Add ``--timeout``: how long a command waits."""
    parser.add_argument(
        "--timeout",
        dest="timeout_s",
        type=duration,
        metavar="DURATION",
        help="give up after so long, such as 30s or 2m; within it a daemon that does not listen "
        "yet is waited for (default: never give up, but the daemon must listen)",
    )


def add_option(parser: argparse._ActionsContainer, option: Option) -> None:
    """Add the flag of an option of the daemon, as ``load`` takes it."""
    text = f"{option.help} ({option.env}; default: {option.default_text})".replace("%", "%%")
    if option.kind is SWITCH:
        parser.add_argument(
            option.flag, dest=option.key, action=argparse.BooleanOptionalAction, help=text
        )
    else:
        parser.add_argument(option.flag, dest=option.key, metavar=option.kind.metavar, help=text)


def duration(text: str) -> float:
    """Return seconds; the ``type`` of arguments that hold a duration."""
    try:
        return parse_seconds(text)
    except InvalidConfig as error:
        raise argparse.ArgumentTypeError(error.message) from error
