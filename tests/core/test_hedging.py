"""A GET that brings nothing is sent again when its peers are faster, and seldom."""

from __future__ import annotations

from cached.core.hedging import FIRST_TOKENS, MOST_TOKENS, Hedging


def test_patience_is_four_times_the_median_and_at_least_150_ms():
    hedging = Hedging()
    unknown = hedging.patience_s
    for seconds in (0.01, 0.01, 0.01):
        hedging.answered(seconds)
    quick = hedging.patience_s
    for _ in range(32):
        hedging.answered(0.2)

    assert (unknown, quick) == (0.15, 0.15)
    assert hedging.patience_s == 0.8


def test_one_slow_peer_does_not_make_it_patient():
    hedging = Hedging()
    for seconds in (0.05, 0.05, 9.0):
        hedging.answered(seconds)

    assert hedging.patience_s == 0.2


def test_hedges_are_a_twentieth_of_all_gets():
    hedging = Hedging()
    spent = 0
    for _ in range(1000):
        hedging.sent()
        if hedging.may(10.0):
            hedging.spend()
            spent += 1

    assert 50 <= spent <= 50 + FIRST_TOKENS


def test_unused_tokens_do_not_pile_up():
    hedging = Hedging()
    for _ in range(1000):
        hedging.sent()
    spent = 0
    while hedging.may(10.0):
        hedging.spend()
        spent += 1

    assert spent == MOST_TOKENS


def test_before_its_patience_is_over_nothing_is_sent():
    hedging = Hedging()

    assert not hedging.may(0.149)
    assert hedging.may(0.15)


def test_a_straggler_is_four_times_as_old_as_the_median_and_half_a_second_at_least():
    hedging = Hedging()
    unknown = hedging.straggler_s
    for seconds in (0.1, 0.3, 0.3):
        hedging.ended(seconds)

    assert unknown == 0.5
    assert hedging.straggler_s == 1.2
