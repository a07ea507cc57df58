"""Flags, environment and TOML file, each read into one level; together they are the Config."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cached.client.settings import absolute_address, default_address, from_file
from cached.core.config import Given, Level, from_environment, named_models, resolve
from cached.core.errors import InvalidConfig
from cached.core.kinds import PATH, SOCKET
from cached.core.options import CONFIG_ENV, OPTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cached.core.config import Config
    from cached.core.objects import ModelRef
    from cached.core.options import Option

MODELS_FLAG, CONFIG_FLAG = "--model", "--config"
READ_AT_USE = {"ca_bundle", "sse_customer_key_file"}  # files; that they are there is checked now
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the directory that libc's shm_open uses, not a temporary file


def load(
    flags: Mapping[str, object],
    environ: Mapping[str, str] | None = None,
    models: tuple[ModelRef, ...] | None = None,
) -> Config:
    """Return the Config that this process was given.

    Args:
        flags: what the command line holds, by key of the option; besides ``model`` (a list of
            ``NAME=URI``) and ``config`` (a path). ``None`` means: not given.
        environ: the environment; ``None``: of this process.
        models: instead of those that flags, environment and file name.

    Raises:
        InvalidConfig: a name that nobody reads, a value that breaks its rule, a file that cannot
            be read.
    """
    environ = os.environ if environ is None else environ
    config = resolve(_levels(flags, environ), _machine_defaults(environ), models)
    if config.audit and config.log_level not in {"debug", "info"}:
        message = f"audit needs log_level info or debug, was {config.log_level}"
        raise InvalidConfig(message, hint="its lines are of level info")
    if config.http_token_file is not None and config.http_port is None:
        message = "http_token_file needs the HTTP side, which http_port off turns off"
        raise InvalidConfig(message, hint="leave http_token_file out, or give a port")
    for option in OPTIONS:
        if option.key in READ_AT_USE:
            _check_readable(option, getattr(config, option.field))
    return config


def _check_readable(option: Option, path: str | None) -> None:
    if path is not None and not os.access(path, os.R_OK):
        message = f"{option.key} must be a readable file, was {path!r}"
        names = ", ".join((option.flag, option.env, *option.aws))
        hint = f"it is given by {names} or {option.key} in a file"
        raise InvalidConfig(message, hint=hint)


def segment_root(given: str | None, environ: Mapping[str, str] | None = None) -> str:
    """Return the directory where a daemon of this user that is started like this keeps models.

    Args:
        given: by the flag; ``None``: not.
        environ: the environment; ``None``: of this process.

    Raises:
        InvalidConfig: a name that nobody reads, or a file that cannot be read.
    """
    environ = os.environ if environ is None else environ
    levels = [level.options for level in _levels({"segment_root": given}, environ)]
    found = [options["segment_root"] for options in levels if "segment_root" in options]
    return str((found or [_machine_defaults(environ)["segment_root"]])[0].value)


def _levels(flags: Mapping[str, object], environ: Mapping[str, str]) -> list[Level]:
    """Return what flags, environment and file give, the highest first; paths are absolute."""
    levels = [from_flags(flags), from_environment(environ)]
    file = config_file(flags, environ)
    if file is not None:
        levels.append(from_file(str(file.value), file.source))
    return [_absolute(level) for level in levels]


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
    root = f"{SHARED_MEMORY}/cached-{uid}"
    if not os.path.isdir(SHARED_MEMORY):
        root = f"/tmp/cached-{uid}/models"  # noqa: S108 - 0700, and its owner is checked
    return {
        "socket": Given(default_address(environ, uid), "the default"),
        "segment_root": Given(root, "the default"),
    }
