"""Figures from samples: pure arithmetic. Names as in SGLang's serving benchmark; percentiles are linear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diptych.bench.sample import Sample
from diptych.errors import ConfigError

SLO_NAMES = ("ttft", "tpot", "e2e")
_PERCENTILES = (90, 95, 99)
Figures = dict[str, Any]


def describe(name: str, seconds: Sequence[float]) -> Figures:
    """mean, median, std, p90, p95 and p99 of `seconds` as `<statistic>_<name>_ms`; None where there are none."""
    keys = ["mean", "median", "std", *(f"p{p}" for p in _PERCENTILES)]
    if not seconds:
        return {f"{key}_{name}_ms": None for key in keys}
    ms = np.asarray(seconds) * 1e3
    tails = np.percentile(ms, _PERCENTILES)
    values = [ms.mean(), np.median(ms), ms.std(), *tails]
    return {f"{key}_{name}_ms": float(value) for key, value in zip(keys, values, strict=True)}


def token_times(sample: Sample) -> list[float]:
    """When each token of a streamed sample arrived, on the client's clock."""
    if sample.ttft_s is None:
        return []
    steps = np.array([sample.start_s + sample.ttft_s, *sample.itls_s])
    return list(np.cumsum(steps))


def peak_per_second(times: Sequence[float], start_s: float) -> int:
    """Most of `times` that fall into one whole second counted from `start_s`."""
    if not times:
        return 0
    seconds = np.floor(np.asarray(times) - start_s).astype(np.int64)
    return int(np.unique(seconds, return_counts=True)[1].max())


def peak_overlap(intervals: Sequence[tuple[float, float]]) -> int:
    """Most intervals [start, end) that are open at one moment."""
    edges = sorted([(start, 1) for start, _ in intervals] + [(end, -1) for _, end in intervals])
    return int(np.cumsum([step for _, step in edges]).max()) if edges else 0


def parse_slo(items: Sequence[str]) -> dict[str, float]:
    """`["ttft:2000", "tpot:25"]` to `{"ttft": 2.0, "tpot": 0.025}` (milliseconds to seconds). Raises ConfigError."""
    slo: dict[str, float] = {}
    for item in items:
        name, _, text = item.partition(":")
        try:
            limit_ms = float(text)
        except ValueError:
            limit_ms = -1.0
        if name not in SLO_NAMES or not limit_ms >= 0:
            raise ConfigError(f"--goodput {item}: give {'|'.join(SLO_NAMES)} and milliseconds, such as ttft:2000")
        slo[name] = limit_ms / 1e3
    return slo


def meets(sample: Sample, slo: Mapping[str, float]) -> bool:
    """Whether a request succeeded within every limit (seconds). One not streamed cannot meet a TTFT or TPOT."""
    if sample.error:
        return False
    if sample.ttft_s is None and ("ttft" in slo or "tpot" in slo):
        return False
    measured = {"ttft": sample.ttft_s or 0.0, "tpot": sample.tpot_s or 0.0, "e2e": sample.latency_s}
    return all(measured[name] <= limit for name, limit in slo.items())


def goodput(samples: Sequence[Sample], duration_s: float, slo: Mapping[str, float]) -> Figures:
    """Requests per second within the SLO, and their share of all requests sent, failed ones included."""
    good = sum(meets(sample, slo) for sample in samples)
    return {
        "goodput_slo_ms": {name: limit * 1e3 for name, limit in slo.items()},
        "request_goodput": good / duration_s,
        "goodput_pct": 100.0 * good / len(samples),
    }


def summarize(samples: Sequence[Sample], duration_s: float, *, retokenized: int | None = None) -> Figures:
    """All figures of a run of `duration_s` seconds (> 0). Latencies and tokens are those of requests that succeeded.

    `retokenized`: output tokens counted by encoding the texts again, where a tokenizer was at hand.
    """
    done = [sample for sample in samples if not sample.error]
    total_input = sum(sample.prompt_tokens for sample in done)
    total_output = sum(sample.output_tokens for sample in done)
    itls = [itl for sample in done for itl in sample.itls_s]
    latencies = [sample.latency_s for sample in done]
    start_s = min((sample.start_s for sample in done), default=0.0)
    return {
        "duration": duration_s,
        "completed": len(done),
        "total_input_tokens": total_input,
        "total_input_text_tokens": total_input,
        "total_input_vision_tokens": 0,
        "total_output_tokens": total_output,
        "total_output_tokens_retokenized": retokenized,
        "request_throughput": len(done) / duration_s,
        "input_throughput": total_input / duration_s,
        "output_throughput": total_output / duration_s,
        "total_throughput": (total_input + total_output) / duration_s,
        **describe("e2e_latency", latencies),
        **describe("ttft", [sample.ttft_s for sample in done if sample.ttft_s is not None]),
        **describe("tpot", [sample.tpot_s for sample in done if sample.tpot_s is not None]),
        **describe("itl", itls),
        "max_itl_ms": max(itls) * 1e3 if itls else None,
        "concurrency": sum(latencies) / duration_s,
        "max_output_tokens_per_s": peak_per_second([t for s in done for t in token_times(s)], start_s),
        "max_concurrent_requests": peak_overlap([(s.start_s, s.start_s + s.latency_s) for s in done]),
        **_cache(done, total_input),
        "failed": len(samples) - len(done),
        "failures": dict(Counter(sample.error for sample in samples if sample.error).most_common()),
        "total_chunks": sum(sample.num_chunks for sample in samples),
    }


def _cache(done: Sequence[Sample], total_input: int) -> Figures:
    known = [sample.cached_tokens for sample in done if sample.cached_tokens is not None]
    if not known or not total_input:
        return {"total_cached_tokens": None, "cache_hit_rate_pct": None}
    return {"total_cached_tokens": sum(known), "cache_hit_rate_pct": 100.0 * sum(known) / total_input}


# The client shares the machine with what it measures: a wake-up this late, or a core this busy, is in the figures.
_LATE_MS = 10.0
_BUSY = 0.9


def client_figures(lags_s: Sequence[float], cpu_s: float, duration_s: float, num_chunks: int) -> Figures:
    """What the measuring itself cost, and whether it was the bottleneck.

    `lags_s`: how late the client's event loop woke up, sampled through the run. `cpu_s`: its CPU time, one process.
    """
    lag_ms = np.asarray(lags_s or [0.0]) * 1e3
    p99, worst = float(np.percentile(lag_ms, 99)), float(lag_ms.max())
    busy = cpu_s / duration_s
    return {
        "client_cpu_s": cpu_s,
        "client_cpu_utilization": busy,
        "client_cpu_us_per_chunk": cpu_s * 1e6 / num_chunks if num_chunks else None,
        "client_p99_loop_lag_ms": p99,
        "client_max_loop_lag_ms": worst,
        "client_bottleneck": p99 > _LATE_MS or busy > _BUSY,
    }
