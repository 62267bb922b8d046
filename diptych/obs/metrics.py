"""Prometheus metrics of one server, under SGLang's base names (docs/metrics.md lists them).

Two sources. The engine's `Stats` are kept as they come (`update` costs nothing) and become samples when somebody
scrapes; what only the API process can see (first token, time between tokens, HTTP) is counted here as it happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diptych.types import ModelInfo, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 60, 120, 300, 600)
_ITL_S = (
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1,
    2,
)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_MS = (0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 30000)
_GB_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MB = (0.1, 0.5, 1, 4, 16, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Spec:
    """One metric: base name, kind, help, and the field of Stats that it shows ("" when it is counted here)."""

    name: str
    kind: str  # gauge | counter | histogram
    help: str
    field: str = ""
    buckets: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()  # besides model_name, engine_type, tp_rank


def _gauge(name: str, help: str, field: str = "") -> Spec:
    return Spec(name, "gauge", help, field or name)


def _counter(name: str, help: str) -> Spec:
    return Spec(name, "counter", help, name)


def _histogram(name: str, help: str, buckets: tuple[float, ...], field: str = "") -> Spec:
    return Spec(name, "histogram", help, field, buckets)


ENGINE: tuple[Spec, ...] = (
    _gauge("num_running_reqs", "Requests that are decoding or prefilling."),
    _gauge("num_queue_reqs", "Requests that wait for their first step."),
    _gauge("num_retracted_reqs", "Requests that wait again after a preemption."),
    _gauge("num_used_tokens", "Tokens in the KV pool that requests hold."),
    _gauge("kv_used_tokens", "Tokens in the KV pool that requests hold.", "num_used_tokens"),
    _gauge("kv_evictable_tokens", "Tokens in the KV pool that only the prefix cache holds.", "evictable_tokens"),
    _gauge("gen_throughput", "Tokens generated per second, lately."),
    _gauge("cache_hit_rate", "Part of the prompt tokens that came from the prefix cache, since the start."),
    _gauge("max_total_num_tokens", "Tokens the KV pool can hold."),
    _gauge("page_size", "Tokens a KV page holds."),
    _gauge("num_pages", "Pages of the KV pool."),
    _gauge("num_prefill_bootstrap_queue_reqs", "Prefill: requests that wait for the decode server's pages."),
    _gauge("num_prefill_inflight_queue_reqs", "Prefill: requests whose pages are on their way."),
    _gauge("num_decode_prealloc_queue_reqs", "Decode: requests that wait for pages."),
    _gauge("num_decode_transfer_queue_reqs", "Decode: requests whose pages are arriving."),
    _counter("prompt_tokens_total", "Prompt tokens of admitted requests."),
    _counter("generation_tokens_total", "Tokens generated."),
    _counter("cached_tokens_total", "Prompt tokens that came from the prefix cache."),
    _counter("num_aborted_requests_total", "Requests that were aborted."),
    _counter("num_retractions_total", "Preemptions."),
    _counter("evicted_tokens_total", "Tokens evicted from the prefix cache."),
    Spec("forward_execution_seconds_total", "counter", "Seconds spent in forward passes.", "forward_seconds_total"),
    Spec("steps_total", "counter", "Steps of the engine.", "steps_total"),
    _counter("num_eager_decode_steps_total", "Decode steps that no CUDA graph took, where there are graphs."),
    _counter("num_bootstrap_failed_reqs_total", "Hand-overs that failed before pages moved."),
    _counter("num_transfer_failed_reqs_total", "Hand-overs that failed while pages moved."),
    _counter("kv_pages_sent_total", "KV pages sent to decode servers, whatever the number of ranks."),
    _counter("kv_pages_received_total", "KV pages received from prefill servers, whatever the number of ranks."),
    _counter("kv_bytes_sent_total", "Bytes of KV that all ranks sent to decode servers."),
    _counter("kv_bytes_received_total", "Bytes of KV that all ranks received from prefill servers."),
    _histogram("queue_time_seconds", "Wait before the first step.", _LATENCY_S, "queue_time_s"),
    _histogram(
        "kv_transfer_latency_ms", "From the first to the last page of a hand-over.", _MS, "kv_transfer_latency_ms"
    ),
    _histogram("kv_transfer_speed_gb_s", "Speed of a hand-over.", _GB_S, "kv_transfer_speed_gb_s"),
    _histogram(
        "kv_transfer_bootstrap_ms",
        "From a request's arrival to its pages' reservation.",
        _MS,
        "kv_transfer_bootstrap_ms",
    ),
    _histogram("kv_transfer_alloc_ms", "Wait of a decode server for free pages.", _MS, "kv_transfer_alloc_ms"),
    _histogram("kv_transfer_total_mb", "Size of a hand-over.", _MB, "kv_transfer_total_mb"),
)
DERIVED: tuple[Spec, ...] = (
    Spec("token_usage", "gauge", "Used part of the KV pool, 0 to 1."),
    Spec("kv_available_tokens", "gauge", "Tokens the KV pool can still take, the evictable ones included."),
    Spec("cache_config_info", "gauge", "Always 1; its labels describe the KV pool.", labels=("page_size", "num_pages")),
)
LOCAL: tuple[Spec, ...] = (
    Spec("num_requests_total", "counter", "Requests that finished, by themselves or by an error."),
    _histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _LATENCY_S),
    _histogram("inter_token_latency_seconds", "Time between tokens.", _ITL_S),
    _histogram("request_time_per_output_token_seconds", "A request's mean time per token after the first.", _ITL_S),
    _histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _LATENCY_S),
    _histogram("prompt_tokens_histogram", "Prompt tokens of a request.", _TOKENS),
    _histogram("uncached_prompt_tokens_histogram", "Prompt tokens of a request that had to be computed.", _TOKENS),
    _histogram("generation_tokens_histogram", "Tokens generated for a request.", _TOKENS),
    Spec("http_requests_total", "counter", "HTTP requests that arrived.", labels=("method", "endpoint")),
    Spec("http_responses_total", "counter", "HTTP replies.", labels=("method", "endpoint", "status_code")),
    Spec("http_requests_active", "gauge", "HTTP requests being answered.", labels=("method", "endpoint")),
    Spec("startup_time_seconds", "gauge", "From the start of the process to readiness."),
    Spec("weight_memory_usage_gb", "gauge", "Size of the weights."),
    Spec("context_len", "gauge", "Longest sequence served."),
)
ALL = (*ENGINE, *DERIVED, *LOCAL)
_LABELS = ("model_name", "engine_type", "tp_rank")


class ServerMetrics:
    """One registry. `engine_type`: unified, prefill or decode."""

    def __init__(self, prefix: str, model_name: str, engine_type: str) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._prefix = prefix
        self._values = (model_name, engine_type, "0")
        self._sampled: list[tuple[str, Histogram]] = []  # field of Stats, histogram
        for spec in ENGINE:
            if spec.kind == "histogram":
                self._sampled.append((spec.field, self._make_histogram(spec)))
        local = {spec.name: spec for spec in LOCAL}
        self._ttft = self._make_histogram(local["time_to_first_token_seconds"])
        self._itl = self._make_histogram(local["inter_token_latency_seconds"])
        self._tpot = self._make_histogram(local["request_time_per_output_token_seconds"])
        self._e2e = self._make_histogram(local["e2e_request_latency_seconds"])
        self._prompt = self._make_histogram(local["prompt_tokens_histogram"])
        self._uncached = self._make_histogram(local["uncached_prompt_tokens_histogram"])
        self._generation = self._make_histogram(local["generation_tokens_histogram"])
        self._requests = self._make_counter(local["num_requests_total"]).labels(*self._values)
        self._http = self._make_counter(local["http_requests_total"])
        self._replies = self._make_counter(local["http_responses_total"])
        self._active = self._make_gauge(local["http_requests_active"])
        self._startup = self._make_gauge(local["startup_time_seconds"]).labels(*self._values)
        self._weights = self._make_gauge(local["weight_memory_usage_gb"]).labels(*self._values)
        self._context = self._make_gauge(local["context_len"]).labels(*self._values)
        self._stats = _StatsCollector(prefix, self._values)
        self.registry.register(self._stats)

    # ---- fed by the engine ----

    def update(self, stats: Stats) -> None:
        """Take the engine's latest report. Must see every report: samples are those since the last one."""
        self._stats.latest = stats
        for field, histogram in self._sampled:
            for sample in getattr(stats, field):
                histogram.observe(sample)

    def started(self, model: ModelInfo, startup_s: float) -> None:
        self._startup.set(startup_s)
        self._weights.set(model.weight_bytes / 1e9)
        self._context.set(model.context_len)

    # ---- fed by the service ----

    def tokens(self, count: int, gap_s: float, *, first: bool) -> None:
        """`count` tokens of a request came `gap_s` after its arrival (`first`) or after its last ones."""
        if first:
            self._ttft.observe(gap_s)
            return
        each = gap_s / count
        for _ in range(count):
            self._itl.observe(each)

    def finished(self, prompt_tokens: int, cached_tokens: int, generated: int, e2e_s: float, decode_s: float) -> None:
        """A request ended well; `decode_s` is the time from its first token to its last."""
        self._requests.inc()
        self._e2e.observe(e2e_s)
        self._prompt.observe(prompt_tokens)
        self._uncached.observe(prompt_tokens - cached_tokens)
        self._generation.observe(generated)
        if generated > 1:
            self._tpot.observe(decode_s / (generated - 1))

    def failed(self) -> None:
        """A request ended with an error or was aborted; the engine counts its reason."""
        self._requests.inc()

    # ---- fed by the HTTP layer ----

    def http_started(self, method: str, endpoint: str) -> None:
        self._http.labels(*self._values, method, endpoint).inc()
        self._active.labels(*self._values, method, endpoint).inc()

    def http_ended(self, method: str, endpoint: str, status: int) -> None:
        self._active.labels(*self._values, method, endpoint).dec()
        self._replies.labels(*self._values, method, endpoint, str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    # ---- making ----

    def _make_histogram(self, spec: Spec) -> Histogram:
        made = Histogram(self._prefix + spec.name, spec.help, _LABELS, buckets=spec.buckets, registry=self.registry)
        return made.labels(*self._values)

    def _make_counter(self, spec: Spec) -> Counter:
        name = self._prefix + spec.name.removesuffix("_total")
        return Counter(name, spec.help, (*_LABELS, *spec.labels), registry=self.registry)

    def _make_gauge(self, spec: Spec) -> Gauge:
        return Gauge(self._prefix + spec.name, spec.help, (*_LABELS, *spec.labels), registry=self.registry)


class _StatsCollector(Collector):
    """The engine's latest report as metrics, made when somebody asks."""

    def __init__(self, prefix: str, values: tuple[str, ...]) -> None:
        self._prefix = prefix
        self._values = values
        self.latest = Stats()

    def collect(self) -> Iterator[Metric]:
        stats = self.latest
        for spec in ENGINE:
            if spec.kind != "histogram":
                yield self._family(spec, getattr(stats, spec.field))
        derived = {spec.name: spec for spec in DERIVED}
        total = stats.max_total_num_tokens
        yield self._family(derived["token_usage"], stats.num_used_tokens / total if total else 0.0)
        free = stats.free_pages * stats.page_size + stats.evictable_tokens
        yield self._family(derived["kv_available_tokens"], free)
        yield self._family(derived["cache_config_info"], 1.0, (str(stats.page_size), str(stats.num_pages)))

    def describe(self) -> Iterable[Metric]:
        return []

    def _family(self, spec: Spec, value: float, extra: tuple[str, ...] = ()) -> Metric:
        labels = (*_LABELS, *spec.labels)
        kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
        name = self._prefix + (spec.name.removesuffix("_total") if spec.kind == "counter" else spec.name)
        family = kind(name, spec.help, labels=labels)
        family.add_metric((*self._values, *extra), value)
        return family


def table() -> str:
    """The metrics as a Markdown table, for docs/metrics.md."""
    rows = ["| name | kind | labels of its own | meaning |", "|---|---|---|---|"]
    for spec in sorted(ALL, key=lambda spec: spec.name):
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        rows.append(f"| `{spec.name}` | {spec.kind} | {labels} | {spec.help} |")
    return "\n".join(rows) + "\n"
