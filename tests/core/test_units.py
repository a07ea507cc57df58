"""Sizes and durations are read as people write them, and nothing else is."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cached.core.errors import InvalidConfig
from cached.core.units import (
    format_bytes,
    format_bytes_down,
    format_bytes_up,
    format_seconds,
    parse_bytes,
    parse_seconds,
)

SIZES = {
    "0": 0,
    "1024": 1024,
    "512B": 512,
    "4KiB": 4096,
    "512MiB": 512 << 20,
    "512 mib": 512 << 20,
    " 1.5GiB ": 3 << 29,
    "8Gi": 8 << 30,
    "2TiB": 2 << 40,
    "8kB": 8000,
    "8GB": 8 * 10**9,
    "0.1kB": 100,
}
NO_SIZES = ["", "MiB", "8G", "-1MiB", "1e9", "1,5GiB", "1.GiB", ".5GiB", "5 parsecs", "٣MiB", "NaN"]
DURATIONS = {
    "0": 0.0,
    "30": 30.0,
    "2.5": 2.5,
    "500us": 0.0005,
    "250ms": 0.25,
    "1m30s": 90.0,
    "1h 2m": 3720.0,
    "1.5h": 5400.0,
    "2D": 172800.0,
}
NO_DURATIONS = ["", "s", "-1s", "1 fortnight", "1m30", "30s!", "Inf", "٣s"]


@pytest.mark.parametrize("text", SIZES)
def test_reads_a_size(text: str):
    assert parse_bytes(text) == SIZES[text]


@pytest.mark.parametrize("value", [0, 1024, 1e9])
def test_takes_a_bare_number_as_bytes(value: float):
    assert parse_bytes(value) == value


@pytest.mark.parametrize(
    "value", [*NO_SIZES, -1, 1.5, True, float("nan"), float("inf"), "9" * 5000]
)
def test_refuses_what_is_no_size_and_shows_it(value: str | float):
    with pytest.raises(InvalidConfig, match="a size must be") as caught:
        parse_bytes(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("text", DURATIONS)
def test_reads_a_duration(text: str):
    assert parse_seconds(text) == pytest.approx(DURATIONS[text])


@pytest.mark.parametrize("value", [0, 3, 2.5])
def test_takes_a_bare_number_as_seconds(value: float):
    assert parse_seconds(value) == value


@pytest.mark.parametrize("value", [*NO_DURATIONS, -1, True, float("nan"), float("inf")])
def test_refuses_what_is_no_duration_and_shows_it(value: str | float):
    with pytest.raises(InvalidConfig, match="a duration must be") as caught:
        parse_seconds(value)
    assert repr(value) in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_refused(text: str):
    for parse in (parse_bytes, parse_seconds):
        with suppress(InvalidConfig):
            assert parse(text) >= 0


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (64 << 20, "64 MiB"),
        ((64 << 20) + 1, "64.0 MiB"),
        (3 << 29, "1.5 GiB"),
        ((1 << 30) - 1, "1.0 GiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_shows_a_size(size_bytes: int, text: str):
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.00025, "250 us"),
        (0.25, "250 ms"),
        (0.9999, "1.0 s"),
        (2.5, "2.5 s"),
        (59.96, "1m"),
        (90, "1m30s"),
        (7200, "2h"),
        (172805, "2d5s"),
    ],
)
def test_shows_a_duration(seconds: float, text: str):
    assert format_seconds(seconds) == text


@given(st.integers(0, 1 << 50))
def test_a_size_that_is_shown_reads_as_the_same_within_a_tenth_of_its_unit(size_bytes: int):
    assert parse_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.06)


@given(st.floats(0.001, 1e6))
def test_a_duration_that_is_shown_reads_as_the_same_within_rounding(seconds: float):
    assert parse_seconds(format_seconds(seconds)) == pytest.approx(seconds, rel=0.06)


@given(st.integers(0, 2**53))
@example(1024**2 - 1)
@example(248_936_858)
def test_a_size_that_is_rounded_up_is_enough_and_one_rounded_down_is_there(size_bytes):
    up, down = format_bytes_up(size_bytes), format_bytes_down(size_bytes)
    assert parse_bytes(down) <= size_bytes <= parse_bytes(up)
    assert parse_bytes(up) - parse_bytes(down) <= 0.1 * size_bytes + 1
    assert parse_bytes(format_bytes(size_bytes)) in {parse_bytes(up), parse_bytes(down)}
