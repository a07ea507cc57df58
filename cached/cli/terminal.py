"""What the stream that we print to can show."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from cached.core.errors import CachedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TextIO

HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
COLOURS = {"resident": "32", "failed": "31"}  # green, red
BUSY = "33"  # yellow: every state on the way
QUIET = {"absent"}


class Terminal(NamedTuple):
    """The abilities of one output stream.

    Attributes:
        is_terminal: lines can be drawn over.
        has_colour: and coloured.
        columns: its width, in characters.
        has_blocks: it can write block characters.
    """

    is_terminal: bool = False
    has_colour: bool = False
    columns: int = 80
    has_blocks: bool = False

    def state(self, state: str) -> str:
        """Return a model's state, coloured if that is possible."""
        if not self.has_colour or state in QUIET:
            return state
        return f"\x1b[{COLOURS.get(state, BUSY)}m{state}\x1b[0m"


def terminal_of(stream: TextIO, environ: Mapping[str, str] | None = None) -> Terminal:
    """Return what ``stream`` can show.

    ``NO_COLOR`` (no-color.org) and ``TERM=dumb`` are respected.

    Args:
        stream: where we print.
        environ: the environment; ``None``: of this process.
    """
    environ = os.environ if environ is None else environ
    is_terminal = stream.isatty() and environ.get("TERM") != "dumb"
    return Terminal(
        is_terminal=is_terminal,
        has_colour=is_terminal and not environ.get("NO_COLOR"),
        columns=_columns(stream) if is_terminal else 80,
        has_blocks="utf" in (stream.encoding or "").lower(),
    )


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


class OutputLost(CachedError):
    """Stdout takes nothing more: its disk is full, or it is closed."""


def say(text: str) -> None:
    """Write to stdout at once, and what others left in its buffer.

    Raises:
        OutputLost: it could not be written.
        BrokenPipeError: nobody reads it any more.
    """
    try:
        if text:
            sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is still buffered goes nowhere, or the exit would try it once more:
        # docs.python.org/3/library/signal.html#note-on-sigpipe
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise
        message = f"cannot write the output: {error.strerror or 'stdout is closed'}"
        raise OutputLost(message, hint="name another file, or make room for it") from error
