"""Figures against plain references."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from diptych.bench.sample import Meter, Sample
from diptych.bench.stats import (
    client_figures,
    describe,
    goodput,
    meets,
    parse_slo,
    peak_overlap,
    peak_per_second,
    summarize,
    token_times,
)
from diptych.errors import ConfigError


def linear_percentile(values: list[float], p: float) -> float:
    """The definition, written out: linear between the two closest ranks."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * p / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@pytest.mark.parametrize("num", [1, 2, 7, 100, 1001])
def test_describe_agrees_with_the_definitions(num: int) -> None:
    rng = random.Random(num)
    values = [rng.expovariate(20) for _ in range(num)]
    figures = describe("itl", values)
    ms = [value * 1e3 for value in values]
    assert figures["mean_itl_ms"] == pytest.approx(statistics.fmean(ms))
    assert figures["median_itl_ms"] == pytest.approx(statistics.median(ms))
    assert figures["std_itl_ms"] == pytest.approx(statistics.pstdev(ms), abs=1e-9)
    for p in (90, 95, 99):
        assert figures[f"p{p}_itl_ms"] == pytest.approx(linear_percentile(ms, p))


def test_describe_of_nothing_has_every_name_and_no_value() -> None:
    figures = describe("ttft", [])
    assert set(figures) == {f"{s}_ttft_ms" for s in ("mean", "median", "std", "p90", "p95", "p99")}
    assert set(figures.values()) == {None}


def test_meter_spreads_a_chunk_over_its_tokens() -> None:
    meter = Meter(10.0)
    meter.add(10.5, 1)
    meter.add(10.75, 1)
    meter.add(10.8, 0)  # carries no token: not timed
    meter.add(11.75, 4)
    assert meter.ttft_s == 0.5
    assert meter.itls_s == [0.25, 0.25, 0.25, 0.25, 0.25]
    assert (meter.num_tokens, meter.num_chunks) == (6, 3)


def test_meter_first_chunk_of_several_tokens_sets_the_ttft_only() -> None:
    meter = Meter(0.0)
    meter.add(1.0, 3)
    meter.add(2.0, 1)
    assert (meter.ttft_s, meter.itls_s, meter.num_tokens) == (1.0, [1.0], 4)


def make(start: float, ttft: float | None, itls: list[float], **more: object) -> Sample:
    latency = (ttft or 0.5) + sum(itls)
    tokens = len(itls) + 1
    fields = {"latency_s": latency, "output_tokens": tokens, "prompt_tokens": 10, "num_chunks": tokens, **more}
    return Sample(start_s=start, ttft_s=ttft, itls_s=itls, **fields)  # type: ignore[arg-type]


def test_tpot() -> None:
    assert make(0, 0.5, [0.1, 0.3]).tpot_s == pytest.approx(0.2)
    assert make(0, 0.5, []).tpot_s is None  # one token
    assert make(0, None, [], output_tokens=9).tpot_s is None  # not streamed


def test_summarize() -> None:
    samples = [
        make(100.0, 0.5, [0.25, 0.25], cached_tokens=4),
        make(100.5, 1.0, [0.5], cached_tokens=0),
        make(100.0, 0.1, [9.0], error="HTTP 429"),
        make(100.0, 0.1, [9.0], error="HTTP 429"),
        make(100.0, None, [], error="cannot connect"),
    ]
    figures = summarize(samples, 2.0, retokenized=6)
    assert figures["completed"] == 2
    assert figures["failed"] == 3
    assert figures["failures"] == {"HTTP 429": 2, "cannot connect": 1}
    assert figures["total_input_tokens"] == figures["total_input_text_tokens"] == 20
    assert figures["total_output_tokens"] == 5
    assert figures["total_output_tokens_retokenized"] == 6
    assert figures["request_throughput"] == 1.0
    assert figures["input_throughput"] == 10.0
    assert figures["output_throughput"] == 2.5
    assert figures["total_throughput"] == 12.5
    assert figures["mean_e2e_latency_ms"] == 1250.0
    assert figures["mean_ttft_ms"] == 750.0
    assert figures["mean_tpot_ms"] == pytest.approx(375.0)
    assert figures["mean_itl_ms"] == pytest.approx(1000 / 3)
    assert figures["max_itl_ms"] == 500.0
    assert figures["concurrency"] == 1.25
    assert figures["max_concurrent_requests"] == 2
    assert figures["max_output_tokens_per_s"] == 2  # tokens at 0.5, 0.75, 1.0 and at 1.5, 2.0
    assert figures["total_cached_tokens"] == 4
    assert figures["cache_hit_rate_pct"] == 20.0


def test_sglang_field_names_are_all_there() -> None:
    families = {
        f"{s}_{f}_ms"
        for s in ("mean", "median", "std", "p90", "p95", "p99")
        for f in ("e2e_latency", "ttft", "tpot", "itl")
    }
    names = families | {
        *("duration", "completed", "concurrency", "max_itl_ms"),
        *("total_input_tokens", "total_input_text_tokens", "total_input_vision_tokens"),
        *("total_output_tokens", "total_output_tokens_retokenized"),
        *("request_throughput", "input_throughput", "output_throughput", "total_throughput"),
        *("max_output_tokens_per_s", "max_concurrent_requests", "total_cached_tokens", "cache_hit_rate_pct"),
    }
    assert names <= set(summarize([], 1.0))


def test_nothing_succeeded() -> None:
    figures = summarize([make(0, None, [], error="HTTP 500")], 1.0)
    assert figures["completed"] == 0
    assert figures["output_throughput"] == 0.0
    assert figures["max_concurrent_requests"] == figures["max_output_tokens_per_s"] == 0


def test_peaks() -> None:
    assert peak_per_second([5.0, 5.5, 5.99, 6.0], 5.0) == 3
    assert peak_overlap([(0, 2), (1, 3), (2, 4)]) == 2  # an end at 2 comes before a start at 2
    assert peak_overlap([]) == 0
    rng = random.Random(1)
    spans = [(start, start + rng.random()) for start in (rng.random() * 9 for _ in range(60))]
    naive = max(sum(a <= start < b for a, b in spans) for start, _ in spans)
    assert peak_overlap(spans) == naive


def test_token_times() -> None:
    assert token_times(make(2.0, 0.5, [0.25, 0.25])) == [2.5, 2.75, 3.0]
    assert token_times(make(2.0, None, [])) == []


def test_slo_parsing() -> None:
    assert parse_slo(["ttft:2000", "tpot:25", "e2e:9000"]) == {"ttft": 2.0, "tpot": 0.025, "e2e": 9.0}
    for bad in ("ttft", "ttft:x", "itl:5", "tpot:-1", "tpot:nan"):
        with pytest.raises(ConfigError, match="--goodput"):
            parse_slo([bad])


def test_goodput_counts_every_request_that_was_sent() -> None:
    samples = [
        make(0, 0.5, [0.02]),
        make(0, 2.5, [0.02]),  # TTFT over
        make(0, 0.5, [0.03]),  # TPOT over
        make(0, 0.5, [0.01], error="HTTP 500"),
        make(0, 0.5, []),  # one token: no TPOT to exceed
    ]
    slo = parse_slo(["ttft:2000", "tpot:25"])
    assert [meets(sample, slo) for sample in samples] == [True, False, False, False, True]
    assert goodput(samples, 4.0, slo) == {
        "goodput_slo_ms": {"ttft": 2000.0, "tpot": 25.0},
        "request_goodput": 0.5,
        "goodput_pct": 40.0,
    }
    whole = make(0, None, [])
    assert not meets(whole, {"ttft": 9.0})
    assert meets(whole, {"e2e": 9.0})


def test_the_client_says_when_it_was_the_bottleneck() -> None:
    idle = client_figures([0.001] * 100, 0.5, 10.0, 1000)
    assert idle["client_cpu_us_per_chunk"] == 500.0
    assert idle["client_cpu_utilization"] == 0.05
    assert not idle["client_bottleneck"]
    assert client_figures([0.001] * 90 + [0.05] * 10, 0.5, 10.0, 1000)["client_bottleneck"]  # late
    assert client_figures([0.001] * 100, 9.5, 10.0, 1000)["client_bottleneck"]  # busy
    assert client_figures([], 0.1, 1.0, 0)["client_cpu_us_per_chunk"] is None
