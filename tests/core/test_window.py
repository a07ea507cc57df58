"""The window grows while that makes it faster, and is halved when the store complains."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cached.core.window import Window

MIB = 1 << 20


def transfer(window: Window, useful: int, seconds: float, *, now_s: float = 0.0) -> float:
    """Return when it is over: 50 MiB/s for each of the GETs under way, of ``useful`` at most.

    Those that were sent before a change of the window end after it.
    """
    until_s = now_s + seconds
    under_way = window.gets
    while now_s < until_s:
        now_s += 8 / (50 * min(under_way, useful))
        window.landed(8 * MIB, now_s)
        under_way += (window.gets > under_way) - (window.gets < under_way)
    return now_s


def test_it_begins_at_eight_or_at_most():
    assert Window(32).gets == 8
    assert Window(3).gets == 3


def test_it_grows_while_each_more_brings_more():
    window = Window(32)
    transfer(window, 99, 30.0)

    assert window.gets == 32


def test_it_stays_where_more_brings_nothing():
    window = Window(64)
    now_s = 0.0
    sizes = set()
    for _ in range(100):
        now_s = transfer(window, 8, 0.2, now_s=now_s)
        sizes.add(window.gets)

    assert sizes == {8, 10}


def test_it_finds_the_knee():
    window = Window(64)
    now_s = transfer(window, 16, 10.0)
    sizes = set()
    for _ in range(100):
        now_s = transfer(window, 16, 0.2, now_s=now_s)
        sizes.add(window.gets)

    assert min(sizes) >= 15
    assert max(sizes) <= 22


def test_a_complaint_halves_it_once_for_all_that_was_under_way():
    window = Window(8)
    for _ in range(8):
        window.refused(sent_s=1.0, now_s=1.1)
    once = window.gets
    window.refused(sent_s=1.2, now_s=1.3)

    assert (once, window.gets) == (4, 2)


def test_it_recovers_after_the_complaints():
    window = Window(8)
    window.refused(0.0, 0.0)
    window.refused(0.1, 0.1)
    transfer(window, 99, 0.9, now_s=0.2)
    during = window.gets
    transfer(window, 99, 60.0, now_s=1.1)

    assert during == 2
    assert window.gets == 8


@given(
    most=st.integers(1, 64),
    steps=st.lists(
        st.tuples(st.sampled_from(["landed", "refused", "rest"]), st.floats(0, 10)), max_size=80
    ),
)
def test_it_never_leaves_its_bounds(most, steps):
    window = Window(most)
    now_s = 0.0
    for what, seconds in steps:
        now_s += seconds
        match what:
            case "landed":
                window.landed(MIB, now_s)
            case "refused":
                window.refused(now_s - seconds, now_s)
            case _:
                window.rest()
        assert 1 <= window.gets <= most
