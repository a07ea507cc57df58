"""What the daemon counts, and its exposition.

Counting needs no library: prometheus_client is imported by the first scrape.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from cached.adapters.metrics.rows import ROWS
from cached.adapters.metrics.status import status_values
from cached.core import effects, errors, events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from cached.adapters.metrics.status import Values
    from cached.core.effects import Effect
    from cached.core.events import Event
    from cached.core.objects import Part, PeerId, VersionRef

OTHER = "other"
MAX_SERIES = 64  # of one counter: whatever comes, its labels are bounded
LOCAL = 0  # the peer that stands for the daemon itself

OPS = {"hello", "open", "descriptors", "wait", "arrivals", "check", "cancel"}
OPS |= {"status", "prefetch", "evict", "refresh", "purge"}


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
        self._loading: dict[VersionRef, float] = {}  # since when
        self._hedged: dict[int, tuple[int, int]] = {}  # part → attempts under way, byte reached
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
                self._fetched(event.part, event.part.stop)
                self._histograms["cached_get_seconds"].observe(event.seconds)
            case events.PartFailed():
                self._add("cached_gets_in_flight", amount=-1)
                self._add("cached_gets_total", event.error.code)
                self._fetched(event.part, event.watermark)
                if isinstance(event.error, errors.StoreBusy):
                    self._add("cached_throttled_total", self._model(event.part.file.of.name))
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
                self._loaded(event.of, now_s)
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
            case effects.CreateSegments():
                self._loading[effect.of] = now_s
            case effects.FetchPart():
                self._add("cached_gets_in_flight")
                self._loading.setdefault(effect.part.file.of, now_s)
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
                self._loading.pop(effect.of, None)
                self._add("cached_evictions_total", effect.reason)
            case _:
                self._checked(effect)

    def _checked(self, effect: Effect) -> None:
        """Count what loads meet."""
        match effect:
            case effects.Hedged():
                self._hedged[effect.part.part_id] = (2, effect.part.start)
                self._add("cached_hedges_total", self._model(effect.part.file.of.name))
            case effects.Mismatched():
                model = self._model(effect.file.of.name)
                self._add("cached_integrity_failures_total", model, effect.algorithm)
            case effects.Looked():
                self._looked(effect)
            case effects.Adopted():
                model = self._model(effect.of.name)
                self._add("cached_adopted_bytes_total", model, amount=effect.there_bytes)
                self._loading.pop(effect.of, None)  # unless a GET shows that it is not all there
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

    def _fetched(self, part: Part, watermark: int) -> None:
        """Count the bytes of an attempt that ended; of a hedged part, when its last one has."""
        attempts, reached = self._hedged.pop(part.part_id, (1, part.start))
        watermark = max(watermark, reached)
        if attempts > 1:
            self._hedged[part.part_id] = (attempts - 1, watermark)
        else:
            model = self._model(part.file.of.name)
            self._add("cached_fetch_bytes_total", model, amount=max(0, watermark - part.start))

    def _loaded(self, of: VersionRef, now_s: float) -> None:
        """Count a load that ended; not what was in memory before."""
        began_s = self._loading.pop(of, None)
        if began_s is not None:
            model = self._model(of.name)
            self._add("cached_loads_total", model)
            self._counts["cached_load_seconds"][model,] = now_s - began_s

    def _looked(self, effect: effects.Looked) -> None:
        self._add("cached_files_checked_total", effect.algorithm or "none")
        if (effect.facts.encryption or "").startswith("aws:kms"):
            amount = 0 if effect.facts.has_bucket_key else 1
            model = self._model(effect.file.of.name)
            self._add("cached_kms_without_bucket_key_total", model, amount=amount)

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
