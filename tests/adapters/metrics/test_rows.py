"""The table follows the naming rules, and the page shows all of it."""

from __future__ import annotations

from cached.adapters.metrics import reference
from cached.adapters.metrics.rows import ROWS


def test_names_follow_the_convention():
    for row in ROWS:
        assert row.name.startswith("cached_")
        assert row.name.endswith("_total") == (row.kind == "counter")
        assert row.help.endswith(".")
        assert row.buckets == tuple(sorted(row.buckets))
        assert (row.kind == "histogram") == bool(row.buckets)
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_the_reference_page_has_every_row_and_bucket():
    page = reference()
    for row in ROWS:
        assert f"| `{row.name}` | {row.kind} |" in page
    assert "| `cached_model_bytes` | gauge | `model`, `state` | bytes | stable |" in page
    assert "- `cached_open_seconds`: 0.0005, 0.001," in page
    assert page.endswith("\n")
