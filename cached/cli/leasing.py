"""The commands that take a lease: wait, path, run."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any, NoReturn

from cached.cli.arguments import Parser, add_socket, add_timeout
from cached.cli.asking import Asking
from cached.cli.main import CANNOT_EXECUTE, NOT_FOUND, OK, complain
from cached.cli.terminal import say
from cached.client import paths
from cached.core.errors import LoadFailed

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

PLACE = "{}"  # in an argument: the model's directory
MISSING = "check its path, or PATH; of a script, also that the program in its #! line is there"
NOT_A_PROGRAM = "name a program that this user may execute: chmod +x, or its interpreter first"
# What Python ignores, and a program expects not to be: docs.python.org/3/library/subprocess.html,
# restore_signals.
IGNORED = ("SIGPIPE", "SIGXFZ", "SIGXFSZ")


def parser(name: str) -> Parser:
    """Return the parser of one of the commands of this module."""
    made = _PARSERS[name](name)
    add_socket(made)
    return made


def _wait_parser(name: str) -> Parser:
    made = Parser(
        name,
        "Wait until a model can be used; load it if it is absent.",
        ("cached wait llm", "cached wait llm --until header --timeout 30s"),
    )
    made.add_argument("name", metavar="NAME", help="a configured model")
    made.add_argument(
        "--until",
        choices=("header", "ready"),
        default="ready",
        help="header: tensors can be asked for; ready: everything is there (default)",
    )
    add_timeout(made)
    made.set_defaults(run=_wait)
    return made


def _wait(options: argparse.Namespace) -> int:
    with Asking(options.socket, options.timeout_s) as daemon:
        daemon.lease(options.name, options.until)
    return OK


def _path_parser(name: str) -> Parser:
    made = Parser(
        name,
        "Print a model's directory; wait until everything is there.\n"
        "The directory stays as long as the daemon keeps the model: `cached.open` holds a lease\n"
        "that keeps it, and so does `cached run`; this command does not once it has ended.",
        ("cached path llm", 'python serve.py --model "$(cached path llm --timeout 2m)"'),
    )
    made.add_argument("name", metavar="NAME", help="a configured model")
    add_timeout(made)
    made.set_defaults(run=_path)
    return made


def _path(options: argparse.Namespace) -> int:
    with Asking(options.socket, options.timeout_s) as daemon:
        reply = daemon.lease(options.name, "ready")
    say(f"{_directory(options.name, reply)}\n")
    return OK


def _directory(name: str, reply: dict[str, Any]) -> str:
    """Return the directory that was granted; it can be opened from here."""
    path = reply.get("path")
    if not path:
        message = f"{name} has no directory: the daemon keeps it in sealed memory"
        raise LoadFailed(message, hint="open it with cached.open")
    for file in reply["files"][:1]:
        paths.check(name, f"{path}/{file['path']}")
    return str(path)


# --- run


class _RunParser(Parser):
    """Takes what stands behind ``--`` as it is, as ``command``."""

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the parsed arguments; leaves the process with 2 if they are wrong."""
        mark = arguments.index("--") if "--" in arguments else len(arguments)
        options = super().parse(arguments[:mark])
        options.command = list(arguments[mark + 1 :])
        if not options.command:
            self.error("no command to run; write it behind --: cached run NAME -- CMD ARGS")
        return options


def _run_parser(name: str) -> Parser:
    made = _RunParser(
        name,
        "Run a program that opens a model by path, and keep the model for it: wait until all is\n"
        "there, then become the program. It finds the directory in CACHED_MODEL_PATH and where\n"
        "an argument says {}; besides it has CACHED_MODEL_NAME and CACHED_MODEL_VERSION. Signals\n"
        "and the exit code are its own; the model is leased until it and all that it started,\n"
        "and that holds its open files, have ended.",
        (
            "cached run llm -- python serve.py --model {}",
            "cached run llm --version 9f2c41d0a7b3e586 -- llama-server -m {}/model.gguf",
        ),
    )
    made.usage = "cached run NAME [OPTIONS] -- CMD [ARGS]"
    made.add_argument("name", metavar="NAME", help="a configured model")
    made.add_argument("--version", metavar="V", help="this version of it (default: the current)")
    add_timeout(made)
    made.set_defaults(run=_run)
    return made


def _run(options: argparse.Namespace) -> int:
    with Asking(options.socket, options.timeout_s) as daemon:
        reply = daemon.lease(options.name, "ready", options.version)
        path = _directory(options.name, reply)
        told = {
            "CACHED_MODEL_NAME": options.name,
            "CACHED_MODEL_PATH": path,
            "CACHED_MODEL_VERSION": str(reply["version"]),
        }
        daemon.keep_over_exec()
        return _become([word.replace(PLACE, path) for word in options.command], told)


def _become(command: list[str], told: dict[str, str]) -> int:
    """Become a program, as ``exec`` of a shell does; return only if that cannot be."""
    say("")  # what is in a buffer would be lost
    before = {
        name: signal.signal(getattr(signal, name), signal.SIG_DFL)
        for name in IGNORED
        if hasattr(signal, name)
    }
    try:
        _execute(command, {**os.environ, **told})
    except OSError as error:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
        is_missing = isinstance(error, FileNotFoundError)
        hint = MISSING if is_missing else NOT_A_PROGRAM
        complain(f"cannot run {command[0]}: {error.strerror}; {hint}")
        return NOT_FOUND if is_missing else CANNOT_EXECUTE


def _execute(command: list[str], environment: dict[str, str]) -> NoReturn:
    os.execvpe(command[0], command, environment)  # noqa: S606 - what the user asked for


_PARSERS: dict[str, Callable[[str], Parser]] = {
    "wait": _wait_parser,
    "path": _path_parser,
    "run": _run_parser,
}
