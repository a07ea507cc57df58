"""What a process pays for ``import cached`` is compared in the same turn."""

from __future__ import annotations

import pytest

from bench import share


def test_imports_are_compared_turn_by_turn_with_and_without_what_an_open_needs(monkeypatch):
    taken_ms = {
        share.IMPORTS["cached"]: 5.0,
        share.IMPORTS["cached.open"]: 20.0,
        share.IMPORTS[share.BASELINE]: 10.0,
    }
    monkeypatch.setattr(share, "_import_once", taken_ms.__getitem__)
    rows = list(share._import(share.QUICK))
    assert {row["subject"]: row["median"] for row in rows if row["metric"] == "import_ratio"} == {
        "cached": 0.5,
        "cached.open": 2.0,
    }
    assert {row["subject"] for row in rows if row["metric"] == "import_ms"} == {*share.IMPORTS}


def test_a_statement_that_fails_is_no_sample():
    with pytest.raises(RuntimeError, match="import nothing_of_that_name"):
        share._import_once("import nothing_of_that_name")
