"""``cached serve``: reads the configuration and runs the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.cli.arguments import Parser, add_option
from cached.cli.load import CONFIG_FLAG, MODELS_FLAG, config_file, load
from cached.core.options import CONFIG_ENV, MODELS_ENV, OPTIONS

if TYPE_CHECKING:
    import argparse

EXAMPLES = (
    "cached serve --model llm=s3://models/llama/ --memory-budget 8GiB",
    "cached serve --model clip=s3://models/clip.safetensors --endpoint-url http://127.0.0.1:8333",
    "CACHED_MODELS='a=s3://m/a/ b=s3://m/b/' cached serve",
    "cached serve --config /etc/cached.toml",
)


def parser(name: str) -> Parser:
    """Return the parser of ``cached serve``: every option of the table."""
    parser = Parser(
        name,
        "Run the daemon in the foreground: it loads the models and serves them to workers.\n"
        "Flags go before the environment (CACHED_*), that before the file, that before defaults.",
        EXAMPLES,
    )
    group = parser.add_argument_group("models")
    group.add_argument(
        MODELS_FLAG,
        action="append",
        metavar="NAME=URI",
        help=f"a model, s3://BUCKET/PREFIX/, s3://BUCKET/KEY or file:///PATH; may be repeated "
        f"({MODELS_ENV}, separated by white space)",
    )
    group.add_argument(CONFIG_FLAG, metavar="PATH", help=f"a TOML file ({CONFIG_ENV})")
    groups = {title: parser.add_argument_group(title) for title in _titles()}
    for option in OPTIONS:
        add_option(groups[option.group], option)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM, SIGHUP or Ctrl-C; return the daemon's exit code.

    Raises:
        InvalidConfig: before anything was started.
    """
    flags = vars(options)
    config, file = load(flags), config_file(flags)
    from cached.hosts.standalone import run as run_daemon  # with all that --help need not wait for

    return run_daemon(config, None if file is None else str(file.value))


def _titles() -> list[str]:
    return list(dict.fromkeys(option.group for option in OPTIONS))
