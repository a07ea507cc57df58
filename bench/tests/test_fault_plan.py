"""A plan is data, the same for the same seed, and meets the GETs that it names and no other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from bench import fault_plan
from bench.fault_plan import (
    CASES,
    PART_BYTES,
    ClosedIdle,
    Corrupt,
    Decision,
    Latency,
    Replaced,
    Reset,
    Script,
    SlowDown,
    Stall,
    plan_for,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.fault_plan import Fault

SIZE = 64 * PART_BYTES


def decisions(
    plan: Sequence[Fault],
    ranges: Sequence[tuple[int, int]],
    *,
    seed: int = 1,
    every_s: float = 0.0,
) -> list[Decision]:
    script = Script(plan, seed)
    return [
        script.decide(start, stop, number * every_s) for number, (start, stop) in enumerate(ranges)
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_plan_comes_back_from_json_and_is_the_same_for_the_same_seed(case):
    plan = plan_for(case, 3, SIZE)
    assert fault_plan.from_data(json.loads(json.dumps(fault_plan.to_data(plan)))) == plan
    assert plan_for(case, 3, SIZE) == plan


def test_another_seed_is_another_place_near_the_middle_of_a_part_of_the_inner_half():
    places = {plan_for("stall", seed, SIZE)[0].byte for seed in range(50)}
    assert len(places) > 40
    for place in places:
        assert SIZE // 4 <= place < SIZE * 3 // 4
        assert abs(place % PART_BYTES - PART_BYTES // 2) <= 1 << 20


def test_all_cases_of_a_seed_happen_at_the_same_place():
    assert plan_for("corrupt", 7, SIZE)[0].byte == plan_for("stall", 7, SIZE)[0].byte


def test_a_fault_at_a_byte_meets_the_first_get_of_it_and_no_other():
    got = decisions([Stall(3.0, byte=15)], [(5, 15), (16, 30), (15, 16), (15, 16)])
    assert [each.fault for each in got] == [None, None, Stall(3.0, byte=15), None]


def test_a_fault_of_the_kth_get_happens_in_the_middle_of_its_body():
    got = decisions([Corrupt(get=1)], [(0, 10), (10, 20), (20, 30)])
    assert [each.fault for each in got] == [None, Corrupt(get=1, byte=15), None]


def test_a_replaced_object_stays_so():
    script = Script([Replaced(byte=15)], 1)
    assert [script.decide(*each, 0).is_replaced for each in [(0, 10), (10, 20), (0, 10)]] == [
        False,
        True,
        True,
    ]
    assert script.is_replaced


def test_latency_and_closing_last_from_the_first_get_on():
    got = decisions([Latency(0.05), ClosedIdle()], [(0, 10), (10, 20)])
    assert got == [Decision(latency_s=0.05, closes=True)] * 2


def test_a_burst_of_503_lasts_as_long_as_it_says_and_then_is_over():
    burst = SlowDown(1.0, byte=15)
    got = decisions([burst], [(0, 10), (10, 20), (0, 10), (10, 20)], every_s=0.6)
    assert [each.slow_down for each in got] == [None, burst, burst, None]


def test_a_share_of_the_gets_is_refused_and_the_seed_says_which():
    plan, ranges = [SlowDown(1.0, share=0.25, get=0)], [(0, 10)] * 400
    refused = [each.slow_down is not None for each in decisions(plan, ranges)]
    assert 70 <= sum(refused) <= 130
    assert refused == [each.slow_down is not None for each in decisions(plan, ranges)]
    assert refused != [each.slow_down is not None for each in decisions(plan, ranges, seed=2)]


def test_a_fault_of_a_refused_get_waits_for_the_next():
    got = decisions([SlowDown(1.0, get=0), Reset(byte=5)], [(0, 10), (0, 10)], every_s=2.0)
    assert [each.fault for each in got] == [None, Reset(byte=5)]
