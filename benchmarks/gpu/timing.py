"""Time on the device: calls in a CUDA graph, over inputs that no cache holds; floors from bytes."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

GRAPHS, CALLS = 5, 24  # replays, and calls in a graph (or two turns of all inputs)
EVICT_BYTES = 256 << 20  # inputs rotate over so much: several times the second-level cache
COPY_BYTES = 4 << 30


@dataclass
class Bench:
    """Collects rows of a table. `rehearse`: tiny shapes on the CPU; times mean nothing."""

    rehearse: bool
    bandwidth: float  # bytes/s of a device copy: the floors' measure
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.rehearse else torch.bfloat16  # the interpreter has no products of bfloat16

    def copies(self, num_bytes: int) -> int:
        """How many copies of an input make the cache useless."""
        return 2 if self.rehearse else max(2, min(64, -(-EVICT_BYTES // num_bytes)))

    def add(
        self, what: str, variant: str, calls: Sequence[Callable[[], Any]], num_bytes: float = 0, flops: float = 0
    ) -> float | None:
        """Time one call of several like it, print and keep the row. None if it failed, which the row tells."""
        row: dict[str, Any] = {"what": what, "variant": variant}
        try:
            seconds = seconds_of(calls, graph=not self.rehearse)
        except Exception as error:  # a variant that asks for too much, say: the others still run
            seconds, row["error"] = None, f"{type(error).__name__}: {error}"
        text = f"{what:44} {variant:44} "
        if seconds is None:
            text += row["error"][:80]
        else:
            row["us"] = round(seconds * 1e6, 2)
            text += f"{row['us']:10.1f} µs"
            if num_bytes:
                row["tb_per_s"] = round(num_bytes / seconds / 1e12, 3)
                row["of_floor"] = round(num_bytes / self.bandwidth / seconds, 3)
                text += f" {row['tb_per_s']:6.2f} TB/s {row['of_floor']:6.1%} of floor"
            if flops:
                row["tflop_per_s"] = round(flops / seconds / 1e12, 1)
                text += f" {row['tflop_per_s']:6.1f} TFLOP/s"
        print(text, flush=True)
        self.rows.append(row)
        return seconds

    def trace(self, what: str, calls: Sequence[Callable[[], Any]]) -> None:
        """A replay of these calls as one graph, kernel by kernel: time of each name, and what no kernel covers. The
        profiler itself takes time between kernels; compare the span with the time measured without it."""
        if self.rehearse:
            return
        try:
            spans = traced(calls)
        except Exception as error:
            print(f"{what}: no trace: {type(error).__name__}: {error}", flush=True)
            return
        names: dict[str, list[float]] = {}
        busy, end = 0.0, spans[0][1]
        for name, start, stop in spans:
            names.setdefault(name, []).append(stop - start)
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        span = end - spans[0][1]
        row = {"what": what, "span_us": round(span, 1), "idle_us": round(span - busy, 1)}
        kernels = {name: [len(times), round(sum(times), 1)] for name, times in names.items()}
        self.rows.append(row | {"kernels": kernels})
        print(f"{what}: {len(calls)} layers in {span:.1f} µs, of which idle {span - busy:.1f}", flush=True)
        for name, (count, total) in sorted(kernels.items(), key=lambda item: -item[1][1]):
            print(f"{'':8} {name[:72]:72} {count:4} × {total / count:8.2f} µs = {total:9.1f} µs", flush=True)


def traced(calls: Sequence[Callable[[], Any]]) -> list[tuple[str, float, float]]:
    """(kernel, start, end) in µs, by start, of a graph's third replay."""
    stream, captured = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        for call in calls:
            call()
    captured.replay()
    captured.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        captured.replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"]
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    return sorted(kernels, key=lambda kernel: kernel[1])


def seconds_of(calls: Sequence[Callable[[], Any]], *, graph: bool) -> float:
    """Median seconds of a call."""
    if not graph:
        started = time.perf_counter()
        calls[0]()
        return time.perf_counter() - started
    calls[0]()  # compiles
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[-1]()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    count = -(-CALLS // len(calls)) * len(calls)
    with torch.cuda.graph(captured, stream=stream):
        for i in range(count):
            calls[i % len(calls)]()
    captured.replay()
    times = []
    for _ in range(GRAPHS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        captured.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / count)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written by a device copy, per second."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return COPY_BYTES / seconds_of([lambda: target.copy_(source)], graph=True)
