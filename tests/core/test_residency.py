"""Room is made by evicting what is worth least, and never what somebody relies on."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.core.objects import VersionRef
from cached.core.residency import HALF_LIFE_S, Candidate, choose, decayed, touched, worth
from tests.reference.eviction import least_bytes

NOW_S = 10_000.0

candidates = st.builds(
    Candidate,
    of=st.builds(VersionRef, st.sampled_from("abcdefgh"), st.just("1")),
    size_bytes=st.integers(0, 20),
    load_s=st.sampled_from([0.0, 0.5, 1.0, 10.0]),
    last_used_s=st.floats(0, 2 * NOW_S),
    frequency=st.floats(0, 100),
    is_leased=st.booleans(),
    is_pinned=st.booleans(),
)
stocks = st.lists(candidates, max_size=7, unique_by=lambda one: one.of)
amounts = st.integers(0, 60)


def version(name: str, size: int = 10, **fields: Any) -> Candidate:
    return Candidate(VersionRef(name, "1"), size, 1.0, NOW_S, 1.0)._replace(**fields)


def chosen(stock: list[Candidate], needed: int, free: int = 0) -> str | None:
    """Return the letters of what is evicted."""
    victims = choose(stock, needed, free, NOW_S)
    return None if victims is None else "".join(victim.name for victim in victims)


def sizes_of(stock: list[Candidate], victims: tuple[VersionRef, ...]) -> list[int]:
    return [one.size_bytes for one in stock if one.of in victims]


@given(stocks, amounts, st.integers(-20, 40))
def test_makes_room_exactly_when_all_that_may_go_is_enough(stock, needed, free):
    may_go = [one.size_bytes for one in stock if not one.is_leased and not one.is_pinned]
    victims = choose(stock, needed, free, NOW_S)
    best = least_bytes(may_go, needed - free)
    assert (victims is None) == (best is None)
    if victims is not None:
        assert sum(sizes_of(stock, victims)) + free >= needed or not victims


@given(stocks, amounts, amounts)
def test_never_takes_what_is_leased_or_pinned_or_twice(stock, needed, free):
    victims = choose(stock, needed, free, NOW_S) or ()
    assert len(set(victims)) == len(victims)
    for one in stock:
        assert not (one.of in victims and (one.is_leased or one.is_pinned))


@given(stocks, amounts, amounts)
def test_every_victim_is_necessary(stock, needed, free):
    sizes = sizes_of(stock, choose(stock, needed, free, NOW_S) or ())
    assert all(sum(sizes) - size + free < needed for size in sizes)


@given(stocks, amounts, amounts, st.integers(0, 30))
def test_more_free_bytes_never_evict_more_bytes(stock, needed, free, more):
    victims = choose(stock, needed, free, NOW_S)
    fewer = choose(stock, needed, free + more, NOW_S)
    if victims is not None:
        assert fewer is not None
        assert sum(sizes_of(stock, fewer)) <= sum(sizes_of(stock, victims))


@given(stocks, amounts, amounts, st.randoms())
def test_the_order_of_the_candidates_does_not_matter(stock, needed, free, random):
    shuffled = random.sample(stock, len(stock))
    assert choose(stock, needed, free, NOW_S) == choose(shuffled, needed, free, NOW_S)


def test_evicts_nobody_when_it_fits():
    assert chosen([version("a")], needed=5, free=5) == ""


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (version("a", frequency=1.0), version("b", frequency=2.0)),
        (version("a", load_s=1.0), version("b", load_s=2.0)),
        (version("a", 20), version("b", 10)),
        (version("a", last_used_s=NOW_S - HALF_LIFE_S), version("b")),
        (version("a", load_s=0.0, last_used_s=1.0), version("b", load_s=0.0, last_used_s=2.0)),
    ],
    ids=["less used", "quicker to load", "larger", "longer unused", "equal but longer unused"],
)
def test_the_first_to_go_is_the_one(worse: Candidate, better: Candidate):
    assert chosen([better, worse], needed=10) == "a"


def test_a_small_one_stays_when_the_large_one_after_it_is_enough():
    assert chosen([version("a", 1, frequency=0.1), version("b", 20)], needed=10) == "b"


def test_says_when_even_all_is_not_enough():
    assert chosen([version("a"), version("b")], needed=21) is None


def test_makes_up_for_a_budget_that_was_lowered():
    assert chosen([version("a"), version("b", frequency=2.0)], needed=0, free=-5) == "a"


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_count_decays_the_same_in_one_step_or_two(frequency, last, between, after):
    middle, end = last + between, last + between + after
    once = decayed(frequency, last, end)
    twice = decayed(decayed(frequency, last, middle), middle, end)
    assert math.isclose(once, twice, rel_tol=1e-6, abs_tol=1e-9)


def test_a_count_halves_in_its_half_life_and_grows_by_one_with_each_use():
    assert decayed(8.0, 0.0, 20.0, half_life_s=10.0) == 2.0
    assert touched(8.0, 0.0, 20.0, half_life_s=10.0) == 3.0


def test_a_clock_that_leapt_back_does_not_raise_a_count():
    assert decayed(8.0, 100.0, 50.0) == 8.0


def test_worth_is_loading_time_saved_per_byte():
    one = version("a", 4, load_s=2.0, frequency=6.0)
    assert worth(one, NOW_S) == 3.0
