"""A status reply becomes gauges, of the configured models only."""

from __future__ import annotations

from cached.adapters.metrics.status import status_values
from tests.fakes.status import STATUS


def test_the_status_becomes_gauges():
    values = status_values(STATUS, ["llm", "clip"])
    found = {(name, key): value for name, row in values.items() for key, value in row.items()}
    assert found["cached_model_bytes", ("llm", "resident")] == 1000
    assert found["cached_model_bytes", ("clip", "absent")] == 0
    assert found["cached_model_size_bytes", ("llm",)] == 1000
    assert ("cached_model_size_bytes", ("clip",)) not in found
    assert found["cached_leases", ()] == 2
    assert found["cached_model_leases", ("llm",)] == 2
    assert found["cached_model_opens_total", ("llm",)] == 3
    assert found["cached_memory_budget_bytes", ()] == 8000
    assert found["cached_memory_free_bytes", ()] == 6900
    assert found["cached_memory_reserved_bytes", ()] == 100
    assert found["cached_ready", ()] == 1
    states = {key[1]: value for key, value in found.items() if key[0] == "cached_model_state"}
    assert len(states) == 2 * 8
    assert [key for key, value in states.items() if value] == [
        ("llm", "resident"),
        ("clip", "absent"),
    ]


def test_versions_are_counted_by_state():
    found = status_values(STATUS, ["llm", "clip"])["cached_versions"]
    assert found == {
        ("llm", "current"): 1,
        ("llm", "loading"): 0,
        ("llm", "kept"): 2,
        ("llm", "leaving"): 0,
        ("clip", "current"): 0,
        ("clip", "loading"): 0,
        ("clip", "kept"): 0,
        ("clip", "leaving"): 0,
    }


def test_a_model_that_is_not_configured_has_no_values():
    found = status_values(STATUS, ["clip"])
    assert {key[0] for values in found.values() for key in values if key} == {"clip"}
