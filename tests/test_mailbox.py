"""The daemon's own events come first, those of peers in turn; none is lost."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from cached.core import events
from cached.core.objects import PeerId
from cached.mailbox import MANY, PAUSE_S, Lane, Mailbox

if TYPE_CHECKING:
    import pytest


def event(origin: int, number: int) -> events.Requested:
    return events.Requested(PeerId(origin), number, "op", {})


def test_a_mailbox_gives_events_in_order_and_none_when_time_is_up():
    mailbox = Mailbox()
    mailbox.post(events.Ticked())
    mailbox.post(events.DrainRequested())

    assert [mailbox.take(0.001) for _ in range(3)] == [
        events.Ticked(),
        events.DrainRequested(),
        None,
    ]


@given(st.lists(st.integers(0, 4) | st.none()))
def test_lanes_take_turns_and_the_daemons_own_events_come_first(steps):
    """Against a naive model. 0 is the daemon itself, others are lanes; None takes one."""
    mailbox = Mailbox()
    lanes: dict[int, Lane] = {origin: mailbox.lane() for origin in range(1, 5)}
    model: dict[int, list[events.Event]] = defaultdict(list)
    turns: list[int] = []
    for number, step in enumerate([*steps, *[None] * len(steps)]):
        if step is not None:
            posted = event(step, number)
            if step and not model[step]:
                turns.append(step)
            model[step].append(posted)
            (lanes[step] if step else mailbox).post(posted)
        elif model[0]:
            assert mailbox.take(0) == model[0].pop(0)
        elif turns:
            origin = turns.pop(0)
            assert mailbox.take(0) == model[origin].pop(0)
            if model[origin]:
                turns.append(origin)
        else:
            assert mailbox.take(0) is None
        assert mailbox.count() == sum(map(len, model.values()))
        assert [lane.count for lane in lanes.values()] == [len(model[at]) for at in range(1, 5)]


def test_whoever_made_a_lane_is_told_when_an_event_was_handled_and_what_it_took(
    monkeypatch: pytest.MonkeyPatch,
):
    took_s = iter([1.0, 1.5, 2.0, 2.0, 3.0, 5.0])
    monkeypatch.setattr(time, "thread_time", lambda: next(took_s))
    mailbox = Mailbox()
    told = []
    lane = mailbox.lane(lambda cost_s: told.append((lane.count, cost_s)))
    for number in range(3):
        lane.post(event(1, number))
    for _ in range(3):
        mailbox.take(0)
    mailbox.post(events.Ticked())
    mailbox.take(0)
    mailbox.take(0)

    assert told == [(2, 0.5), (1, 0.0), (0, 2.0)]


def test_other_threads_get_on_while_one_origin_asks_much(monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    mailbox = Mailbox()
    lane, other = mailbox.lane(), mailbox.lane()
    for number in range(MANY + 2):
        lane.post(event(1, number))
    other.post(event(2, 0))
    for _ in range(MANY + 3):
        mailbox.take(0)

    assert slept == [PAUSE_S] * 2


def test_nothing_is_lost_or_disordered_with_many_threads():
    mailbox = Mailbox()
    lanes = [mailbox.lane() for _ in range(4)]

    def post(origin: int) -> None:
        for number in range(2000):
            lanes[origin].post(event(origin, number))
            if number % 10 == 0:
                mailbox.post(events.Ticked())

    threads = [threading.Thread(target=post, args=(origin,)) for origin in range(4)]
    for thread in threads:
        thread.start()
    found: dict[int, list[int]] = defaultdict(list)
    ticks = 0
    for _ in range(4 * 2200):
        taken = mailbox.take(10)
        if isinstance(taken, events.Requested):
            found[taken.peer].append(taken.request_id)
        else:
            assert taken == events.Ticked()
            ticks += 1
    for thread in threads:
        thread.join()

    assert found == {origin: list(range(2000)) for origin in range(4)}
    assert ticks == 800
    assert mailbox.take(0) is None
