"""Flags, environment and TOML file, each read into one level; together they are the Config."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from cached.client.settings import default_address
from cached.core.config import Given, Level, resolve, unknown_key
from cached.core.errors import InvalidConfig
from cached.core.options import MODEL_OPTIONS, OPTIONS, PATH, SOCKET

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cached.core.config import Config

MODELS_FLAG, MODELS_ENV = "--model", "CACHED_MODELS"
CONFIG_FLAG, CONFIG_ENV = "--config", "CACHED_CONFIG"
# Kubernetes puts these into every container for a Service whose name begins with "cached".
SERVICE_LINK = re.compile(
    r"CACHED(_\w+)?_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
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
    for source, path in ((CONFIG_FLAG, flags.get("config")), (CONFIG_ENV, environ.get(CONFIG_ENV))):
        if path:
            levels.append(from_file(str(path), source))
            break
    config = resolve([_absolute(level) for level in levels], _machine_defaults(environ))
    if not config.segment_root:
        message = f"segment_root is not given, and {SHARED_MEMORY} is not there"
        raise InvalidConfig(message, hint="name a directory on a tmpfs with --segment-root")
    if config.ca_bundle is not None and not os.access(config.ca_bundle, os.R_OK):
        message = f"ca_bundle must be a readable file, was {config.ca_bundle!r}"
        hint = "it is given by --ca-bundle, CACHED_CA_BUNDLE, AWS_CA_BUNDLE or ca_bundle in a file"
        raise InvalidConfig(message, hint=hint)
    return config


def from_flags(flags: Mapping[str, object]) -> Level:
    """Return the level of the command line; see ``load`` for ``flags``."""
    given = {
        option.key: Given(flags[option.key], option.flag)
        for option in OPTIONS
        if flags.get(option.key) is not None
    }
    models = flags.get("model") or ()
    assert isinstance(models, list | tuple)  # noqa: S101 - what argparse's append makes
    return Level(given, _named_models(models, MODELS_FLAG))


def from_environment(environ: Mapping[str, str]) -> Level:
    """Return the level of the environment: CACHED_*, and below it what the AWS SDKs read.

    An empty variable counts as not set.

    Raises:
        InvalidConfig: a CACHED_* variable that nobody reads.
    """
    known = [option.env for option in OPTIONS]
    others = (CONFIG_ENV, MODELS_ENV)
    for name in environ:
        if name.startswith("CACHED_") and name not in known and name not in others:
            if SERVICE_LINK.fullmatch(name):
                continue
            raise unknown_key("variable", name, [*known, *others], "the environment")
    given = {}
    for option in OPTIONS:
        for name in (option.env, *_aws_names(option.aws, environ)):
            if environ.get(name):
                given[option.key] = Given(environ[name], name)
                break
    return Level(given, _named_models(environ.get(MODELS_ENV, "").split(), MODELS_ENV))


def from_file(path: str, source: str) -> Level:
    """Return the level of a TOML file.

    Args:
        path: of the file.
        source: who named it.

    Raises:
        InvalidConfig: it cannot be read, is not TOML or holds a key that nobody reads.
    """
    import tomllib  # only where there is a file: it costs 4 ms

    try:
        with open(path, "rb") as file:
            return from_document(tomllib.load(file), path)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror} (from {source})"
        raise InvalidConfig(message, hint="name a readable TOML file") from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        message = f"{path} is not TOML: {error} (from {source})"
        raise InvalidConfig(message, hint="toml.io describes the format") from error


def from_document(document: Mapping[str, object], source: str) -> Level:
    """Return the level of a parsed TOML document that came from ``source``."""
    keys = [option.key for option in OPTIONS]
    given = {}
    for key, value in document.items():
        if key == "models":
            continue
        if key not in keys:
            raise unknown_key("key", key, [*keys, "models"], source)
        given[key] = Given(value, source)
    models = document.get("models", {})
    if not isinstance(models, dict):
        message = f"models must be tables such as [models.llm], was {models!r} (from {source})"
        raise InvalidConfig(message, hint='write [models.llm] and below it uri = "s3://..."')
    return Level(given, {name: _members(name, table, source) for name, table in models.items()})


def _members(name: str, table: object, source: str) -> dict[str, Given]:
    if not isinstance(table, dict):
        message = f"models.{name} must be a table, was {table!r} (from {source})"
        raise InvalidConfig(message, hint=f'write [models.{name}] and below it uri = "s3://..."')
    keys = [option.key for option in MODEL_OPTIONS]
    for key in table:
        if key not in keys:
            raise unknown_key("key", f"models.{name}.{key}", keys, source)
    return {key: Given(value, source) for key, value in table.items()}


def _named_models(texts: Iterable[str], source: str) -> dict[str, dict[str, Given]]:
    models: dict[str, dict[str, Given]] = {}
    for text in texts:
        name, mark, uri = text.partition("=")
        if not mark or not name or "/" in name:
            message = f"a model must be NAME=URI, was {text!r} (from {source})"
            raise InvalidConfig(message, hint="for example llm=s3://models/llama/")
        if name in models:
            message = f"model {name} is named twice (from {source})"
            raise InvalidConfig(message, hint="keep one")
        models[name] = {"uri": Given(uri, source)}
    return models


def _aws_names(names: tuple[str, ...], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Leave out the endpoints where the SDKs do: docs.aws.amazon.com/sdkref, ss-endpoints."""
    ignored = environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
    return tuple(name for name in names if not (ignored and "ENDPOINT_URL" in name))


def _absolute(level: Level) -> Level:
    """Resolve relative paths against the working directory, while it is still ours."""
    given = dict(level.options)
    for option in OPTIONS:
        value = given[option.key].value if option.key in given else None
        if option.kind in {PATH, SOCKET} and isinstance(value, str) and _is_relative(value):
            given[option.key] = given[option.key]._replace(value=os.path.abspath(value))
    return level._replace(options=given)


def _is_relative(path: str) -> bool:
    return bool(path.strip()) and not path.startswith(("/", "@"))


def _machine_defaults(environ: Mapping[str, str]) -> dict[str, Given]:
    uid = os.getuid()
    defaults = {"socket": Given(default_address(environ, uid), "the default")}
    if os.path.isdir(SHARED_MEMORY):
        root = f"{SHARED_MEMORY}/cached-{uid}"
        defaults["segment_root"] = Given(root, "the default")
    return defaults
