"""Choosing tokens on a GPU, by our kernels and by torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import QWEN3_32B, TINY
from benchmarks.gpu.timing import Bench
from diptych.model import sampling as by_torch
from diptych.model.draws import Draw, compile_draws, draw
from diptych.types import Row, Sampling

WAYS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "top_p 0.9": {"top_p": 0.9},
}
CALLS, TIMES = 5, 3


def sampling(bench: Bench) -> None:
    """A graph of the kernels; then both ways as a step calls them, with upload and launches (and waits, by torch)."""
    vocab_size = (TINY if bench.rehearse else QWEN3_32B).vocab
    for rows in (3,) if bench.rehearse else (1, 32, 256):
        logits = (torch.randn(rows, vocab_size, device=bench.device) * 3).to(bench.dtype)
        bench.add(f"greedy, {rows} rows", "argmax", [partial(logits.argmax, -1)], logits.nbytes)
        for name, settings in WAYS.items():
            what = f"{name}, {rows} rows"
            asked = [_row(Sampling(seed=i, **settings), i) for i in range(rows)]
            ours, tokens = Draw(asked, range(rows), logits), torch.zeros(rows, dtype=torch.int64, device=bench.device)
            bench.add(what, "ours, graph", [partial(ours.into, tokens)], logits.nbytes)
            _called(bench, what, "ours, called", partial(draw, asked, range(rows), logits, tokens))
            torchs = _called(bench, what, "torch, called", partial(_by_torch, asked, logits))
            same = int((tokens == torchs).sum())
            bench.rows.append({"what": what, "variant": "tokens equal to torch's", "equal": same, "of": rows})
            print(f"{what:44} {same} of {rows} tokens equal to torch's", flush=True)


def compile_jobs(bench: Bench) -> Iterator[Callable[[], None]]:
    yield partial(compile_draws, bench.dtype, QWEN3_32B.vocab, bench.device)


def _row(settings: Sampling, position: int) -> Row:
    return Row(rid="", num_new=1, num_cached=0, samples=True, sampling=settings, position=position)


def _by_torch(rows: list[Row], logits: Tensor) -> Tensor:
    return by_torch._draw(rows, logits.float())


def _called(bench: Bench, what: str, variant: str, call: Callable[[], Any]) -> Any:
    """Keep the median time of calls one behind the other; what the last returned."""
    result = call()
    if bench.rehearse:
        return result
    times = []
    for _ in range(TIMES):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(CALLS):
            result = call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / CALLS)
    bench.rows.append({"what": what, "variant": variant, "us": round(statistics.median(times), 2)})
    print(f"{what:44} {variant:44} {bench.rows[-1]['us']:10.1f} µs", flush=True)
    return result
