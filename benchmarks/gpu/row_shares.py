"""Products of many rows, summed by shares (diptych/model/row_shares.py) or by NCCL: a part of benchmarks.gpu.allreduce.

None is in a graph here: the hidden way counts its calls on the host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.shapes import HALVES
from diptych.model.allreduce import DeviceGroup
from diptych.model.kernels import gated
from diptych.model.kernels.fused import add_norm
from diptych.model.row_shares import RowShares

WIDTH, EPS = 5120, 1e-6  # of Qwen3-32B
ROWS = (512, 1024, 2048, 4096, 8192)
CALLS = 30
PAUSE = 1_000_000  # cycles at most
LAYERS, TURNS = 40, 5


def right_shares(shares: RowShares, nccl: DeviceGroup, rows: int, hidden: bool) -> bool:
    """Calls one behind the other, each of other numbers, each rank with pauses of its own. Every bit is compared."""
    dtype, weight = torch.bfloat16, torch.linspace(0, 1, WIDTH, device="cuda").bfloat16()
    x = torch.ones(rows, WIDTH, dtype=dtype, device="cuda")
    residual, found = x.clone(), []
    deltas = [torch.randn(rows, WIDTH, device="cuda").to(dtype) for _ in range(CALLS * 1024 // rows)]
    for delta in deltas:
        if not hidden:
            found.append(shares.product_add_norm(x, partial(_copy, delta), weight, EPS).clone())
            continue
        arriving = shares.product_add_norm_hidden(x, partial(_copy, delta), weight, EPS)
        found.append(torch.empty_like(x))
        for start, stop in arriving.pieces():
            _pause()
            found[-1][start:stop] = arriving.rows[start:stop]
    start, stop = shares.share(shares.rank, rows)
    right = all(
        torch.equal(normed, add_norm(residual, nccl.sum(delta), weight, EPS))
        for normed, delta in zip(found, deltas, strict=True)
    )
    return right and torch.equal(x[start:stop], residual[start:stop])


def _copy(delta: Tensor, start: int, stop: int, out: Tensor) -> None:
    _pause()
    out.copy_(delta[start:stop])


def _pause() -> None:
    cycles = int(torch.randint(-PAUSE, PAUSE, (1,)))
    if cycles > 0:
        torch.cuda._sleep(cycles)


def layer_times(shares: RowShares, nccl: DeviceGroup, rows: int) -> dict[str, float]:
    """Microseconds of the products of a layer of one of two ranks and what is between them, without attention: the
    ways in turns, the median."""
    weights = {name: torch.randn(shape, device="cuda").bfloat16() / shape[1] ** 0.5 for name, shape in HALVES.items()}
    mixed = torch.randn(rows, HALVES["o"][1], device="cuda").bfloat16()
    x = torch.randn(rows, WIDTH, device="cuda").bfloat16()
    ways = {
        "by_nccl": partial(_by_nccl, nccl), "by_shares": partial(_by_shares, shares),
        "hidden": partial(_hidden, shares),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, way in ways.items():
            us = _microseconds(partial(way, weights, mixed, x), LAYERS if turn else 1)
            if turn:
                times[name].append(us)
    return {name: round(statistics.median(found), 1) for name, found in times.items()}


def _by_nccl(nccl: DeviceGroup, weights: dict[str, Tensor], mixed: Tensor, x: Tensor) -> None:
    scale = weights["qkv"][0]
    normed = add_norm(x, nccl.sum(F.linear(mixed, weights["o"])), scale, EPS)
    inner = gated.silu_product(normed, weights["gate_up"])
    normed = add_norm(x, nccl.sum(F.linear(inner, weights["down"])), scale, EPS)
    F.linear(normed, weights["qkv"])


def _by_shares(shares: RowShares, weights: dict[str, Tensor], mixed: Tensor, x: Tensor) -> None:
    scale = weights["qkv"][0]
    normed = shares.product_add_norm(x, partial(_product, mixed, weights["o"]), scale, EPS)
    inner = gated.silu_product(normed, weights["gate_up"])
    F.linear(shares.product_add_norm(x, partial(_product, inner, weights["down"]), scale, EPS), weights["qkv"])


def _hidden(shares: RowShares, weights: dict[str, Tensor], mixed: Tensor, x: Tensor) -> None:
    scale = weights["qkv"][0]
    arriving = shares.product_add_norm_hidden(x, partial(_product, mixed, weights["o"]), scale, EPS)
    inner = x.new_empty(len(x), HALVES["down"][1])
    for start, stop in arriving.pieces(gated.first_rows(arriving.num_own, len(x), weights["gate_up"])):
        gated.silu_product(arriving.rows[start:stop], weights["gate_up"], inner[start:stop])
    arriving = shares.product_add_norm_hidden(x, partial(_product, inner, weights["down"]), scale, EPS)
    qkv = x.new_empty(len(x), HALVES["qkv"][0])
    for start, stop in arriving.pieces():
        _product(arriving.rows, weights["qkv"], start, stop, qkv[start:stop])


def _product(x: Tensor, weight: Tensor, start: int, stop: int, out: Tensor) -> None:
    torch.mm(x[start:stop], weight.t(), out=out)


def _microseconds(call: Callable[[], None], count: int) -> float:
    dist.all_reduce(torch.zeros(1, device="cuda"))
    torch.cuda._sleep(PAUSE)  # while which calls are enqueued
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3 / count
