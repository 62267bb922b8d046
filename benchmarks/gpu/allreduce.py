"""Sums over the GPUs of this host: right first, then how fast. `python -m benchmarks.gpu.allreduce [--world 2]`.

One process a GPU. Every call is made in a CUDA graph of many (sums by shares of rows: without), one behind the other,
on numbers that are new at each replay, and every result is compared, so that a race would show. What takes longer than
--deadline is ended.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _symmetric_memory as symmetric_memory

from benchmarks.gpu import row_shares
from benchmarks.results import write
from diptych.model import parallel
from diptych.model.allreduce import DeviceGroup
from diptych.model.kernels import launch
from diptych.model.kernels.allreduce import whole
from diptych.model.kernels.fused import add_norm
from diptych.model.parallel import Parallel

WIDTH, EPS = 5120, 1e-6  # of Qwen3-32B
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 400)  # 10 KB to 4 MB
CHECKED_ROWS = (1, 7, 32, 100)
CHECKED_BYTES = 1 << 30  # of a graph's inputs, at most
CALLS = 1000
LIMIT = 4 << 20
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2, help="GPUs")
    parser.add_argument("--json", default="", help="where results go (default: benchmarks/results/)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the inputs (default: the clock)")
    parser.add_argument("--deadline", type=float, default=120, help="seconds that all of it may take")
    parser.add_argument("--without-torch", action="store_true", help="leave out torch's symmetric memory")
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.exit(measure(args) if args.rank >= 0 else start(args))


def start(args: argparse.Namespace) -> int:
    """Start the ranks, and see that they end."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = listed.split(",") if listed else [str(gpu) for gpu in range(torch.cuda.device_count())]
    if len(gpus) < args.world:
        sys.exit(f"--world {args.world} needs as many GPUs; {len(gpus)} are visible")
    ends = time.monotonic() + args.deadline
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu.allreduce", *sys.argv[1:]]
        command += ["--seed", str(args.seed), "--store", str(Path(folder) / "store"), "--rank"]
        # torch compares the numbers of devices, which are 0 everywhere when each process sees but its own.
        shared = os.environ | MULTICAST_OFF | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
        ranks = [
            subprocess.Popen([*command, str(rank)], env=shared | {"CUDA_VISIBLE_DEVICES": gpus[rank]})
            for rank in range(args.world)
        ]
        try:
            while any(rank.poll() is None for rank in ranks):
                if any(rank.poll() for rank in ranks) or time.monotonic() > ends:
                    break
                time.sleep(0.1)
        finally:
            codes = [rank.poll() for rank in ranks]
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(codes) or None in codes:
        print(f"exit statuses {codes} (None: ended by the deadline of {args.deadline:g} s, or as another failed)")
        return 1
    return 0


def measure(args: argparse.Namespace) -> int:
    """One rank. Returns the exit status."""
    started = time.perf_counter()
    place = parallel.init(args.rank, args.world, 1, f"file://{args.store}", "cuda")
    group = dist.group.WORLD
    assert group is not None and isinstance(place.group, DeviceGroup)
    ours, nccl = DeviceGroup(group, LIMIT), DeviceGroup(group, 0)
    ours.share_rows(max(row_shares.ROWS), WIDTH, torch.bfloat16)
    if not ours.has_one_shot:
        print("no access from GPU to GPU: nothing to compare NCCL with")
        return 1
    torch.manual_seed(args.seed + args.rank)
    table = Table(args.rank)
    wrong = checks(table, place, ours, nccl)
    seconds = {"checks": time.perf_counter() - started}
    timings(table, ours, nccl)
    if not args.without_torch:
        torch_timings(table, group)
    seconds["all"] = time.perf_counter() - started
    if args.rank == 0:
        result = {"world": args.world, "seed": args.seed, "wrong": wrong, "rows": table.rows}
        print(write("gpu-allreduce", result | {"seconds": seconds}, args.json))
    torch.cuda.synchronize()
    dist.destroy_process_group()
    if wrong:
        print(f"rank {args.rank}: wrong results: {'; '.join(wrong)}")
    return 1 if wrong else 0


class Table:
    """Rows of figures; rank 0 prints them."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        if self.rank == 0:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """The calls in a graph; all ranks capture the same. Each kind of call has been made before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for call in calls:
            call()
    return graph


# ---- checks ------------------------------------------------------------------------------------------------------


def checks(table: Table, place: Parallel, ours: DeviceGroup, nccl: DeviceGroup) -> list[str]:
    """What was found wrong."""
    wrong = []

    def check(what: str, right: bool, **more: Any) -> None:
        table.add(check=what, right=right, **more)
        if not right:
            wrong.append(what)

    x = normal(32, WIDTH)
    in_order, exact = gathered_sums(x)
    ways = {"NCCL": nccl.sum, "shares through NCCL": nccl._ordered_sum, "ours": ours.sum}
    for name, way in ways.items():
        found = way(x.clone())
        error = ((found.double() - exact).abs() / exact.abs().clamp(min=1e-2)).max().item()
        check(f"{name}: added in rank order, rounded once", torch.equal(found, in_order), relative_error=error)
    for rows in CHECKED_ROWS:
        check(f"graph of sums of {rows} rows", right_sums(ours, nccl, [rows] * CALLS))
    mixed = torch.randint(1, 50, (CALLS,), generator=torch.Generator().manual_seed(1)).tolist()
    check("graph of sums of 1 to 50 rows", right_sums(ours, nccl, mixed))
    check("graph of sums of 1 to 50 rows, each rank with pauses of its own", right_sums(ours, nccl, mixed, pauses=True))
    for rows, splits in ((1, 1), (1, 4), (30, 2), (150, 1)):
        check(f"graph of sum_add_norm of {rows} rows in {splits} parts", right_norms(ours, nccl, rows, splits))
    launch.set_overlap(True)
    check("overlapping launches: graph of sums of 1 to 50 rows", right_sums(ours, nccl, mixed))
    check("overlapping launches: graph of sum_add_norm", right_norms(ours, nccl, 30, 2))
    launch.set_overlap(False)
    check("graph of tokens and logits", right_exchanges(place))
    if ours.row_shares is not None:
        for rows in (*row_shares.ROWS, 1030):
            for hidden in (False, True):
                right = row_shares.right_shares(ours.row_shares, nccl, rows, hidden)
                check(f"{rows} rows by shares, hidden {hidden}, with pauses", right)
    return wrong


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def gathered_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the ranks as it is promised, and in float64."""
    parts = x.new_empty(dist.get_world_size(), *x.shape)
    dist.all_gather_into_tensor(parts, x)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(x.dtype), parts.double().sum(0)


def right_sums(ours: DeviceGroup, nccl: DeviceGroup, rows: list[int], pauses: bool = False) -> bool:
    """Sums of so many rows each, one behind the other, each of other numbers; replayed with new ones."""
    count, most = min(len(rows), CHECKED_BYTES // (2 * WIDTH * max(rows))), max(rows)
    found = torch.empty(count, most, WIDTH, dtype=torch.bfloat16, device="cuda")
    summed = torch.arange(most, device="cuda") < torch.tensor(rows[:count], device="cuda")[:, None]
    calls: list[Callable[[], Any]] = []
    for i, cycles in enumerate(torch.randint(0, 100_000, (count,)).tolist()):
        if pauses and i % 8 == 0:
            calls.append(partial(torch.cuda._sleep, cycles))
        calls.append(partial(ours.sum, found[i, : rows[i]]))
    graph, right = captured(calls), True
    for _ in range(3):
        found.normal_()
        expected = torch.where(summed[..., None], nccl.sum(found.clone()), found)
        graph.replay()
        right = right and torch.equal(found, expected)
    return right


def right_norms(ours: DeviceGroup, nccl: DeviceGroup, rows: int, splits: int) -> bool:
    """A chain of sum_add_norm, whose residual goes on, against sum and add_norm one after the other."""
    count = min(64, CHECKED_BYTES // (8 * splits * WIDTH * rows))
    dtype = torch.float32 if splits > 1 else torch.bfloat16
    deltas = torch.empty(count, splits, rows, WIDTH, dtype=dtype, device="cuda")
    start, weight, x = normal(rows, WIDTH), normal(WIDTH), normal(rows, WIDTH)
    found: list[Tensor] = []

    def chain(group: DeviceGroup) -> list[Tensor]:
        x.copy_(start)
        steps = [delta if splits > 1 else delta[0] for delta in deltas]
        if group is nccl:
            return [add_norm(x, nccl.sum(whole(delta, x.dtype).clone()), weight, EPS) for delta in steps]
        return [ours.sum_add_norm(x, delta, weight, EPS) for delta in steps]

    def graphed() -> None:
        found.extend(chain(ours))

    deltas.normal_()
    chain(ours), chain(nccl)
    graph, right = captured([graphed]), True
    for _ in range(3):
        deltas.normal_()
        expected = [*chain(nccl), x.clone()]
        graph.replay()
        right = right and all(torch.equal(a, b) for a, b in zip([*found, x], expected, strict=True))
    return right


def right_exchanges(place: Parallel) -> bool:
    """share_tokens and join."""
    tokens, logits = torch.zeros(64, dtype=torch.int64, device="cuda"), normal(64, 1000)
    joined: list[Tensor | None] = []

    def both() -> None:
        place.share_tokens(tokens)
        joined.append(place.join(logits))

    both()
    graph = captured([both])
    logits.normal_()
    tokens.fill_(-1 if place.rank else 123_456)
    parts = logits.new_empty(place.world, *logits.shape)
    dist.all_gather_into_tensor(parts, logits)
    graph.replay()
    told = bool((tokens == 123_456).all())
    return told and (place.rank > 0 or torch.equal(joined[-1], torch.cat(tuple(parts), -1)))  # type: ignore[arg-type]


# ---- times -------------------------------------------------------------------------------------------------------


def timings(table: Table, ours: DeviceGroup, nccl: DeviceGroup) -> None:
    """Microseconds of a call, of each kind. All numbers are zero, which stay so."""
    weight = torch.zeros(WIDTH, dtype=torch.bfloat16, device="cuda")
    for rows in ROWS:
        x, delta = torch.zeros(2, rows, WIDTH, dtype=torch.bfloat16, device="cuda")
        kinds: dict[str, Callable[[], Any]] = {
            "NCCL": partial(nccl.sum, delta),
            "one_shot": partial(ours.sum, delta),
            "add_norm": partial(add_norm, x, delta, weight, EPS),
            "one_shot_then_norm": partial(sum_then_norm, ours, x, delta, weight),
            "one_shot_with_norm": partial(ours.sum_add_norm, x, delta, weight, EPS),
        }
        times = {name: microseconds(call) for name, call in kinds.items()}
        launch.set_overlap(True)
        times["one_shot_with_norm_overlapping"] = microseconds(kinds["one_shot_with_norm"])
        launch.set_overlap(False)
        table.add(rows=rows, kib=delta.nbytes / 1024, **times)
    tokens = torch.zeros(64, dtype=torch.int64, device="cuda")
    table.add(what="share_tokens of 64 rows", us=microseconds(partial(nccl.share_tokens, tokens)))
    for rows in (1, 32, 256):
        logits = torch.zeros(rows, 75968, dtype=torch.bfloat16, device="cuda")
        table.add(what=f"join of {rows} rows of 75,968", us=microseconds(partial(nccl.join, logits), 20))
    for rows in (4096, 8192):
        delta = torch.zeros(rows, WIDTH, dtype=torch.bfloat16, device="cuda")
        table.add(what=f"NCCL, {rows} rows", us=microseconds(partial(nccl.sum, delta), 20))
    if ours.row_shares is not None:
        for rows in row_shares.ROWS:
            table.add(what=f"layer of {rows} rows, us", **row_shares.layer_times(ours.row_shares, nccl, rows))


def sum_then_norm(group: DeviceGroup, x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    return add_norm(x, group.sum(delta), weight, EPS)


def torch_timings(table: Table, group: ProcessGroup) -> None:
    """Torch's own one-shot sum over symmetric memory."""
    for rows in ROWS:
        x = symmetric_memory.empty((rows, WIDTH), dtype=torch.bfloat16, device=torch.device("cuda", 0)).zero_()
        symmetric_memory.rendezvous(x, group)
        call = partial(torch.ops.symm_mem.one_shot_all_reduce, x, "sum", group.group_name)
        table.add(what="torch's one shot", rows=rows, us=microseconds(call))


def microseconds(call: Callable[[], Any], count: int = 100) -> float:
    """Of one call, of a graph of many: the median of the replays, after one. The ranks start together."""
    call()
    graph, times, together = captured([call] * count), [], torch.zeros(1, device="cuda")
    for _ in range(6):
        dist.all_reduce(together)
        torch.cuda._sleep(200_000)  # while which the graph is enqueued
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / count)
    return round(statistics.median(times[1:]), 2)


if __name__ == "__main__":
    main()
