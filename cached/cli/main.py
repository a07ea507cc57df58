"""The command ``cached``: finds the subcommand, runs it, turns errors into exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from cached import __version__
from cached.cli.terminal import say
from cached.core.errors import (
    CachedError,
    DaemonUnavailable,
    InsecureEndpoint,
    InvalidConfig,
    TimedOut,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cached.cli.arguments import Parser

OK, FAILED, USAGE, UNAVAILABLE, TIMED_OUT, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 4, 130, 141
CANNOT_EXECUTE, NOT_FOUND = 126, 127  # as shells have it

EXIT_CODES = {
    OK: "done",
    FAILED: "it failed; the reason is on stderr",
    USAGE: "wrong arguments or configuration",
    UNAVAILABLE: "no daemon answers on the socket",
    TIMED_OUT: "the time given by --timeout ended",
    CANNOT_EXECUTE: "cached run: the command cannot be executed",
    NOT_FOUND: "cached run: the command was not found",
    INTERRUPTED: "Ctrl-C",
    BROKEN_PIPE: "nobody reads the output any more",
}


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        module: has ``parser(name)``, whose result holds ``run(options) -> int``; imported only
            when the command is used.
        about: one line.
    """

    module: str
    about: str


COMMANDS = {
    "serve": Command("cached.cli.serve", "run the daemon in the foreground"),
    "prefetch": Command("cached.cli.control", "load models and show how far they are"),
    "refresh": Command("cached.cli.control", "look for a new version of a model, or go back"),
    "status": Command("cached.cli.control", "show models and memory"),
    "wait": Command("cached.cli.leasing", "wait until a model can be used"),
    "path": Command("cached.cli.leasing", "print the directory of a model"),
    "run": Command("cached.cli.leasing", "run a program that opens a model by path"),
    "evict": Command("cached.cli.freeing", "take models out of memory"),
    "purge": Command("cached.cli.freeing", "take all models out of memory that nobody holds"),
    "digest": Command("cached.cli.digest", "write the digests of a model beside its files"),
    "completion": Command("cached.cli.completion", "print a completion script for your shell"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (``EXIT_CODES``).

    Args:
        argv: the arguments without the program's name; ``None``: of this process.

    Raises:
        SystemExit: argparse has printed help or a usage error.
    """
    _replace_closed_streams()
    try:
        return _run_and_flush(list(sys.argv[1:] if argv is None else argv))
    except CachedError as error:
        complain(str(error))
        return exit_code(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE


def _replace_closed_streams() -> None:
    """Stand in for streams that this process was started without (``>&-``).

    What is written to stdout fails, for somebody wants it; what is said on stderr is lost.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull)  # noqa: SIM115 - for as long as the process lives
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - likewise


def _run_and_flush(arguments: list[str]) -> int:
    try:
        return _run(arguments)
    finally:
        say("")  # what argparse wrote must fail here and not at exit


def complain(text: str) -> None:
    """Print what is wrong on stderr, on one line."""
    with suppress(OSError):  # nobody is there to be told
        print(f"cached: {printable(text)}", file=sys.stderr, flush=True)


def exit_code(error: CachedError) -> int:
    """Return what a command ends with after this error."""
    if isinstance(error, InvalidConfig | InsecureEndpoint):
        return USAGE
    if isinstance(error, DaemonUnavailable):
        return UNAVAILABLE
    return TIMED_OUT if isinstance(error, TimedOut) else FAILED


def command_parser(name: str) -> Parser:
    """Return the parser of a command; imports the command's module."""
    parser: Parser = importlib.import_module(COMMANDS[name].module).parser(name)
    return parser


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        options = command_parser(arguments[0]).parse(arguments[1:])
        code: int = options.run(options)
        return code
    if arguments[:1] == ["--version"]:
        say(f"cached {__version__}\n")
        return OK
    parser = _top_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return USAGE
    if not arguments[0].startswith("-"):
        from cached.cli.arguments import nearest

        hint = nearest(arguments[0], list(COMMANDS)) or "; cached --help shows them"
        parser.error(f"no command {arguments[0]!r}{hint}")
    parser.parse(arguments)  # leaves, after --help or because of what it does not know
    return USAGE


def _top_parser() -> Parser:
    from cached.cli.arguments import Parser

    commands = "\n".join(f"  {name:<11} {command.about}" for name, command in COMMANDS.items())
    codes = "\n".join(f"  {code:<11} {meaning}" for code, meaning in EXIT_CODES.items())
    parser = Parser(
        "",
        "Model weights from S3 in shared memory, mapped before they are asked for.\n\n"
        f"commands:\n{commands}\n\nexit codes:\n{codes}",
        ["cached serve --model llm=s3://models/llama/", "cached COMMAND --help"],
    )
    parser.usage = "cached COMMAND [OPTIONS]"
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    return parser
