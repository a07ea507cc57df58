"""The generated pages of docs/: ``python -m cached.cli.reference --write`` or ``--check``.

A checkout's tool: the pages come from the tables that the program itself uses, and a test
compares them with what is committed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cached.adapters import metrics
from cached.cli.arguments import Parser, described
from cached.cli.main import COMMANDS, EXIT_CODES, FAILED, OK, command_parser
from cached.core.options import MODEL_OPTIONS, OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cached.core.options import Option

DOCS = Path(__file__).parents[2] / "docs"

CONFIGURATION_HEAD = """\
# Configuration

This page is written by `make docs` from the table in `cached/core/options.py`.

One rule for every option: **flags** go before the **environment** (`CACHED_*`), that before the
**file** (TOML, named by `--config` or `CACHED_CONFIG`), that before the **defaults**. Of what the
AWS SDKs read, the variables named below are honoured too, below `CACHED_*` and above the file
(`AWS_IGNORE_CONFIGURED_ENDPOINT_URLS=true` switches those of endpoints off). An empty variable
counts as not set. What nobody reads is an error, for the daemon, for commands and for workers: an
unknown flag, an unknown `CACHED_*` variable (but those that Kubernetes makes of Services), an
unknown key of a file that is read.

A worker that reads a model without a daemon (`fallback="s3"`) takes models, object store and
fetching from the same environment and file.

Every message names the key, its rule, its value and who gave it:

```
cached: memory_budget must be at least 64 MiB, was 10 MiB (from --memory-budget)
```

Sizes: `512MiB`, `8GiB`, `8GB`, `1.5Gi`, or bytes. Durations: `250ms`, `30s`, `1m30s`, or seconds.
Switches: `true`/`false` (also `1 yes on`, `0 no off`); as flags `--anonymous`, `--no-anonymous`.
Relative paths start at the working directory.

Credentials are no option: they are read where they are used, from the environment
(`AWS_ACCESS_KEY_ID`…), the container's endpoint, a web identity, or the AWS configuration files.
STS is asked at `AWS_ENDPOINT_URL_STS`, else `AWS_ENDPOINT_URL`, else in the region.

The daemon raises its soft limit of open files to the hard one (`ulimit -Hn`): every file in memory
and every worker takes one.
"""

MODELS_HEAD = """\
## Models

A model has a name and a URI. At least one must be named.

| way | looks like |
|---|---|
| flag, repeatable | `--model llm=s3://models/llama/` |
| environment, separated by white space | `CACHED_MODELS="llm=s3://m/llama/ b=s3://m/b.bin"` |
| file | `[models.llm]` and below it the keys of this table |

A name is 1 to 128 letters, digits, `.`, `_` or `-`, the first a letter or digit. A URI is
`s3://BUCKET/PREFIX/` (everything below), `s3://BUCKET/KEY` (one object) or `file:///PATH` (a
directory or a file); it is written as it is, not percent-encoded.

Models of several levels are merged by name, and of each model every key by itself: `--model
llm=s3://other/` changes where `[models.llm]` of the file comes from, and leaves it pinned. Models
are fetched in the order of the levels, the highest first.
"""

SOCKET_HEAD = """\
## The socket

Daemon and workers find each other by the same rule: `--socket`; else `CACHED_SOCKET`; else `socket`
in the file; else on Lambda `@cached-UID`; `/cached/cached.sock` where the directory `/cached` is;
`$XDG_RUNTIME_DIR/cached.sock`; `/tmp/cached-UID/cached.sock`, whose directory must be yours and is
made with mode 0700. A leading `@` means an abstract socket, a leading `~` your home. Workers and
commands read the file only where `CACHED_CONFIG` names it and nothing above it names the socket: if
the daemon's `--config` moves the socket, tell them so.
"""

CLI_HEAD = """\
# The command line

This page is written by `make docs` from the parsers in `cached/cli`.

Errors are one line on stderr: `cached: what is wrong; what to do next`. Before the line about wrong
arguments stands the usage.

| exit code | meaning |
|---|---|
"""


def pages() -> dict[str, str]:
    """Return the text of each generated page by its file name."""
    writers: dict[str, Callable[[], str]] = {
        "cli.md": command_line,
        "configuration.md": configuration,
        "metrics.md": metrics.reference,
    }
    return {name: write() for name, write in writers.items()}


def configuration() -> str:
    """Return docs/configuration.md."""
    parts = [CONFIGURATION_HEAD]
    for group in dict.fromkeys(option.group for option in OPTIONS):
        rows = [_row(option) for option in OPTIONS if option.group == group]
        head = ("flag", "environment", "file", "value", "default", "meaning")
        parts.append(f"## {group.capitalize()}\n\n" + _table(head, rows))
    keys = [
        (f"`{option.key}`", option.kind.rule, f"`{option.default_text}`", option.help)
        for option in MODEL_OPTIONS
    ]
    parts += [MODELS_HEAD, _table(("key", "value", "default", "meaning"), keys)]
    parts += [SOCKET_HEAD, "## An example\n\n```toml\n" + example() + "```\n"]
    return "\n".join(parts)


def example() -> str:
    """Return a file that sets every option that has a default to it."""
    lines = [
        f"{option.key} = {_toml(option.default)}"
        for option in OPTIONS
        if option.default is not None
    ]
    return "\n".join(
        [*lines, "", "[models.llm]", 'uri = "s3://models/llama/"', "pinned = true", ""]
    )


def command_line() -> str:
    """Return docs/cli.md."""
    rows = [(f"{code}", meaning) for code, meaning in EXIT_CODES.items()]
    parts = [CLI_HEAD + "".join(_line(row) for row in rows)]
    parts += [_command(name) for name in COMMANDS]
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None, docs: Path = DOCS) -> int:
    """Write the pages, or tell which of them are not as they would be written."""
    parser = Parser("reference", "Write or check the generated pages of docs/.")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", action="store_true", help="write them")
    group.add_argument("--check", action="store_true", help="fail if one is not up to date")
    options = parser.parse(sys.argv[1:] if argv is None else argv)
    old = [name for name, text in pages().items() if _read(docs / name) != text]
    if options.write:
        for name in old:
            (docs / name).write_text(pages()[name], encoding="utf-8")
            print(f"wrote docs/{name}")
        return OK
    for name in old:
        print(f"docs/{name} is not up to date: run make docs", file=sys.stderr)
    return FAILED if old else OK


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _row(option: Option) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in (option.env, *option.aws))
    return (
        f"`{option.flag}`",
        names,
        f"`{option.key}`",
        option.kind.rule + _bounds(option),
        option.default_text,
        option.help,
    )


def _bounds(option: Option) -> str:
    bounds = []
    if option.least:
        bounds.append(f"at least {option.kind.show(option.least)}")
    if option.most is not None:
        bounds.append(f"at most {option.kind.show(option.most)}")
    return "".join(f"; {bound}" for bound in bounds)


def _toml(value: object) -> str:
    if isinstance(value, str) and value not in {"true", "false"}:
        return f'"{value}"'
    return str(value)


def _command(name: str) -> str:
    parser = command_parser(name)
    arguments = described(parser)
    parts = [f"## cached {name}\n\n{parser.description}\n"]
    if name == "serve":
        parts.append("Its options are those of [configuration.md](configuration.md).\n")
    elif arguments:
        rows = [
            (_usage(argument.names, argument.metavar), argument.about) for argument in arguments
        ]
        parts.append(_table(("argument", "meaning"), rows))
    if parser.epilog:
        lines = [line.strip() for line in parser.epilog.splitlines()[1:]]
        parts.append("```\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(parts)


def _usage(names: tuple[str, ...], metavar: str) -> str:
    return f"`{' '.join([', '.join(names), metavar]).strip()}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return _line(head) + _line(["---"] * len(head)) + "".join(_line(row) for row in rows)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.exit(main())
