"""What long prompts do to running streams, and what a hand-over adds to the time to first token."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gpu.served import Served
from benchmarks.gpu.topology import Topology
from diptych.bench.backends import Generate, Options
from diptych.bench.client import Client
from diptych.bench.dataset import Row
from diptych.bench.load import LagWatch
from diptych.bench.sample import Sample
from diptych.bench.stats import token_times
from diptych.testing.processes import metrics

ALONE = 200  # output tokens of each stream while nothing else runs
SPARE = 1.3  # streams are so much longer than the long prompts are kept up, so that none ends before
LONG_OUTPUT = 8  # output tokens of a long prompt
AT_ONCE = 2  # long prompts under way: one is computed, the next is there already


@dataclass(frozen=True)
class TailLoad:
    streams: int
    stream_prompt: int
    long_prompt: tuple[int, int]
    seconds: float  # for which long prompts are kept up
    vocab: int


def row(rng: np.random.Generator, length: int, output_len: int, vocab: int) -> Row:
    return Row(
        prompt=[int(token) for token in rng.integers(vocab, size=length)], prompt_len=length, output_len=output_len
    )


async def tail(url: str, load: TailLoad, seed: int) -> dict[str, Any]:
    """ITL of the streams by themselves, then while one long prompt after the other is computed."""
    rng = np.random.default_rng(seed)

    def streams(output_len: int) -> list[Row]:
        return [row(rng, load.stream_prompt, output_len, load.vocab) for _ in range(load.streams)]

    async with Client(url, Generate(), Options()) as client, LagWatch() as lag:
        alone = await asyncio.gather(*(client.send(one) for one in streams(ALONE)))
        check(alone)
        after_all = max(sample.start_s + (sample.ttft_s or 0.0) for sample in alone)  # all streams decode
        itls_alone = itls_within(alone, after_all, min(sample.start_s + sample.latency_s for sample in alone))
        median_s = statistics.median(itls_alone)
        first_s = max(sample.ttft_s or 0.0 for sample in alone)
        length = int((first_s + load.seconds) * SPARE / median_s)
        running = [asyncio.create_task(client.send(one)) for one in streams(length)]
        await asyncio.sleep(first_s * SPARE)
        begun_s = time.perf_counter()
        longs: list[Sample] = []

        async def keep_up(own: np.random.Generator) -> None:
            while time.perf_counter() < begun_s + load.seconds and not any(task.done() for task in running):
                size = int(own.integers(load.long_prompt[0], load.long_prompt[1] + 1))
                longs.append(await client.send(row(own, size, LONG_OUTPUT, load.vocab)))

        await asyncio.gather(*(keep_up(own) for own in rng.spawn(AT_ONCE)))
        ended_s = time.perf_counter()
        beside = await asyncio.gather(*running)
    check([*beside, *longs])
    first = max(begun_s, *(sample.start_s + (sample.ttft_s or 0.0) for sample in beside))
    last = min(ended_s, *(sample.start_s + sample.latency_s for sample in beside))
    found = itls_within(beside, first, last)
    return {
        "streams": load.streams,
        "long_prompts": len(longs),
        "long_prompt_tokens": sum(sample.prompt_tokens for sample in longs),
        "beside_s": round(last - first, 2),
        "alone": spread_ms(itls_alone),
        "beside": spread_ms(found),
        "p99_over_median": round(float(np.percentile(found, 99)) / statistics.median(found), 3),
        "long_ttft_ms": spread_ms([sample.ttft_s or 0.0 for sample in longs]),
        "client_max_lag_ms": round(max(lag.lags_s) * 1e3, 2),
        "client_p99_lag_ms": round(float(np.percentile(lag.lags_s, 99)) * 1e3, 2),
    }


def check(samples: Sequence[Sample]) -> None:
    if failed := next((sample.error for sample in samples if sample.error), ""):
        raise RuntimeError(f"a request failed: {failed}")


def itls_within(samples: Sequence[Sample], first_s: float, last_s: float) -> list[float]:
    """Inter-token latencies between two moments of the client's clock. Raises RuntimeError if there are none."""
    found = [
        end - start
        for sample in samples
        for start, end in itertools.pairwise(token_times(sample))
        if start >= first_s and end <= last_s
    ]
    if not found:
        raise RuntimeError("no stream made two tokens in that time: let it run longer")
    return found


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    p50, p99 = np.percentile(seconds, [50, 99])
    figures = {"count": len(seconds), "p50": p50 * 1e3, "p99": p99 * 1e3, "max": max(seconds) * 1e3}
    return {key: round(float(value), 3) for key, value in figures.items()}


# ---- the hand-over -----------------------------------------------------------------------------------------------


def _forward_s(servers: Sequence[Served]) -> float:
    """Seconds that these servers have spent in steps."""
    return sum(server.info()["internal_states"][0]["forward_seconds_total"] for server in servers)


def _transfers(servers: Sequence[Served]) -> dict[str, float]:
    """Sums and counts of what servers say of their hand-overs."""
    found: dict[str, float] = {}
    for server in servers:
        for name, value in metrics(server.process.get("/metrics")).items():
            key = name.rpartition(":")[2]
            if key.startswith(("kv_transfer_", "kv_bytes_")):
                found[key] = found.get(key, 0.0) + value
    return found


async def first_tokens(topology: Topology, lengths: Sequence[int], reps: int, vocab: int, seed: int) -> list[Any]:
    """TTFT of one prompt at a time on idle servers, beside the time its prefill server computed; by length.

    A hand-over needs an answer of two tokens; a unified server is asked for one, so that it computes no other step.
    """
    rng = np.random.default_rng(seed)
    prefill, output_len = topology.of("p", "u"), 2 if topology.of("d") else 1
    found = []
    async with Client(topology.url, Generate(), Options()) as client:
        for length in lengths:
            ttfts, computes, before = [], [], {}
            for number in range(reps + 1):
                if number == 1:  # the first is a warm-up
                    before = await asyncio.to_thread(_transfers, topology.servers)
                forward_s = await asyncio.to_thread(_forward_s, prefill)
                sample = await client.send(row(rng, length, output_len, vocab))
                check([sample])
                await asyncio.to_thread(topology.settle)
                ttfts.append(sample.ttft_s or 0.0)
                computes.append(await asyncio.to_thread(_forward_s, prefill) - forward_s)
            after = await asyncio.to_thread(_transfers, topology.servers)
            ttft_s, compute_s = statistics.median(ttfts[1:]), statistics.median(computes[1:])
            found.append(
                {
                    "length": length,
                    "ttft_ms": round(ttft_s * 1e3, 3),
                    "compute_ms": round(compute_s * 1e3, 3),
                    "over_compute": round(ttft_s / compute_s - 1, 4),
                    "ttfts_ms": [round(value * 1e3, 3) for value in ttfts[1:]],
                    "computes_ms": [round(value * 1e3, 3) for value in computes[1:]],
                    **means({key: after[key] - before.get(key, 0.0) for key in after}),
                }
            )
    return found


def means(change: dict[str, float]) -> dict[str, float]:
    """Means of the histograms that moved, and bytes."""
    found = {}
    for key, value in change.items():
        name, _, kind = key.rpartition("_")
        if kind == "sum" and change.get(f"{name}_count"):
            found[f"mean_{name}"] = round(value / change[f"{name}_count"], 4)
        elif key.startswith("kv_bytes_") and value:
            found[key] = value
    return found
