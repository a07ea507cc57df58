"""The daemon's clock is the system's."""

from __future__ import annotations

import time

from cached.adapters.clock import SystemClock


def test_tells_monotonic_and_wall_time():
    clock = SystemClock()
    before = (time.monotonic(), time.time())
    told = (clock.now_s(), clock.wall_s())
    after = (time.monotonic(), time.time())
    assert before[0] <= told[0] <= after[0]
    assert before[1] <= told[1] <= after[1]
