"""The table of all metrics, ``ROWS``: name, kind, labels and what each tells; docs/metrics.md."""

from __future__ import annotations

from typing import NamedTuple

COUNTER, GAUGE, HISTOGRAM, INFO = "counter", "gauge", "histogram", "info"
# From a warm open (0.2 ms) to a big model over a slow link.
OPEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GET_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5, 10, 30)
LAG_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)


class Row(NamedTuple):
    """One metric.

    Attributes:
        name: as exposed; of a histogram without its suffixes.
        kind: of the exposition format.
        help: what it tells.
        labels: their names.
        is_stable: changes only with a major version; else at any time.
        buckets: upper bounds of a histogram; +Inf is added.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    is_stable: bool = True
    buckets: tuple[float, ...] = ()

    @property
    def family(self) -> str:
        """The name without what its kind appends."""
        return self.name.removesuffix("_total").removesuffix("_info")

    @property
    def unit(self) -> str:
        """``seconds``, ``bytes``, or "" for a count or a flag."""
        last = self.family.rpartition("_")[2]
        return last if last in {"seconds", "bytes"} else ""


def _gauge(name: str, text: str, *labels: str, is_stable: bool = True) -> Row:
    return Row(name, GAUGE, text, labels, is_stable)


def _counter(name: str, text: str, *labels: str, is_stable: bool = True) -> Row:
    return Row(name, COUNTER, text, labels, is_stable)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *, is_stable: bool = True) -> Row:
    return Row(name, HISTOGRAM, text, (), is_stable, buckets)


ROWS = (
    Row("cached_build_info", INFO, "Which daemon this is.", ("version", "python")),
    _gauge("cached_uptime_seconds", "Since the daemon started."),
    _gauge("cached_ready", "1 once every model to be prefetched has been complete."),
    _gauge("cached_model_bytes", "Bytes in memory of its versions together.", "model", "state"),
    _gauge("cached_model_size_bytes", "Size of the current version, once it is known.", "model"),
    _gauge("cached_model_state", "1 for the state that the model is in.", "model", "state"),
    _gauge("cached_model_confirmed", "0: the store has not said yet that it is current.", "model"),
    _gauge("cached_model_leases", "Leases held on it.", "model"),
    _counter("cached_model_opens_total", "Opens asked for, answered or not.", "model"),
    _gauge("cached_load_seconds", "Admission to publication of the last load.", "model"),
    _counter("cached_loads_total", "Versions loaded; not what was in memory already.", "model"),
    _counter("cached_loads_refused_total", "Loads that did not begin, or not end.", "code"),
    _counter("cached_evictions_total", "Versions taken out of memory.", "reason"),
    _gauge("cached_versions", "In memory, the one that is current included.", "model", "state"),
    _gauge("cached_versions_still_mapped", "Out of use; their memory waits for the last mapping."),
    _gauge("cached_memory_budget_bytes", "What all models together may hold."),
    _gauge("cached_memory_free_bytes", "Of the budget: promised to nobody."),
    _gauge("cached_memory_reserved_bytes", "Of the budget: promised to loads, not there yet."),
    _gauge("cached_memory_committed_bytes", "Of the budget: on pages."),
    _gauge("cached_memory_leased_bytes", "Of the budget: under a lease."),
    _gauge("cached_process_private_bytes", "The daemon's own memory."),
    _counter("cached_process_cpu_seconds_total", "The daemon's CPU time."),
    _counter("cached_fetch_bytes_total", "Bytes fetched into segments.", "model"),
    _counter("cached_gets_total", "Ranged GETs that ended: 206, or the error's code.", "code"),
    _gauge("cached_gets_in_flight", "Ranged GETs under way."),
    _histogram("cached_get_seconds", "A whole ranged GET, from its request to its end.", GET_S),
    _counter("cached_retries_total", "GETs and listings tried again.", "reason"),
    _histogram("cached_resolve_seconds", "Listing a model's objects, errors included.", GET_S),
    _gauge("cached_window_gets", "Ranged GETs that may be under way at the moment."),
    _counter("cached_throttled_total", "GETs that the store refused as too many.", "model"),
    _counter("cached_hedges_total", "Second GETs for parts that brought nothing.", "model"),
    _counter(
        "cached_integrity_failures_total",
        "Bytes found wrong; algorithm header: a file began with none.",
        "model",
        "algorithm",
    ),
    _counter("cached_files_checked_total", "By which checksum; none: by length.", "algorithm"),
    _counter("cached_kms_without_bucket_key_total", "Files that cost KMS a call a GET.", "model"),
    _counter("cached_adopted_bytes_total", "Taken over from an earlier daemon.", "model"),
    _gauge("cached_connections", "Workers that are connected."),
    _counter("cached_connections_refused_total", "Closed at once: too many, or not permitted."),
    _counter("cached_frames_malformed_total", "Connections closed for breaking the protocol."),
    _counter("cached_replies_unread_total", "Connections closed for not reading their replies."),
    _gauge("cached_leases", "Leases held."),
    _counter("cached_requests_total", "Answered: ok, or the error's code.", "op", "result"),
    _counter("cached_opens_total", "Opens answered: hit, miss, or the error's code.", "result"),
    _histogram("cached_open_seconds", "From an open to its answer, errors excluded.", OPEN_S),
    _histogram("cached_first_tensor_seconds", "From an open to the first weights.", OPEN_S),
    _histogram("cached_mailbox_lag_seconds", "How late timers are.", LAG_S, is_stable=False),
    _counter("cached_events_total", "Events handled by the engine.", "event", is_stable=False),
    _gauge("cached_events_waiting", "Events in the mailbox.", is_stable=False),
    _counter("cached_log_lines_dropped_total", "Lines that stderr did not take at once."),
)


def reference() -> str:
    """Return docs/metrics.md."""
    lines = REFERENCE_HEAD.splitlines()
    for row in ROWS:
        labels = ", ".join(f"`{label}`" for label in row.labels)
        stability = "stable" if row.is_stable else "experimental"
        cells = (f"`{row.name}`", row.kind, labels, row.unit, stability, row.help)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Buckets of the histograms, in seconds:", ""]
    for row in ROWS:
        if row.buckets:
            lines.append(f"- `{row.name}`: {', '.join(f'{bound:g}' for bound in row.buckets)}")
    return "\n".join(lines) + "\n"


REFERENCE_HEAD = """\
# Metrics

`GET /metrics`, by default on 127.0.0.1:9400, as Prometheus text or OpenMetrics. This page is
written by `make docs` from the table in `cached/adapters/metrics/rows.py`.

Models are labelled by their configured names, errors by their codes (`cached/core/errors.py`).
Stable metrics change only with a major version, experimental ones at any time.

| metric | type | labels | unit | stability | what it tells |
|---|---|---|---|---|---|
"""
