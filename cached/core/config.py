"""One frozen Config out of what flags, environment, file and defaults give.

Of each option the highest level that gives it wins. The options themselves are the rows of
cached/core/options.py. Daemon, commands and workers read environment and file by what is here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from cached.core.errors import InvalidConfig
from cached.core.objects import ModelRef
from cached.core.options import CONFIG_ENV, MODEL_OPTIONS, MODELS_ENV, OPTIONS, RUN_ENV

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cached.core.options import Option

# Kubernetes puts these into every container for a Service whose name begins with "cached".
SERVICE_LINK = re.compile(
    r"CACHED(_\w+)?_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NEXT_MODEL = re.compile(r"[,;][A-Za-z0-9][A-Za-z0-9._-]*=(s3|file)://")


class Config(NamedTuple):
    """All settings of one daemon. ``OPTIONS`` says what each means.

    Attributes:
        memory_budget_bytes: ``None``: what the machine has, measured when it is needed.
        http_port: ``None``: no HTTP side; 0: a free port.
        http_token_file: ``None``: nothing can be changed over HTTP.
        endpoint_url: ``None``: AWS.
        region: ``None``: nobody said; the store's own default.
        ca_bundle: ``None``: the system's certificates.
        sse_customer_key_file: ``None``: no object is encrypted by a customer's key.
    """

    models: tuple[ModelRef, ...]
    memory_budget_bytes: int | None
    memory_headroom_bytes: int
    segment_root: str
    segments: str
    purge_on_exit: bool
    kept_versions: int
    socket: str
    socket_mode: int
    http_host: str
    http_port: int | None
    http_token_file: str | None
    endpoint_url: str | None
    region: str | None
    addressing_style: str
    ca_bundle: str | None
    allow_insecure_endpoint: bool
    sse_customer_key_file: str | None
    anonymous: bool
    verify: str
    refresh_interval_s: float
    fetch_threads: int
    connect_timeout_s: float
    receive_timeout_s: float
    max_attempts: int
    drain_timeout_s: float
    log_level: str
    log_format: str
    audit: bool


class Given(NamedTuple):
    """A value as somebody wrote it.

    Attributes:
        value: text, or what TOML or the flag's parser made of it; not checked yet.
        source: who gave it: ``--memory-budget``, ``CACHED_REGION``, ``/etc/cached.toml``.
    """

    value: object
    source: str


class Level(NamedTuple):
    """What one level (the flags, the environment, a file, the defaults) gives.

    Attributes:
        options: by key of the option.
        models: by model name, then by key of ``MODEL_OPTIONS``.
    """

    options: Mapping[str, Given]
    models: Mapping[str, Mapping[str, Given]]


def check_variables(names: Iterable[str]) -> None:
    """Refuse a ``CACHED_*`` variable that nobody reads.

    Args:
        names: of all variables of the environment.

    Raises:
        InvalidConfig: for the first one; with the known name that is most like it.
    """
    known = [*(option.env for option in OPTIONS), CONFIG_ENV, MODELS_ENV, *RUN_ENV]
    for name in names:
        if name.startswith("CACHED_") and name not in known and not SERVICE_LINK.fullmatch(name):
            raise unknown_key("variable", name, known, "the environment")


def from_environment(environ: Mapping[str, str]) -> Level:
    """Return the level of the environment: CACHED_*, and below it what the AWS SDKs read.

    An empty variable counts as not set; white space around a value does not count.

    Raises:
        InvalidConfig: a CACHED_* variable that nobody reads.
    """
    check_variables(environ)
    given = {}
    for option in OPTIONS:
        for name in (option.env, *aws_names(option.aws, environ)):
            value = environ.get(name, "").strip()
            if value:
                given[option.key] = Given(value, name)
                break
    return Level(given, named_models(environ.get(MODELS_ENV, "").split(), MODELS_ENV))


def from_document(document: Mapping[str, object], source: str) -> Level:
    """Return the level of a parsed TOML document that came from ``source``.

    Raises:
        InvalidConfig: it holds a key that nobody reads.
    """
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


def named_models(texts: Iterable[str], source: str) -> dict[str, dict[str, Given]]:
    """Return the models of a level that were written as ``NAME=URI``.

    Raises:
        InvalidConfig: one is something else, or named twice.
    """
    models: dict[str, dict[str, Given]] = {}
    for text in texts:
        name, mark, uri = text.partition("=")
        if not mark or not name or "/" in name:
            message = f"a model must be NAME=URI, was {text!r} (from {source})"
            raise InvalidConfig(message, hint="for example llm=s3://models/llama/")
        if NEXT_MODEL.search(uri):
            message = f"a model must be NAME=URI, and {text!r} holds several (from {source})"
            raise InvalidConfig(message, hint=_several_hint(source))
        if name in models:
            message = f"model {name} is named twice (from {source})"
            raise InvalidConfig(message, hint="keep one")
        models[name] = {"uri": Given(uri, source)}
    return models


def _several_hint(source: str) -> str:
    if source == MODELS_ENV:
        return "separate models by white space: a=s3://m/a/ b=s3://m/b/"
    return f"give {source} once for each"


def resolve(
    levels: Iterable[Level],
    defaults: Mapping[str, Given] | None = None,
    models: tuple[ModelRef, ...] | None = None,
) -> Config:
    """Return the Config that the levels make together.

    Of each option the highest level that gives it wins; so of each member of each model. Values
    that are overruled are not looked at.

    Args:
        levels: the highest first.
        defaults: of options whose default depends on the machine, by key; below all levels.
        models: instead of those that the levels name, which are not looked at then.

    Raises:
        InvalidConfig: a key, its rule, its value and who gave it.
    """
    ladder = [*levels, Level(defaults or {}, {})]
    if models is None:
        models = _models([level.models for level in ladder])
    values: dict[str, object] = {"models": models}
    for option in OPTIONS:
        given = _first([level.options for level in ladder], option)
        values[option.field] = None if given is None else _checked(option, option.key, given)
    return Config._make(values[field] for field in Config._fields)


def unknown_key(kind: str, key: str, known: Iterable[str], source: str) -> InvalidConfig:
    """Return the error for a name that nobody reads, with the known name that is most like it.

    It is one of those that begin so, if any do; where none of them is much like it, all are told.
    """
    import difflib  # only where it is needed: it costs 3 ms

    names = sorted(known)
    bare = {name.removeprefix("CACHED_"): name for name in names}  # which makes none the nearest
    word = key.removeprefix("CACHED_")
    longer = [each for each in bare if word and each.startswith(word)]
    close = difflib.get_close_matches(word, longer or bare, n=1, cutoff=0.6) or longer
    meant = " or ".join(bare[each] for each in close)
    hint = f"did you mean {meant}?" if close else f"known are {', '.join(names)}"
    return InvalidConfig(f"unknown {kind} {key} (from {source})", hint=hint)


def _members(name: str, table: object, source: str) -> dict[str, Given]:
    if not isinstance(table, dict):
        message = f"models.{name} must be a table, was {table!r} (from {source})"
        raise InvalidConfig(message, hint=f'write [models.{name}] and below it uri = "s3://..."')
    keys = [option.key for option in MODEL_OPTIONS]
    for key in table:
        if key not in keys:
            raise unknown_key("key", f"models.{name}.{key}", keys, source)
    return {key: Given(value, source) for key, value in table.items()}


def aws_names(names: tuple[str, ...], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the variables that the AWS SDKs would read: those of endpoints may be switched off.

    Source: docs.aws.amazon.com/sdkref, "Service-specific endpoints".
    """
    ignored = environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
    return tuple(name for name in names if not (ignored and "ENDPOINT_URL" in name))


def _first(givens: Sequence[Mapping[str, Given]], option: Option) -> Given | None:
    for level in givens:
        if option.key in level:
            return level[option.key]
    return None if option.default is None else Given(option.default, "the default")


def _checked(option: Option, name: str, given: Given) -> object:
    try:
        value = option.kind.parse(given.value)
    except (TypeError, ValueError, InvalidConfig):
        raise _refusal(name, option.kind.rule, repr(given.value), given.source) from None
    if not isinstance(value, bool) and isinstance(value, int | float):
        show = option.kind.show
        if option.least is not None and not value >= option.least:
            rule = f"at least {show(option.least)}"
            raise _refusal(name, rule, show(value), given.source)
        if option.most is not None and value > option.most:
            rule = f"at most {show(option.most)}"
            raise _refusal(name, rule, show(value), given.source)
    return value


def _refusal(name: str, rule: str, value: str, source: str, hint: str = "") -> InvalidConfig:
    return InvalidConfig(f"{name} must be {rule}, was {value} (from {source})", hint=hint)


def _models(levels: Sequence[Mapping[str, Mapping[str, Given]]]) -> tuple[ModelRef, ...]:
    names = list(dict.fromkeys(name for level in levels for name in level))
    if not names:
        raise InvalidConfig(
            "no model is configured",
            hint="name one with --model NAME=URI, CACHED_MODELS or [models.NAME] in the file",
        )
    return tuple(_model(name, [level.get(name, {}) for level in levels]) for name in names)


def _model(name: str, levels: Sequence[Mapping[str, Given]]) -> ModelRef:
    source = next((given.source for level in levels for given in level.values()), "the file")
    if MODEL_NAME.fullmatch(name) is None:
        rule = "1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit"
        raise _refusal("a model's name", rule, repr(name), source)
    values: dict[str, object] = {"name": name}
    for option in MODEL_OPTIONS:
        given = _first(levels, option)
        key = f"models.{name}.{option.key}"
        if given is None:
            message = f"{key} is missing (from {source})"
            raise InvalidConfig(message, hint=f'write {option.key} = "..." below [models.{name}]')
        values[option.field] = _checked(option, key, given)
        if option.field == "uri":
            check_uri(key, str(given.value), given.source)
    return ModelRef._make(values[field] for field in ModelRef._fields)


def check_uri(name: str, uri: str, source: str) -> None:
    """Refuse what is not a URI of a model.

    Args:
        name: of what holds it.
        uri: as somebody wrote it.
        source: who gave it.

    Raises:
        InvalidConfig: with what was probably meant.
    """
    if re.fullmatch(r"s3://[^/\s]+(/.*)?|file:///.+", uri):
        return
    rule = "s3://BUCKET/PREFIX/, s3://BUCKET/KEY or file:///PATH"
    raise _refusal(name, rule, repr(uri), source, _uri_hint(uri))


def _uri_hint(uri: str) -> str:
    if web := re.fullmatch(r"https?://([^/.]+)\.s3[.-][^/]*amazonaws\.com/(.*)", uri):
        return f"write s3://{web[1]}/{web[2]}"
    if web := re.fullmatch(r"(https?://[^/]+)/?(.*)", uri):
        return f"write s3://{web[2] or 'BUCKET/KEY'} and name the server: --endpoint-url {web[1]}"
    if uri.startswith("/"):
        return f"write file://{uri}"
    if uri.startswith("s3:"):
        return "name the bucket"
    if uri.startswith("file:") or "://" not in uri:
        return "a local path is absolute and has three slashes: file:///PATH"
    return "only s3 and file are read"
