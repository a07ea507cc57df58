"""The highest level that gives an option wins, and every refusal says what, why and who."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.core.config import (
    Config,
    Given,
    Level,
    from_document,
    from_environment,
    named_models,
    resolve,
    unknown_key,
)
from cached.core.errors import InvalidConfig
from cached.core.objects import ModelRef
from cached.core.options import OPTIONS
from tests.reference.settings import DEFAULTS, GIB, SAMPLES, together

if TYPE_CHECKING:
    from collections.abc import Mapping

FIELDS = {option.key: option.field for option in OPTIONS}
MACHINE = {
    "segment_root": Given("/dev/shm/cached-7", "the default"),
    "socket": Given("/tmp/cached-7/cached.sock", "the default"),
}
LLM = "llm=s3://models/llama/"
MODELS = {"llm": {"uri": Given("s3://models/llama/", "--model")}}

written = st.fixed_dictionaries(
    {}, optional={key: st.sampled_from(samples) for key, samples in SAMPLES.items()}
)
members = st.fixed_dictionaries(
    {},
    optional={
        "uri": st.sampled_from(["s3://a/b/", "s3://a/c.bin", "file:///srv/m"]),
        "prefetch": st.booleans(),
        "pinned": st.booleans(),
    },
)
named = st.dictionaries(st.sampled_from(["llm", "clip", "a.b-c_9"]), members, max_size=3)


def level(options: Mapping[str, object], models: Mapping[str, Mapping[str, object]]) -> Level:
    return Level(
        {key: Given(value, "a test") for key, value in options.items()},
        {
            name: {key: Given(value, "a test") for key, value in given.items()}
            for name, given in models.items()
        },
    )


def resolved(key: str, value: object, source: str = "a test") -> Config:
    return resolve([Level({key: Given(value, source)}, MODELS)], MACHINE)


def refusal(key: str, value: object, source: str) -> str:
    with pytest.raises(InvalidConfig) as caught:
        resolved(key, value, source)
    return caught.value.message


def uri_refusal(uri: object, name: str = "llm") -> InvalidConfig:
    models = {name: {"uri": Given(uri, "--model")}}
    with pytest.raises(InvalidConfig) as caught:
        resolve([Level({}, models)], MACHINE)
    return caught.value


@given(st.lists(written, max_size=4))
def test_of_each_option_the_highest_level_wins(levels: list[dict[str, tuple[str, object]]]):
    texts = [{key: text for key, (text, _) in level.items()} for level in levels]
    meant = [{key: value for key, (_, value) in level.items()} for level in levels]
    config = resolve([*(level(given, {}) for given in texts), Level({}, MODELS)], MACHINE)
    wanted = together([*meant, DEFAULTS])
    assert {key: getattr(config, field) for key, field in FIELDS.items()} == wanted


@given(st.lists(named, min_size=1, max_size=4))
def test_of_each_model_every_key_is_from_the_highest_level(
    levels: list[dict[str, dict[str, object]]],
):
    names = list(dict.fromkeys(name for each in levels for name in each))
    wanted = [
        {"prefetch": True, "pinned": False}
        | together([each.get(name, {}) for each in levels])
        | {"name": name}
        for name in names
    ]
    if not names or not all("uri" in model for model in wanted):
        with pytest.raises(InvalidConfig):
            resolve([level({}, each) for each in levels], MACHINE)
        return
    config = resolve([level({}, each) for each in levels], MACHINE)
    assert [model._asdict() for model in config.models] == wanted


def test_without_anything_given_the_defaults_hold():
    config = resolve([Level({}, MODELS)], MACHINE)
    assert config.models == (ModelRef("llm", "s3://models/llama/"),)
    assert {key: getattr(config, field) for key, field in FIELDS.items()} == DEFAULTS


def test_a_refusal_names_key_rule_value_and_source():
    assert refusal("memory_budget", "10MiB", "--memory-budget") == (
        "memory_budget must be at least 64 MiB, was 10 MiB (from --memory-budget)"
    )
    assert refusal("memory_budget", "lots", "CACHED_MEMORY_BUDGET") == (
        "memory_budget must be a size such as 8GiB or 512MiB, or auto, was 'lots' "
        "(from CACHED_MEMORY_BUDGET)"
    )
    assert refusal("http_port", 70000, "/etc/cached.toml") == (
        "http_port must be at most 65535, was 70000 (from /etc/cached.toml)"
    )
    assert refusal("socket_mode", "1660", "--socket-mode") == (
        "socket_mode must be at most 0777, was 1660 (from --socket-mode)"
    )
    assert refusal("receive_timeout", "1ms", "--receive-timeout") == (
        "receive_timeout must be at least 100 ms, was 1 ms (from --receive-timeout)"
    )
    assert refusal("log_level", "loud", "--log-level") == (
        "log_level must be one of debug, info, warning, error, was 'loud' (from --log-level)"
    )


@pytest.mark.parametrize("mark", [",", ";"])
def test_models_that_no_white_space_separates_are_refused_and_not_taken_as_one(mark: str):
    given = f"a=s3://m/a/{mark}b=s3://m/b/"
    with pytest.raises(InvalidConfig) as caught:
        from_environment({"CACHED_MODELS": given})
    assert caught.value.message == (
        f"a model must be NAME=URI, and {given!r} holds several (from CACHED_MODELS)"
    )
    assert caught.value.hint == "separate models by white space: a=s3://m/a/ b=s3://m/b/"
    with pytest.raises(InvalidConfig, match="give --model once for each"):
        named_models([given], "--model")


def test_a_comma_in_a_key_is_none_between_models():
    models = named_models(["a=s3://m/x,y=z/", "b=file:///srv/1,2"], "--model")
    assert [model["uri"].value for model in models.values()] == ["s3://m/x,y=z/", "file:///srv/1,2"]


def test_a_value_that_is_overruled_is_not_looked_at():
    high = Level({"memory_budget": Given("1GiB", "--memory-budget")}, MODELS)
    low = Level({"memory_budget": Given("lots", "/etc/cached.toml")}, {})
    assert resolve([high, low], MACHINE).memory_budget_bytes == GIB


def test_no_model_at_all_is_refused_with_the_ways_to_name_one():
    with pytest.raises(InvalidConfig, match=r"no model.*--model.*CACHED_MODELS.*\[models\.NAME\]"):
        resolve([], MACHINE)


def test_a_command_without_named_models_gives_its_own():
    broken = Level({"fetch_threads": Given("3", "/etc/c.toml")}, {"llm": {}})
    ours = (ModelRef("m", "s3://m/"),)
    config = resolve([broken], MACHINE, ours)
    assert (config.models, config.fetch_threads) == (ours, 3)


def test_a_model_without_uri_is_refused():
    with pytest.raises(InvalidConfig, match=r"models\.llm\.uri is missing \(from /etc/c\.toml\)"):
        resolve([Level({}, {"llm": {"pinned": Given(value=True, source="/etc/c.toml")}})], MACHINE)


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "ä", "a" * 129, "a\n"])
def test_a_name_that_is_not_one_is_refused(name: str):
    assert uri_refusal("s3://a/b/", name).message.startswith("a model's name must be 1 to 128")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/prefix/",
        "s3://bucket/a b+ü//c.bin",
        "s3://arn:aws:s3:eu-central-1:123456789012:accesspoint/weights/llama/",
        "file:///srv/models/llama",
    ],
)
def test_a_uri_is_taken_as_it_is(uri: str):
    config = resolve([Level({}, {"llm": {"uri": Given(uri, "--model")}})], MACHINE)
    assert config.models[0].uri == uri


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("https://weights.s3.eu-central-1.amazonaws.com/llama/", "write s3://weights/llama/"),
        (
            "http://127.0.0.1:8333/models/llama/",
            "write s3://models/llama/ and name the server: --endpoint-url http://127.0.0.1:8333",
        ),
        (
            "https://example.org",
            "write s3://BUCKET/KEY and name the server: --endpoint-url https://example.org",
        ),
        ("/srv/models/llama", "write file:///srv/models/llama"),
        ("models/llama", "a local path is absolute and has three slashes: file:///PATH"),
        ("file://srv/m", "a local path is absolute and has three slashes: file:///PATH"),
        ("s3:///llama/", "name the bucket"),
        ("gs://models/llama/", "only s3 and file are read"),
    ],
)
def test_a_uri_of_another_kind_is_refused_with_what_to_write(uri: str, hint: str):
    error = uri_refusal(uri)
    assert error.message.startswith("models.llm.uri must be s3://BUCKET/PREFIX/,")
    assert error.message.endswith(f"was {uri!r} (from --model)")
    assert error.hint == hint


@given(st.text(), st.text())
def test_any_name_and_uri_are_taken_or_refused(name: str, uri: str):
    try:
        config = resolve([Level({}, {name: {"uri": Given(uri, "--model")}})], MACHINE)
    except InvalidConfig:
        return
    assert config.models == (ModelRef(name, uri),)


def test_an_unknown_key_is_answered_with_the_nearest():
    error = unknown_key("key", "memory_bugdet", FIELDS, "/etc/cached.toml")
    assert str(error) == (
        "unknown key memory_bugdet (from /etc/cached.toml); did you mean memory_budget?"
    )
    assert "known are" in unknown_key("key", "zzz", FIELDS, "a test").hint


def test_an_unknown_variable_is_refused_with_the_nearest():
    with pytest.raises(InvalidConfig) as caught:
        from_environment({"CACHED_MEMORY_BUGDET": "8GiB", "PATH": "/bin"})
    assert str(caught.value) == (
        "unknown variable CACHED_MEMORY_BUGDET (from the environment); "
        "did you mean CACHED_MEMORY_BUDGET?"
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CACHED_KEPT", "CACHED_KEPT_VERSIONS"),
        ("CACHED_SSE", "CACHED_SSE_CUSTOMER_KEY_FILE"),
        ("CACHED_LOG", "CACHED_LOG_FORMAT or CACHED_LOG_LEVEL"),
    ],
)
def test_the_beginning_of_a_name_is_answered_with_the_names_that_begin_so(name: str, meant: str):
    with pytest.raises(InvalidConfig) as caught:
        from_environment({name: "1"})
    assert caught.value.hint == f"did you mean {meant}?"


def test_what_all_variables_begin_with_makes_none_the_nearest():
    with pytest.raises(InvalidConfig) as caught:
        from_environment({"CACHED_FOO": "1"})
    assert caught.value.hint.startswith("known are CACHED_")


@pytest.mark.parametrize(
    "name",
    [
        "CACHED_PORT",
        "CACHED_SERVICE_HOST",
        "CACHED_SERVICE_PORT",
        "CACHED_SERVICE_PORT_METRICS",
        "CACHED_PORT_9400_TCP",
        "CACHED_PORT_9400_TCP_ADDR",
        "CACHED_METRICS_SERVICE_HOST",
        "CACHED_METRICS_PORT_9400_UDP_PROTO",
    ],
)
def test_what_kubernetes_makes_of_a_service_is_let_be(name: str):
    assert from_environment({name: "tcp://10.0.0.1:9400"}).options == {}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"memory-budget": "1GiB"}, "unknown key memory-budget (from c.toml)"),
        ({"model": {}}, "unknown key model (from c.toml)"),
        ({"models": LLM}, f"models must be tables such as [models.llm], was '{LLM}' (from c.toml)"),
        ({"models": {"llm": "s3://"}}, "models.llm must be a table, was 's3://' (from c.toml)"),
        ({"models": {"llm": {"url": "s3://"}}}, "unknown key models.llm.url (from c.toml)"),
    ],
)
def test_a_key_that_nobody_reads_is_refused(document: dict[str, object], message: str):
    with pytest.raises(InvalidConfig) as caught:
        from_document(document, "c.toml")
    assert caught.value.message == message
    assert caught.value.hint


keys = st.sampled_from([*FIELDS, "models", "model"]) | st.text(max_size=3)
values = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=5),
    lambda deeper: st.lists(deeper, max_size=2) | st.dictionaries(keys, deeper, max_size=2),
    max_leaves=6,
)


@given(st.dictionaries(keys, values, max_size=4))
def test_any_document_is_read_or_refused(document: dict[str, object]):
    try:
        level = from_document(document, "c.toml")
    except InvalidConfig:
        return
    assert level.options.keys() | {"models"} >= document.keys()
