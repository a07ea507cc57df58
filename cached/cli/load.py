"""Flags, environment and TOML file, each read into one level; together they are the Config."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cached.client.settings import absolute_address, default_address, from_file
from cached.core.config import Given, Level, from_environment, named_models, resolve
from cached.core.errors import InvalidConfig
from cached.core.options import CONFIG_ENV, OPTIONS, PATH, SOCKET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cached.core.config import Config

MODELS_FLAG, CONFIG_FLAG = "--model", "--config"
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the directory that libc's shm_open uses, not a temporary file


def load(flags: Mapping[str, object], environ: Mapping[str, str] | None = None) -> Config:
    """Return the Config that this process was given.

    Args:
        flags: what the command line holds, by key of the option; besides ``model`` (a list of
            ``NAME=URI``) and ``config`` (a path). ``None`` means: not given.
        environ: the environment; ``None``: of this process.

    Raises:
        InvalidConfig: a name that nobody reads, a value that breaks its rule, a file that cannot
            be read.
    """
    environ = os.environ if environ is None else environ
    levels = [from_flags(flags), from_environment(environ)]
    file = config_file(flags, environ)
    if file is not None:
        levels.append(from_file(str(file.value), file.source))
    config = resolve([_absolute(level) for level in levels], _machine_defaults(environ))
    if not config.segment_root:
        message = f"segment_root is not given, and {SHARED_MEMORY} is not there"
        raise InvalidConfig(message, hint="name a directory on a tmpfs with --segment-root")
    if config.ca_bundle is not None and not os.access(config.ca_bundle, os.R_OK):
        message = f"ca_bundle must be a readable file, was {config.ca_bundle!r}"
        hint = "it is given by --ca-bundle, CACHED_CA_BUNDLE, AWS_CA_BUNDLE or ca_bundle in a file"
        raise InvalidConfig(message, hint=hint)
    return config


def config_file(
    flags: Mapping[str, object], environ: Mapping[str, str] | None = None
) -> Given | None:
    """Return the path of the file that is read, and who names it; None: there is none."""
    environ = os.environ if environ is None else environ
    for source, path in ((CONFIG_FLAG, flags.get("config")), (CONFIG_ENV, environ.get(CONFIG_ENV))):
        if path:
            return Given(path, source)
    return None


def from_flags(flags: Mapping[str, object]) -> Level:
    """Return the level of the command line; see ``load`` for ``flags``."""
    given = {
        option.key: Given(flags[option.key], option.flag)
        for option in OPTIONS
        if flags.get(option.key) is not None
    }
    models = flags.get("model") or ()
    assert isinstance(models, list | tuple)  # noqa: S101 - what argparse's append makes
    return Level(given, named_models(models, MODELS_FLAG))


def _absolute(level: Level) -> Level:
    """Resolve relative paths against the working directory, while it is still ours."""
    given = dict(level.options)
    for option in OPTIONS:
        value = given[option.key].value if option.key in given else None
        if option.kind not in {PATH, SOCKET} or not isinstance(value, str):
            continue
        if value.strip() and not value.startswith("/"):
            absolute = absolute_address if option.kind is SOCKET else os.path.abspath
            given[option.key] = given[option.key]._replace(value=absolute(value))
    return level._replace(options=given)


def _machine_defaults(environ: Mapping[str, str]) -> dict[str, Given]:
    uid = os.getuid()
    defaults = {"socket": Given(default_address(environ, uid), "the default")}
    if os.path.isdir(SHARED_MEMORY):
        root = f"{SHARED_MEMORY}/cached-{uid}"
        defaults["segment_root"] = Given(root, "the default")
    return defaults
