"""Rows hold the statistics of their samples, and a result comes back as it was written."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import record
from bench.record import Row, Samples

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = {"case", "subject", "metric", "unit", "n", "median", "min", "max"}


def samples(values: list[float]) -> Samples:
    return Samples("plain-512MiB-8", "cached", "MB_per_s", "MB/s", values)


@given(st.lists(st.floats(0.001, 1e6), min_size=1))
def test_a_row_is_the_median_and_the_ends_of_its_samples(values):
    row = record.row(samples(values))
    assert set(row) == KEYS
    assert row["n"] == len(values)
    assert row["min"] <= row["median"] <= row["max"]
    assert row["median"] == pytest.approx(statistics.median(values), rel=1e-4)
    assert (row["min"], row["max"]) == pytest.approx((min(values), max(values)), rel=1e-4)


def test_no_samples_are_no_row():
    with pytest.raises(ValueError, match="no samples of MB_per_s for cached in plain-512MiB-8"):
        record.row(samples([]))


def test_a_result_names_its_machine_command_and_workload(tmp_path):
    run = record.Run("attach", "python -m bench.attach", "what is done", True, {"numpy": "2.4"})
    path = record.keep(run, [record.row(samples([1.0, 3.0]))], tmp_path)
    result = record.read(path)
    assert path == tmp_path / "attach.json"
    assert (result["command"], result["workload"], result["quick"]) == (*run[1:3], True)
    assert result["machine"]["cores"] >= 1
    assert result["commit"]
    assert result["rows"][0]["median"] == 2.0


def test_a_run_that_fails_leaves_the_result_before_it(tmp_path):
    def rows() -> Iterator[Row]:
        yield record.row(samples([1.0]))
        raise OSError("the server is gone")

    (tmp_path / "fetch.json").write_text("before")
    with pytest.raises(OSError, match="gone"):
        record.keep(record.Run("fetch", "", "", False, {}), rows(), tmp_path)
    assert (tmp_path / "fetch.json").read_text() == "before"
