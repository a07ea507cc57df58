"""A deadline says how much time is left in whatever unit the kernel wants it."""

from __future__ import annotations

import pytest

from cached.client.deadline import LONGEST_S, Deadline


def test_without_a_time_out_nothing_ever_passes():
    deadline = Deadline(None)
    assert deadline.left_s is None
    assert deadline.left_ms is None
    assert not deadline.has_passed


@pytest.mark.parametrize("timeout_s", [0, -1.0])
def test_no_time_has_passed_at_once(timeout_s: float):
    deadline = Deadline(timeout_s)
    assert deadline.has_passed
    assert deadline.left_s == 0.0
    assert deadline.left_ms == 0


def test_milliseconds_are_rounded_up_so_that_nobody_polls_in_a_circle():
    left_ms = Deadline(0.0009).left_ms
    assert left_ms in {0, 1}  # 0 only if it has passed meanwhile
    assert Deadline(100.0).left_ms in range(99_000, 100_002)


@pytest.mark.parametrize("timeout_s", [1e9, float("inf")])
def test_what_is_too_long_for_the_kernel_is_cut(timeout_s: float):
    deadline = Deadline(timeout_s)
    assert deadline.left_s == LONGEST_S
    assert deadline.left_ms is not None
    assert deadline.left_ms < 2**31
    assert not deadline.has_passed


def test_what_is_no_number_of_seconds_is_refused():
    with pytest.raises(ValueError, match="timeout_s must be a number of seconds, or None, was '3'"):
        Deadline("3")  # type: ignore[arg-type]


def test_a_sleep_ends_at_the_deadline():
    Deadline(0).sleep(3600)
