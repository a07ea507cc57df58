"""Each option reads what its rule says, and refuses everything else without surprises."""

from __future__ import annotations

import contextlib
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.core.config import Config
from cached.core.errors import InvalidConfig
from cached.core.options import MODEL_OPTIONS, OPTIONS, Option
from tests.reference.settings import DEFAULTS, SAMPLES

options = st.sampled_from((*OPTIONS, *MODEL_OPTIONS))
toml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(date(2026, 1, 1)),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=4,
)


def option_of(key: str) -> Option:
    return next(option for option in (*OPTIONS, *MODEL_OPTIONS) if option.key == key)


def test_every_field_of_the_config_has_one_row():
    assert sorted(Config._fields) == sorted(["models", *(option.field for option in OPTIONS)])
    assert {option.key for option in OPTIONS} == SAMPLES.keys() == DEFAULTS.keys()


def test_names_follow_from_the_field():
    budget = option_of("memory_budget")
    assert budget.field == "memory_budget_bytes"
    assert budget.flag == "--memory-budget"
    assert budget.env == "CACHED_MEMORY_BUDGET"


@pytest.mark.parametrize(
    ("key", "text", "meant"),
    [(key, text, meant) for key, samples in SAMPLES.items() for text, meant in samples],
)
def test_an_option_reads_what_is_meant(key: str, text: str, meant: object):
    value = option_of(key).kind.parse(text)
    assert value == meant
    assert type(value) is type(meant)


@given(options, toml_values)
def test_any_value_is_read_or_refused(option: Option, value: object):
    with contextlib.suppress(TypeError, ValueError, InvalidConfig):
        option.kind.parse(value)


@given(options, st.text())
def test_a_value_is_written_back_as_text(option: Option, text: str):
    with contextlib.suppress(TypeError, ValueError, InvalidConfig):
        assert option.kind.show(option.kind.parse(text))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory_budget", "lots"),
        ("memory_budget", True),
        ("memory_headroom", "auto"),
        ("socket", "/" + "s" * 107),
        ("socket", "@"),
        ("socket_mode", 0o660),  # TOML's 660 and 0o660 cannot be told apart
        ("socket_mode", "0689"),
        ("http_port", "http"),
        ("http_port", 80.0),
        ("endpoint_url", "127.0.0.1:8333"),
        ("endpoint_url", "ftp://host"),
        ("endpoint_url", "https://host/?query"),
        ("endpoint_url", "https://"),
        ("endpoint_url", "https://user:secret@host"),
        ("region", "eu central"),
        ("addressing_style", "Path"),
        ("anonymous", "maybe"),
        ("anonymous", 1),
        ("fetch_threads", "8.5"),
        ("fetch_threads", False),
        ("http_host", ""),
        ("http_host", "a\nb"),
        ("segment_root", "\udcff"),
        ("log_level", "trace"),
    ],
)
def test_an_option_refuses(key: str, value: object):
    with pytest.raises((TypeError, ValueError, InvalidConfig)):
        option_of(key).kind.parse(value)


def test_defaults_are_what_they_say():
    for option in OPTIONS:
        if option.default is not None:
            assert option.kind.parse(option.default) == DEFAULTS[option.key]
