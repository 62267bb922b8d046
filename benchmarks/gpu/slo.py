"""At which request rate do requests still meet their limits? Poisson arrivals against one URL, and a bounded search."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diptych.bench.arrivals import arrival_offsets
from diptych.bench.backends import Generate, Options
from diptych.bench.client import Client
from diptych.bench.dataset import Row
from diptych.bench.load import LagWatch, drive
from diptych.bench.sample import Sample
from diptych.bench.stats import client_figures, describe

PERCENTILE = 99
NEAR = 1.12  # a search ends when the rate that fails is at most so many times the rate that holds


@dataclass(frozen=True)
class Slo:
    """Of each request: time to first token, and the 99th percentile of its own inter-token latencies. Seconds."""

    ttft_s: float
    itl_s: float

    def meets(self, sample: Sample) -> bool:
        if sample.error or sample.ttft_s is None:
            return False
        return sample.ttft_s <= self.ttft_s and itl_p99_s(sample) <= self.itl_s


def itl_p99_s(sample: Sample) -> float:
    return float(np.percentile(sample.itls_s, PERCENTILE)) if sample.itls_s else 0.0


@dataclass
class Search:
    """The highest rate that holds, by doubling or halving until it is between two rates, then by their geometric mean.

    Ask `rate` and tell `add`, until `done`: at most `runs` runs.
    """

    start: float
    runs: int
    holds: float = 0.0  # highest rate known to hold; 0: none yet
    fails: float = 0.0  # lowest rate known to fail; 0: none yet
    tried: int = 0

    @property
    def rate(self) -> float:
        if not self.tried:
            return self.start
        if not self.fails:
            return self.holds * 2
        return (self.holds * self.fails) ** 0.5 if self.holds else self.fails / 2

    @property
    def done(self) -> bool:
        return self.tried >= self.runs or (self.holds > 0 and 0 < self.fails <= self.holds * NEAR)

    def add(self, holds: bool) -> None:
        rate = self.rate
        self.tried += 1
        if holds:
            self.holds = rate
        else:
            self.fails = rate


@dataclass(frozen=True)
class Mix:
    """Lengths of prompts and answers (uniform, both ends in), and how long a run is."""

    prompt: tuple[int, int]
    answer: tuple[int, int]
    vocab: int
    duration_s: float
    least: int  # requests

    def rows(self, rate: float, seed: int) -> tuple[list[Row], list[float]]:
        """The requests of a run and when they come: the same for every topology. At a higher rate, more of the same."""
        count = max(self.least, round(rate * self.duration_s))
        rng = np.random.default_rng(seed)
        rows = []
        for _ in range(count):
            length, answer = (int(rng.integers(low, high + 1)) for low, high in (self.prompt, self.answer))
            ids = [int(token) for token in rng.integers(self.vocab, size=length)]
            rows.append(Row(prompt=ids, prompt_len=length, output_len=answer))
        return rows, [float(offset) for offset in arrival_offsets(count, rate, seed)]


@dataclass
class Watch:
    """The requests that have finished, and how many missed their limits."""

    slo: Slo
    samples: list[Sample] = field(default_factory=list)
    missed: int = 0

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        self.missed += not self.slo.meets(sample)


async def run(url: str, mix: Mix, slo: Slo, rate: float, share: float, seed: int, *, whole: bool) -> dict[str, Any]:
    """One run at `rate` requests per second: the share that met the limits, and what the client itself cost.

    Unless `whole`, it is cut short once less than `share` can meet them; `share_met` is then what could have, at most.
    """
    rows, offsets = mix.rows(rate, seed)
    watch = Watch(slo)
    allowed = len(rows) - int(np.ceil(share * len(rows) - 1e-9))
    started, cpu_s = time.perf_counter(), time.process_time()
    async with Client(url, Generate(), Options(), timeout_s=300) as client, LagWatch() as lag:
        too_many = asyncio.Event()

        def on_done(sample: Sample) -> None:
            watch.add(sample)
            if watch.missed > allowed and not whole:
                too_many.set()

        driving = asyncio.create_task(drive(rows, offsets, None, client.send, on_done))
        giving_up = asyncio.create_task(too_many.wait())
        await asyncio.wait({driving, giving_up}, return_when=asyncio.FIRST_COMPLETED)
        cut = not driving.done()
        for task in (driving, giving_up):
            task.cancel()
        await asyncio.gather(driving, giving_up, return_exceptions=True)
    duration_s = time.perf_counter() - started
    if not cut:
        driving.result()
    chunks = sum(sample.num_chunks for sample in watch.samples)
    figures = client_figures(lag.lags_s, time.process_time() - cpu_s, duration_s, chunks)
    return {
        "rate": round(rate, 4),
        "requests": len(rows),
        "share_met": round((len(rows) - watch.missed) / len(rows), 4),
        "holds": watch.missed <= allowed,
        "cut_short": cut,
        "duration_s": round(duration_s, 1),
        **_round(latencies(watch.samples, slo)),
        **_round(figures),
    }


def latencies(samples: Sequence[Sample], slo: Slo) -> dict[str, Any]:
    """Of requests that finished: TTFT, and each one's ITL p99, over requests; and how many missed which limit."""
    good = [sample for sample in samples if not sample.error and sample.ttft_s is not None]
    return {
        "finished": len(samples),
        "missed_ttft": sum((sample.ttft_s or 0.0) > slo.ttft_s for sample in good),
        "missed_itl": sum(itl_p99_s(sample) > slo.itl_s for sample in good),
        "errors": sorted({sample.error for sample in samples if sample.error}),
        "output_tokens": sum(sample.output_tokens for sample in good),
        "tokens_per_chunk": sum(s.output_tokens for s in good) / max(1, sum(s.num_chunks for s in good)),
        **describe("ttft", [sample.ttft_s for sample in good if sample.ttft_s is not None]),
        **describe("itl_p99_of_a_request", [itl_p99_s(sample) for sample in good]),
        **describe("itl", [itl for sample in good for itl in sample.itls_s]),
    }


def _round(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}
