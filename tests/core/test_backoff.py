"""Back-off between attempts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cached.core.backoff import delay_s


@given(st.integers(1, 50), st.floats(0, 1, exclude_max=True), st.floats(0, 1000) | st.none())
def test_a_delay_grows_to_its_cap_and_is_never_below_what_the_store_asked(failures, jitter, asked):
    wait_s = delay_s(failures, jitter, asked)

    assert 0.05 <= wait_s <= max(20.0, asked or 0.0)
    assert wait_s >= (asked or 0.0)
    assert delay_s(failures + 1, jitter, asked) >= wait_s
