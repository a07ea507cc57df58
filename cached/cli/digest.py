"""``cached digest``: writes the list of digests that ``verify = digest`` goes by."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from cached.adapters.clock import SystemClock
from cached.cli.arguments import Parser, add_option
from cached.cli.load import CONFIG_FLAG, load
from cached.cli.main import OK
from cached.cli.progress import Progress, Sample
from cached.cli.terminal import OutputLost, say, terminal_of
from cached.core.config import check_uri
from cached.core.digests import MANIFEST_NAME, write
from cached.core.errors import InvalidConfig
from cached.core.objects import ModelRef
from cached.core.options import CONFIG_ENV, FETCHING, OPTIONS, STORE
from cached.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import argparse

    from cached.adapters.local_files import LocalFiles
    from cached.adapters.s3 import S3Store
    from cached.cli.hashing import Patience
    from cached.core.config import Config
    from cached.core.digests import Digests

EXAMPLES = (
    "cached digest s3://models/llama/",
    "cached digest file:///srv/models/llama/    # before it is uploaded with all the rest",
    "cached digest s3://models/llama/ --output llama.json    # it may not be written there",
)
OF_A_DAEMON = {"verify", "refresh_interval"}
STDOUT = "-"


class Made(NamedTuple):
    """What the command did.

    Attributes:
        written: where the list is: its URI, the path of a file, or ``-``.
    """

    uri: str
    digests: Digests
    seconds: float
    written: str

    @property
    def size_bytes(self) -> int:
        """Return how much was read."""
        return sum(file.size_bytes for file in self.digests.files.values())


def parser(name: str) -> Parser:
    """Return the parser of ``cached digest``."""
    made = Parser(
        name,
        f"Read a model once and write {MANIFEST_NAME} beside its files: the SHA-256 of each file\n"
        "and of every 8 MiB of it. A daemon with --verify digest lets nobody read what does not\n"
        "match. Write it anew whenever a file changes.",
        EXAMPLES,
    )
    made.add_argument(
        "uri", metavar="URI", help="of a directory of files: s3://BUCKET/PREFIX/ or file:///PATH/"
    )
    made.add_argument("--output", metavar="PATH|-", help="write to this file instead; -: to stdout")
    made.add_argument("--json", action="store_true", help="print what was done as JSON")
    made.add_argument(CONFIG_FLAG, metavar="PATH", help=f"a TOML file ({CONFIG_ENV})")
    groups = {title: made.add_argument_group(title) for title in (STORE, FETCHING)}
    for option in OPTIONS:
        if option.group in groups and option.key not in OF_A_DAEMON:
            add_option(groups[option.group], option)
    made.set_defaults(run=run)
    return made


def run(options: argparse.Namespace) -> int:
    """Hash a model and write its list; nothing is written unless all of it was read.

    Raises:
        InvalidConfig: before anything was read.
        StoreError: what the store did.
        OutputLost: the file cannot be written.
    """
    uri: str = options.uri
    _check_uri(uri)
    _check_output(options.output, is_json=options.json)
    ref = ModelRef(uri.rstrip("/").rpartition("/")[2], uri)
    config = load(vars(options), models=(ref,))
    from cached.cli.hashing import Patience  # with all that --help need not wait for

    clock = SystemClock()
    patience = Patience(config.max_attempts)
    with ExitStack() as stack:
        store = _store(config, clock, stack)
        began_s = clock.now_s()
        digests = _digests(store, patience, config, clock)
        written = _put(store, patience, uri, options.output, write(digests))
        made = Made(uri, digests, clock.now_s() - began_s, written)
        if options.json:  # the version is that of a daemon, which counts the list as well
            version = patience.call(lambda: store.resolve(ref)).version
            say(json.dumps(_report(made, version), indent=2) + "\n")
        else:
            _tell(made)
    return OK


def _check_uri(uri: str) -> None:
    check_uri("URI", uri, "the command line")
    scheme, _, place = uri.partition("://")
    is_object = os.path.isfile(place) if scheme == "file" else "/" in place and place[-1] != "/"
    if is_object:
        message = f"digests are those of a directory of files, {uri} names one object"
        raise InvalidConfig(message, hint="name the prefix that it is in, with / at the end")


def _check_output(output: str | None, *, is_json: bool) -> None:
    """Notice now what would lose the work of minutes."""
    if output == STDOUT and is_json:
        message = "--output - and --json both print to stdout"
        raise InvalidConfig(message, hint="name a file: --output PATH")
    if output is not None and not os.path.isdir(os.path.dirname(output) or "."):
        message = f"--output must be in a directory that is there, was {output!r}"
        raise InvalidConfig(message, hint="make it, or name another")


def _store(config: Config, clock: SystemClock, stack: ExitStack) -> S3Store | LocalFiles:
    from cached.adapters.log import Writer
    from cached.hosts.stores import stores

    writer = Writer(2, clock, level="warning", is_text=True)
    stack.callback(writer.close)
    made = stores(config, clock, writer)
    for store in made.values():
        stack.callback(store.close)
    return made[config.models[0].uri.partition("://")[0]]


def _digests(
    store: S3Store | LocalFiles, patience: Patience, config: Config, clock: SystemClock
) -> Digests:
    from cached.cli.hashing import Hashing

    progress = Progress(sys.stderr, terminal_of(sys.stderr))
    (ref,) = config.models

    def shown(done_bytes: int, size_bytes: int) -> None:
        progress.show([Sample(ref.name, "reading", done_bytes, size_bytes)], clock.now_s())

    return Hashing(store, patience, config.fetch_threads).digests(ref, shown)


def _put(
    store: S3Store | LocalFiles, patience: Patience, uri: str, output: str | None, body: bytes
) -> str:
    """Write the list and return where it is."""
    if output is None:
        written = f"{uri}{'' if uri.endswith('/') else '/'}{MANIFEST_NAME}"
        patience.call(lambda: store.put(written, body))
        return written
    if output == STDOUT:
        say(body.decode())
        return STDOUT
    try:
        with open(output, "wb") as file:
            file.write(body)
    except OSError as error:
        message = f"cannot write {output}: {error.strerror}"
        raise OutputLost(message, hint="name another file, or make room for it") from error
    return output


def _report(made: Made, version: str) -> dict[str, object]:
    return {
        "uri": made.uri,
        "version": version,
        "files": len(made.digests.files),
        "size_bytes": made.size_bytes,
        "seconds": round(made.seconds, 3),
        "written": made.written,
    }


def _tell(made: Made) -> None:
    count = len(made.digests.files)
    files = "1 file" if count == 1 else f"{count} files"
    amount = f"{files}, {format_bytes(made.size_bytes)} in {format_seconds(made.seconds)}"
    if made.written == STDOUT:  # which is the list's alone
        print(f"{made.uri}: {amount}, written to stdout", file=sys.stderr)
    else:
        say(f"{made.uri}: {amount}, written to {made.written}\n")
