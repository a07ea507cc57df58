"""Configuration: flags go before the environment, that before the file, that before defaults."""

from __future__ import annotations

import pytest

from cached.cli.load import load
from cached.core.errors import InvalidConfig

MODEL = {"model": ["m=s3://b/m/"]}


def test_levels_overrule_each_other_in_order(tmp_path):
    file = tmp_path / "cached.toml"
    file.write_text('fetch_threads = 2\nregion = "eu-west-1"\nlog_level = "debug"\n')
    environ = {
        "CACHED_CONFIG": str(file),
        "CACHED_FETCH_THREADS": "3",
        "CACHED_REGION": "eu-west-2",
    }

    config = load({**MODEL, "fetch_threads": "4"}, environ)

    assert config.fetch_threads == 4
    assert config.region == "eu-west-2"
    assert config.log_level == "debug"
    assert config.http_port == 9400


def test_models_come_from_all_levels(tmp_path):
    file = tmp_path / "cached.toml"
    file.write_text('[models.a]\nuri = "s3://b/a/"\npinned = true\n')
    environ = {"CACHED_CONFIG": str(file), "CACHED_MODELS": "b=s3://b/b/\n c=file:///c/"}

    config = load({"model": ["a=s3://other/"]}, environ)

    found = {ref.name: ref for ref in config.models}
    assert set(found) == {"a", "b", "c"}
    assert found["a"].uri == "s3://other/"
    assert found["a"].pinned


def test_variables_of_the_aws_sdks_are_read_below_ours():
    environ = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_REGION": "x"}

    assert load(MODEL, environ).endpoint_url == "http://127.0.0.1:1"
    assert load(MODEL, {**environ, "CACHED_REGION": "y"}).region == "y"


@pytest.mark.parametrize(
    ("flags", "environ", "words"),
    [
        (MODEL, {"CACHED_FETCH_THREAD": "1"}, "did you mean CACHED_FETCH_THREADS"),
        ({**MODEL, "memory_budget": "10MiB"}, {}, "memory_budget must be at least 64 MiB"),
        ({"model": ["m=http://x/"]}, {}, "uri"),
        ({"model": ["m"]}, {}, "NAME=URI"),
        (MODEL, {"CACHED_CONFIG": "/nowhere.toml"}, "/nowhere.toml"),
    ],
)
def test_what_is_wrong_is_named(flags, environ, words):
    with pytest.raises(InvalidConfig) as refused:
        load(flags, environ)

    assert words in str(refused.value)
