"""What all share: nobody has more than is still free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from cached.core.shares import Shares

if TYPE_CHECKING:
    from collections.abc import Sequence

MOVES = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 60), st.booleans()), max_size=60)


def test_who_takes_all_he_can_get_leaves_half_and_two_a_third():
    shares = Shares(900)
    while shares.take("first", 1):
        pass
    assert shares.free == 450
    while shares.take("second", 1):
        pass
    assert (shares.of("second"), shares.free) == (225, 225)
    assert shares.take("third", 112)
    assert not shares.take("third", 2)


def test_who_has_more_than_is_left_by_now_keeps_it_and_gets_no_more():
    shares = Shares(100)
    assert shares.take("first", 50)
    assert shares.take("second", 25)
    assert not shares.take("first", 1)
    assert shares.of("first") == 50


@given(MOVES)
def test_as_much_is_free_as_nobody_has_and_what_is_given_fits(
    moves: Sequence[tuple[int, int, bool]],
):
    """Against a model that counts anew each time."""
    shares, had = Shares(100), dict.fromkeys(range(5), 0)
    for who, count, is_taking in moves:
        if is_taking:
            left = 100 - sum(had.values()) - count
            may = had[who] + count <= left
            assert shares.take(who, count) == may
            had[who] += count * may
        elif count <= had[who]:
            shares.give_back(who, count)
            had[who] -= count
        assert shares.free == 100 - sum(had.values())
        assert [shares.of(who) for who in had] == list(had.values())
