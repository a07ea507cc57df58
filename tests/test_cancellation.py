"""A call that is not wanted any more is cut once, whoever comes first; after it ended never."""

from __future__ import annotations

import threading

from cached.cancellation import NEVER, Token


def test_what_is_attached_is_cut_once():
    token, cuts = Token(), []
    token.attach(lambda: cuts.append(1))
    states = [token.is_cancelled]
    token.cancel()
    token.cancel()
    assert [*states, token.is_cancelled] == [False, True]
    assert cuts == [1]


def test_what_is_attached_too_late_is_cut_at_once():
    token, cuts = Token(), []
    token.cancel()
    token.attach(lambda: cuts.append(1))
    assert cuts == [1]


def test_what_was_detached_is_left_alone():
    token, cuts = Token(), []
    token.attach(lambda: cuts.append(1))
    token.detach()
    token.cancel()
    assert cuts == []


def test_a_call_has_one_request_after_the_other():
    token, cuts = Token(), []
    token.attach(lambda: cuts.append(1))
    token.detach()
    token.attach(lambda: cuts.append(2))
    token.cancel()
    assert cuts == [2]


def test_detach_waits_for_a_cut_that_runs():
    """So that a connection never serves the next request while the last one's cut arrives."""
    token = Token()
    has_begun, may_end, ended = threading.Event(), threading.Event(), []

    def cut() -> None:
        has_begun.set()
        assert may_end.wait(5)
        ended.append("cut")

    def detach() -> None:
        token.detach()
        ended.append("detach")

    token.attach(cut)
    threads = [threading.Thread(target=token.cancel)]
    threads[0].start()
    assert has_begun.wait(5)
    threads.append(threading.Thread(target=detach))
    threads[1].start()
    may_end.set()
    for thread in threads:
        thread.join(5)
    assert ended == ["cut", "detach"]


def test_what_nobody_cancels_is_never_cut():
    NEVER.attach(lambda: 1 / 0)  # type: ignore[arg-type]
    NEVER.detach()
    assert not NEVER.is_cancelled
