"""What operators see of the router. Counting is plain arithmetic; names and labels are put together when someone asks.

Names are those of SGLang's gateway where it has them.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from diptych.router.fleet import Fleet
from diptych.router.limits import Gate, Hold, Line

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"


class Histogram:
    """Counts of values by upper bound."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(SECONDS, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus has them."""
        found, sum_ = [], 0
        for bound, count in zip([*map(str, SECONDS), "+Inf"], self.counts, strict=True):
            sum_ += count
            found.append((bound, float(sum_)))
        return found


class RouterMetrics:
    """The router's counters. `routes`: paths that get a label of their own, so that clients cannot make up labels."""

    def __init__(self, routes: Iterable[str]) -> None:
        self._routes = frozenset(routes)
        self.responses: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.durations: dict[str, Histogram] = {}
        self.first_parts: dict[str, Histogram] = {}
        self.retries = 0
        self.retries_exhausted = 0
        self.retries_over_budget = 0
        self.given_up = 0
        self.broken_streams = 0
        self.disconnects = 0
        self.fallbacks = 0

    def label(self, route: str) -> str:
        return route if route in self._routes else OTHER

    def served(self, route: str, arrived_at: float, first_at: float | None, now: float) -> None:
        """A request has been answered by servers; `first_at`: when its stream began, if it was one."""
        label = self.label(route)
        durations = self.durations.get(label)
        if durations is None:
            durations = self.durations[label] = Histogram()
            self.first_parts[label] = Histogram()
        durations.observe(now - arrived_at)
        if first_at is not None:
            self.first_parts[label].observe(first_at - arrived_at)

    def responded(self, route: str, status: int) -> None:
        """An answer has ended, whoever gave it."""
        self.responses[self.label(route), status] += 1


class _RouterCollector(Collector):
    def __init__(self, metrics: RouterMetrics, fleet: Fleet, gate: Gate, hold: Hold, alone: Line) -> None:
        self._metrics = metrics
        self._fleet = fleet
        self._gate = gate
        self._hold = hold
        self._alone = alone

    def collect(self) -> Iterable[Metric]:
        yield from self._requests()
        yield from self._workers()
        yield GaugeMetricFamily("smg_router_requests_active", "requests being served", self._gate.num_inside)
        yield GaugeMetricFamily("smg_router_requests_queued", "requests waiting for a place", self._gate.num_waiting)
        yield GaugeMetricFamily("diptych_router_requests_held", "requests waiting for a server", self._hold.num_held)
        suspects = "requests that may be deadly, waiting to be tried alone"
        yield GaugeMetricFamily("diptych_router_suspects_waiting", suspects, self._alone.num_waiting)
        yield GaugeMetricFamily("diptych_router_ready", "1 with a healthy server of each role", int(self._fleet.ready))

    def _requests(self) -> Iterable[Metric]:
        metrics = self._metrics
        responses = CounterMetricFamily("smg_router_requests", "answers to clients", labels=("route", "status_code"))
        errors = CounterMetricFamily("smg_router_request_errors", "answers >= 400", labels=("route", "status_code"))
        for (route, status), count in metrics.responses.items():
            responses.add_metric((route, str(status)), count)
            if status >= 400:
                errors.add_metric((route, str(status)), count)
        yield from (responses, errors)
        for name, text, histograms in (
            ("smg_router_request_duration_seconds", "from arrival to the end of the answer", metrics.durations),
            ("smg_router_ttft_seconds", "from arrival to the first part of the answer", metrics.first_parts),
        ):
            family = HistogramMetricFamily(name, text, labels=("route",))
            for route, histogram in histograms.items():
                family.add_metric((route,), histogram.buckets(), histogram.total)
            yield family
        for name, text, value in (
            ("smg_worker_retries", "attempts after the first", metrics.retries),
            ("smg_worker_retries_exhausted", "requests that failed after their last retry", metrics.retries_exhausted),
            ("diptych_router_retries_over_budget", "retries that the budget forbade", metrics.retries_over_budget),
            ("diptych_router_given_up", "requests that servers died of, as far as is known", metrics.given_up),
            ("diptych_router_broken_streams", "streams whose server was lost", metrics.broken_streams),
            ("diptych_router_prefill_fallbacks", "requests that a decode server prefilled itself", metrics.fallbacks),
            ("diptych_router_client_disconnects", "clients that left before their answer ended", metrics.disconnects),
        ):
            yield CounterMetricFamily(name, text, value)

    def _workers(self) -> Iterable[Metric]:
        now = asyncio.get_running_loop().time()
        labels = ("worker_type", "worker")
        for name, text, value in (
            ("smg_worker_health", "1: gets requests", lambda s: int(s.healthy)),
            ("smg_worker_requests_active", "requests in flight", lambda s: s.num_requests),
            ("diptych_router_prompt_bytes_active", "bytes of requests in flight", lambda s: s.prompt_bytes),
            ("smg_worker_cb_state", "circuit: 0 closed, 1 open, 2 half open", lambda s: int(s.breaker.state(now))),
        ):
            yield self._per_worker(GaugeMetricFamily(name, text, labels=labels), value)
        for name, text, value in (
            ("smg_worker_selection", "times chosen", lambda s: s.num_selected),
            ("smg_worker_errors", "failures it was to blame for", lambda s: s.num_failed),
        ):
            yield self._per_worker(CounterMetricFamily(name, text, labels=labels), value)
        checks = CounterMetricFamily("smg_worker_health_checks", "health checks", labels=(*labels, "result"))
        for server in self._fleet.servers:
            for ok, count in server.checks.items():
                checks.add_metric((server.role, server.address.url, "success" if ok else "failure"), count)
        yield checks

    def _per_worker(self, family: GaugeMetricFamily | CounterMetricFamily, value: object) -> Metric:
        assert callable(value)
        for server in self._fleet.servers:
            family.add_metric((server.role, server.address.url), value(server))
        return family


class Exposition:
    """The text that Prometheus reads."""

    def __init__(self, metrics: RouterMetrics, fleet: Fleet, gate: Gate, hold: Hold, alone: Line) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_RouterCollector(metrics, fleet, gate, hold, alone))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)
