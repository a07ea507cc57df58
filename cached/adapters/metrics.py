"""What the daemon counts, and the table of all its metrics, ``ROWS``: docs/metrics.md as well.

Counting needs no library: prometheus_client is imported by the first scrape.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from cached.core import effects, errors, events
from cached.core.lifecycle import MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from cached.core.effects import Effect
    from cached.core.events import Event
    from cached.core.objects import PeerId, VersionRef

    Values = dict[tuple[str, ...], float]
    """By the values of the labels, in the order of the row."""

COUNTER, GAUGE, HISTOGRAM, INFO = "counter", "gauge", "histogram", "info"
OTHER = "other"
MAX_SERIES = 64  # of one counter: whatever comes, its labels are bounded
LOCAL = 0  # the peer that stands for the daemon itself

OPS = {"hello", "open", "descriptors", "wait", "arrivals", "check", "cancel"}
OPS |= {"status", "prefetch", "evict"}
STATES = (*MODEL, "freeing")
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
    _gauge("cached_model_bytes", "Bytes in memory of the current version.", "model", "state"),
    _gauge("cached_model_size_bytes", "Size of the current version, once it is known.", "model"),
    _gauge("cached_model_state", "1 for the state that the model is in.", "model", "state"),
    _gauge("cached_model_leases", "Leases held on it.", "model"),
    _counter("cached_model_opens_total", "Opens asked for, answered or not.", "model"),
    _gauge("cached_load_seconds", "Admission to publication of the current version.", "model"),
    _counter("cached_loads_total", "Versions published.", "model"),
    _counter("cached_loads_refused_total", "Loads that did not begin, or not end.", "code"),
    _counter("cached_evictions_total", "Versions taken out of memory.", "reason"),
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


class Histogram:
    """Observations counted by upper bound."""

    __slots__ = ("_buckets", "_counts", "sum")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one; a value that equals a bound belongs to it."""
        self._counts[bisect_left(self._buckets, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, int]]:
        """Return (upper bound, observations up to it) as the exposition wants them."""
        bounds = [*(str(float(bound)) for bound in self._buckets), "+Inf"]
        return list(zip(bounds, accumulate(tuple(self._counts)), strict=True))


class Metrics:
    """An Observer that counts in the mailbox thread; ``render`` may run in any other.

    Args:
        version: of the daemon.
        models: the configured names; nothing else becomes the label ``model``.
        probes: values of rows without labels, by name; asked at each scrape, in its thread.
    """

    def __init__(
        self,
        version: str,
        models: Iterable[str],
        probes: Mapping[str, Callable[[], float]] | None = None,
    ) -> None:
        self._info = (version, ".".join(map(str, sys.version_info[:3])))
        self._models = tuple(models)
        self._probes = dict(probes or {})
        self._counts: dict[str, Values] = {row.name: {} for row in ROWS}
        self._histograms = {row.name: Histogram(row.buckets) for row in ROWS if row.buckets}
        self._resident: set[VersionRef] = set()
        self._mapped: set[VersionRef] = set()
        self._resolving: dict[str, float] = {}
        self._opens: dict[PeerId, dict[int, tuple[float, bool]]] = {}
        self._awaiting: dict[PeerId, float] = {}  # opened, no weights yet: when it asked
        self._wake_at_s: float | None = None
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Let what is likely to be counted be there from the start, so that rates are right."""
        begun = (("cached_gets_in_flight",), ("cached_connections",), ("cached_gets_total", "206"))
        for name, *labels in begun:
            self._add(name, *labels, amount=0)
        for model in self._models:
            self._add("cached_fetch_bytes_total", model, amount=0)
            self._add("cached_loads_total", model, amount=0)
        for reason in ("budget", "asked", "failed", "stale"):
            self._add("cached_evictions_total", reason, amount=0)
        for result in ("hit", "miss"):
            self._add("cached_opens_total", result, amount=0)
        for why in (errors.BadReply, errors.StoreUnavailable):
            self._add("cached_retries_total", why.code, amount=0)

    def happened(self, event: Event, now_s: float) -> None:  # noqa: C901, PLR0912 - one row an event
        """Count an event."""
        self._add("cached_events_total", type(event).__name__)
        match event:
            case events.PartFetched():
                self._add("cached_gets_in_flight", amount=-1)
                self._add("cached_gets_total", "206")
                self._fetched(event.part.file.of.name, event.part.stop - event.part.start)
                self._histograms["cached_get_seconds"].observe(event.seconds)
            case events.PartFailed():
                self._add("cached_gets_in_flight", amount=-1)
                self._add("cached_gets_total", event.error.code)
                self._fetched(event.part.file.of.name, event.watermark - event.part.start)
            case events.Requested():
                self._requested(event, now_s)
            case events.Connected():
                self._add("cached_connections")
            case events.Disconnected():
                self._add("cached_connections", amount=-1)
                self._opens.pop(event.peer, None)
                self._awaiting.pop(event.peer, None)
            case events.Resolved() | events.ResolveFailed():
                began_s = self._resolving.pop(event.name, now_s)
                self._histograms["cached_resolve_seconds"].observe(now_s - began_s)
            case events.Published():
                self._resident.add(event.of)
                self._add("cached_loads_total", self._model(event.of.name))
            case events.StillMapped():
                self._mapped.add(event.of)
            case events.Freed():
                self._mapped.discard(event.of)
            case events.Ticked() if self._wake_at_s is not None:
                lag_s = max(0.0, now_s - self._wake_at_s)
                self._histograms["cached_mailbox_lag_seconds"].observe(lag_s)
                self._wake_at_s = None
            case _:
                pass

    def decided(self, effect: Effect, now_s: float) -> None:
        """Count an effect."""
        match effect:
            case effects.Reply():
                self._replied(effect, now_s)
            case effects.FetchPart():
                self._add("cached_gets_in_flight")
            case effects.Resolve():
                self._resolving[effect.ref.name] = now_s
            case effects.WakeAt():
                self._wake_at_s = effect.when_s
            case effects.Retried():
                self._add("cached_retries_total", effect.code)
            case effects.Refused():
                self._add("cached_loads_refused_total", effect.code)
            case effects.Evicted():
                self._resident.discard(effect.of)
                self._add("cached_evictions_total", effect.reason)
            case _:
                pass

    def render(self, status: Mapping[str, object], accept: str = "") -> tuple[bytes, str]:
        """Return the exposition and its content type.

        Args:
            status: the ``status`` reply of all models (docs/wire.md).
            accept: the header of the request: chooses between text and OpenMetrics.
        """
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder

        registry = CollectorRegistry()
        registry.register(_Scrape(list(self._families(status))))
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    def _families(self, status: Mapping[str, object]) -> Iterator[Metric]:
        from prometheus_client.metrics_core import Metric

        given = status_values(status, self._models)
        given |= {name: {(): probe()} for name, probe in self._probes.items()}
        given["cached_build_info"] = {self._info: 1}
        given["cached_versions_still_mapped"] = {(): len(self._mapped)}
        for row in ROWS:
            family = Metric(row.family, row.help, row.kind, row.unit)
            values = given.get(row.name) or dict(self._counts[row.name])
            for labels, value in values.items():
                family.add_sample(row.name, dict(zip(row.labels, labels, strict=True)), value)
            if row.buckets:
                histogram = self._histograms[row.name]
                sum_s, counts = histogram.sum, histogram.cumulative()
                for bound, count in counts:
                    family.add_sample(row.name + "_bucket", {"le": bound}, count)
                family.add_sample(row.name + "_count", {}, counts[-1][1])
                family.add_sample(row.name + "_sum", {}, sum_s)
            if family.samples:
                yield family

    def _add(self, name: str, *labels: str, amount: float = 1) -> None:
        values = self._counts[name]
        if labels not in values and len(values) >= MAX_SERIES:
            labels = (OTHER,) * len(labels)
        values[labels] = values.get(labels, 0) + amount

    def _model(self, name: str) -> str:
        return name if name in self._models else OTHER

    def _fetched(self, model: str, size_bytes: int) -> None:
        self._add("cached_fetch_bytes_total", self._model(model), amount=max(0, size_bytes))

    def _requested(self, event: events.Requested, now_s: float) -> None:
        if event.op == "open":
            model = event.fields.get("model")
            is_hit = any(of.name == model for of in self._resident)
            self._opens.setdefault(event.peer, {})[event.request_id] = (now_s, is_hit)

    def _replied(self, reply: effects.Reply, now_s: float) -> None:
        if reply.peer == LOCAL:
            return
        error = reply.body.get("error")
        result = str(error.get("code")) if isinstance(error, dict) else "ok"
        self._add("cached_requests_total", reply.op if reply.op in OPS else OTHER, result)
        if reply.op == "open":
            self._open_replied(reply, result, now_s)
        elif reply.op == "wait" and result == "ok" and reply.peer in self._awaiting:
            began_s = self._awaiting.pop(reply.peer)
            self._histograms["cached_first_tensor_seconds"].observe(now_s - began_s)

    def _open_replied(self, reply: effects.Reply, result: str, now_s: float) -> None:
        asked = self._opens.get(reply.peer, {}).pop(reply.request_id, None)
        if asked is None:
            return
        began_s, is_hit = asked
        if result != "ok":
            self._add("cached_opens_total", result)
            return
        self._add("cached_opens_total", "hit" if is_hit else "miss")
        self._histograms["cached_open_seconds"].observe(now_s - began_s)
        if reply.body.get("complete"):
            self._histograms["cached_first_tensor_seconds"].observe(now_s - began_s)
        else:
            self._awaiting[reply.peer] = began_s


class _Scrape:
    """What prometheus_client calls a collector."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def status_values(status: Mapping[str, object], models: Iterable[str]) -> dict[str, Values]:
    """Return the values of the rows that the status reply holds, by name of the row."""
    values: dict[str, Values] = {row.name: {} for row in ROWS}

    def put(name: str, value: object, *labels: str) -> None:
        if isinstance(value, int | float):
            values[name][labels] = value

    put("cached_uptime_seconds", status.get("uptime_s"))
    put("cached_ready", status.get("ready"))
    memory, listed = status.get("memory"), status.get("models")
    for key, value in memory.items() if isinstance(memory, dict) else ():
        if (name := f"cached_memory_{key}") in values:
            put(name, value)
    for model in listed if isinstance(listed, list) else ():
        name, state = model["name"], model["state"]
        if name not in models:
            continue
        put("cached_model_bytes", model["committed_bytes"], name, state)
        put("cached_model_size_bytes", model["size_bytes"], name)
        put("cached_model_leases", model["leases"], name)
        put("cached_model_opens_total", model["opens"], name)
        put("cached_load_seconds", model["load_s"], name)
        for each in STATES:
            put("cached_model_state", each == state, name, each)
    put("cached_leases", sum(values["cached_model_leases"].values()))
    return values


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
written by `make docs` from the table in `cached/adapters/metrics.py`.

Models are labelled by their configured names, errors by their codes (`cached/core/errors.py`).
Stable metrics change only with a major version, experimental ones at any time.

| metric | type | labels | unit | stability | what it tells |
|---|---|---|---|---|---|
"""
