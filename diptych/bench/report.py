"""What a run says: the progress while it runs, the block on the console after it, and its line of JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diptych.bench.sample import Sample
from diptych.errors import ConfigError

_WIDTH = 50
_Line = tuple[str, str, str]  # label, key, format

_TOTALS: tuple[_Line, ...] = (
    ("Successful requests:", "completed", "d"),
    ("Failed requests:", "failed", "d"),
    ("Benchmark duration (s):", "duration", ".2f"),
    ("Total input tokens:", "total_input_tokens", "d"),
    ("Total generated tokens:", "total_output_tokens", "d"),
    ("Total generated tokens (retokenized):", "total_output_tokens_retokenized", "d"),
    ("Request throughput (req/s):", "request_throughput", ".2f"),
    ("Input token throughput (tok/s):", "input_throughput", ".2f"),
    ("Output token throughput (tok/s):", "output_throughput", ".2f"),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s", "d"),
    ("Peak concurrent requests:", "max_concurrent_requests", "d"),
    ("Total token throughput (tok/s):", "total_throughput", ".2f"),
    ("Concurrency:", "concurrency", ".2f"),
    ("Cache hit rate (%):", "cache_hit_rate_pct", ".1f"),
    ("Goodput (req/s):", "request_goodput", ".2f"),
    ("Goodput (% of requests):", "goodput_pct", ".1f"),
)
_FAMILIES = (
    ("End-to-End Latency", "E2E Latency", "e2e_latency"),
    ("Time to First Token", "TTFT", "ttft"),
    ("Time per Output Token (excl. 1st token)", "TPOT", "tpot"),
    ("Inter-Token Latency", "ITL", "itl"),
)
_CLIENT: tuple[_Line, ...] = (
    ("CPU (s):", "client_cpu_s", ".2f"),
    ("CPU of one core (%):", "client_cpu_utilization", ".0%"),
    ("CPU per chunk (us):", "client_cpu_us_per_chunk", ".1f"),
    ("P99 event loop lag (ms):", "client_p99_loop_lag_ms", ".2f"),
    ("Max event loop lag (ms):", "client_max_loop_lag_ms", ".2f"),
)


def result_block(result: Mapping[str, Any]) -> str:
    """The text block after a run; a figure that has no value is left out."""
    lines = [
        f"{' Serving Benchmark Result ':=^{_WIDTH}}",
        f"{'Backend:':<40} {result['backend']}",
        f"{'Traffic request rate:':<40} {result['request_rate']}",
        f"{'Max request concurrency:':<40} {result['max_concurrency'] or 'not set'}",
        *_section(result, _TOTALS),
    ]
    for title, label, name in _FAMILIES:
        lines += _titled(result, title, _family(label, name))
    lines += _titled(result, "Benchmark Client", _CLIENT)
    lines.append("=" * _WIDTH)
    lines += [f"{count:>6} failed: {reason}" for reason, count in result["failures"].items()]
    if result["interrupted"]:
        num_done = result["completed"] + result["failed"]
        lines.append(
            f"Interrupted: the figures are those of the {num_done} of {result['num_prompts']} requests that ended."
        )
    if result["client_bottleneck"]:
        lines.append(
            "The client itself was late or busy (see Benchmark Client): its latencies are too high by about its lag.\n"
            "Give it a core of its own, or less load."
        )
    return "\n".join(lines)


def _family(label: str, name: str) -> tuple[_Line, ...]:
    statistics = (
        ("Mean", "mean"),
        ("Median", "median"),
        ("P90", "p90"),
        ("P95", "p95"),
        ("P99", "p99"),
        ("Max", "max"),
    )
    return tuple((f"{word} {label} (ms):", f"{key}_{name}_ms", ".2f") for word, key in statistics)


def _titled(result: Mapping[str, Any], title: str, wanted: Sequence[_Line]) -> list[str]:
    lines = _section(result, wanted)
    return [f"{title:-^{_WIDTH}}", *lines] if lines else []


def _section(result: Mapping[str, Any], wanted: Sequence[_Line]) -> list[str]:
    return [f"{label:<40} {result[key]:{form}}" for label, key, form in wanted if result.get(key) is not None]


def details(samples: Sequence[Sample]) -> dict[str, Any]:
    """Per request, in the order sent; seconds. A failed request counts no tokens."""
    return {
        "input_lens": [sample.prompt_tokens for sample in samples],
        "output_lens": [0 if sample.error else sample.output_tokens for sample in samples],
        "ttfts": [sample.ttft_s for sample in samples],
        "itls": [sample.itls_s for sample in samples],
        "generated_texts": [sample.text for sample in samples],
        "errors": [sample.error for sample in samples],
    }


def append_line(path: str, result: Mapping[str, Any]) -> None:
    """Add `result` to a file of JSON lines. Raises ConfigError if it cannot be written."""
    try:
        with Path(path).open("ab") as file:
            file.write(msgspec.json.encode(result) + b"\n")
    except OSError as error:
        raise ConfigError(f"--output-file: cannot write it ({error.strerror})") from None


class RunProgress:
    """Shows how far a run is: a bar on a terminal, else a line at each tenth. A context manager."""

    def __init__(self, total: int, console: Console, *, quiet: bool = False) -> None:
        self._total, self._console, self._quiet = total, console, quiet
        self._done = self._failed = 0
        self._start_s = time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,  # drawing shares the client's one thread
            disable=quiet or not console.is_terminal,
        )

    def __enter__(self) -> RunProgress:
        self._task = self._bar.add_task("requests", total=self._total, failed=0)
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def one_done(self, sample: Sample) -> None:
        self._done += 1
        self._failed += bool(sample.error)
        self._bar.update(self._task, completed=self._done, failed=self._failed)
        if self._quiet or self._console.is_terminal:
            return
        if self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            after_s = time.perf_counter() - self._start_s
            self._console.print(
                f"{self._done}/{self._total} requests, {self._failed} failed, {after_s:.1f} s", highlight=False
            )
