"""A state changes by a row of its table, and in no other way."""

from __future__ import annotations

from itertools import product

import pytest

from cached.core.errors import InvalidTransition
from cached.core.lifecycle import (
    DAEMON,
    FAILED,
    IDLE,
    MODEL,
    STARTING,
    STOPPED,
    advance,
)

TABLES = {"model": MODEL, "daemon": DAEMON}


def walk(table: str, state: str, *triggers: str) -> str:
    for trigger in triggers:
        state = advance(TABLES[table], state, trigger)
    return state


def reachable(table: str, start: str) -> set[str]:
    seen = {start}
    todo = [start]
    while todo:
        for state in TABLES[table][todo.pop()].values():
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return seen


@pytest.mark.parametrize(
    ("triggers", "state"),
    [
        ("want resolved reserved filled published", IDLE),
        ("want same", IDLE),
        ("adopt filled published want resolved return published", IDLE),
        ("return published", IDLE),
        ("want fail return published", IDLE),
        ("want resolved reserved evict want", "resolving"),
        ("want resolved reserved filled evict", IDLE),
        ("want fail", FAILED),
        ("want evict", IDLE),
        ("want resolved evict want", "resolving"),
        ("want fail evict", IDLE),
        ("want resolved fail want", "resolving"),
        ("want resolved reserved fail", FAILED),
        ("want resolved reserved filled fail", FAILED),
    ],
)
def test_a_model_goes(triggers: str, state: str):
    assert walk("model", IDLE, *triggers.split()) == state


@pytest.mark.parametrize("triggers", ["start drain stop", "drain stop"])
def test_a_daemon_ends_stopped(triggers: str):
    assert walk("daemon", STARTING, *triggers.split()) == STOPPED


@pytest.mark.parametrize(("table", "start"), [("model", IDLE), ("daemon", STARTING)])
def test_every_state_has_a_row_and_can_be_reached(table: str, start: str):
    assert reachable(table, start) == TABLES[table].keys()


def test_a_model_comes_to_rest_from_every_state():
    for state in MODEL:
        assert IDLE in reachable("model", state)


@pytest.mark.parametrize("table", TABLES)
def test_whatever_has_no_row_is_refused_by_state_and_trigger(table: str):
    rows = TABLES[table]
    triggers = {trigger for row in rows.values() for trigger in row}
    for state, trigger in product(rows, triggers):
        if trigger not in rows[state]:
            with pytest.raises(InvalidTransition, match=f"'{trigger}' in state '{state}'"):
                advance(rows, state, trigger)


def test_an_unknown_state_is_refused():
    with pytest.raises(InvalidTransition, match="'asleep'"):
        advance(MODEL, "asleep", "want")
