"""What the GPU does in a step: its kernels, and how long it waits between them. Runs the engine's Runner, no server.

    python -m benchmarks.gpu.profile_engine --model Qwen3-32B [--batch 1 32 256] [--prefill 1x4096] [-- FLAGS]

Decode steps are launched as the overlapped loop launches them: step N + 1, whose tokens only the device knows, before
step N is collected. For each batch: the time of a step and of its launch on the CPU without a profiler; then, from a
torch profile of so many steps, each kernel's calls, time and share, and the part of the time between the first and the
last kernel in which no kernel ran. A profiler lengthens launches, so that part is an upper bound; compare the time of a
step in both runs, and both with `busy_ms`, in which kernels ran. `--rehearse`: a tiny model on the CPU, whose
operations stand for kernels.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.engine import CHUNK, cell, split_flags
from benchmarks.gpu.models import MODELS, REHEARSAL, model_folder
from benchmarks.gpu.shapes import num_pages, plan_of
from benchmarks.results import write
from diptych.config import parse_server_args
from diptych.model.runner import Runner
from diptych.types import Plan, Row, Sampling

GREEDY = Sampling(temperature=0.0, max_new_tokens=1 << 20, ignore_eos=True, seed=1)
WARM_UP = 5  # steps, each time
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
NAME = 100  # characters of a kernel's name that are kept


def rows_of(plan: Plan) -> list[Row]:
    """Greedy rows that all sample."""
    new = np.diff(plan.q_starts)
    return [
        Row(
            rid=str(index),
            num_new=int(count),
            num_cached=int(length - count),
            samples=True,
            sampling=GREEDY,
            position=int(length),
            num_prompt=int(length),
        )
        for index, (count, length) in enumerate(zip(new, plan.kv_lens, strict=True))
    ]


def decode_plans(batch: int, context: int, steps: int, page_size: int) -> list[Plan]:
    """Consecutive decode steps of sequences that have `context` tokens; each takes its tokens from the one before."""
    pages = plan_of([(context + steps - 1, 1)] * batch, page_size).pages
    plans = []
    for step in range(steps):
        at = context + step
        table = np.ascontiguousarray(pages[:, : -(-(at + 1) // page_size)])
        plan = Plan(
            step=step,
            rows=[],
            token_ids=-1 - np.arange(batch, dtype=np.int32) if step else np.arange(batch, dtype=np.int32),
            positions=np.full(batch, at, np.int32),
            slots=table[:, at // page_size].astype(np.int64) * page_size + at % page_size,
            q_starts=np.arange(batch + 1, dtype=np.int32),
            kv_lens=np.full(batch, at + 1, np.int32),
            pages=table,
        )
        plan.rows = rows_of(plan)
        plans.append(plan)
    return plans


def prefill_plans(count: int, length: int, steps: int, page_size: int) -> list[Plan]:
    """The same prompts again and again."""
    plan = plan_of([(0, length)] * count, page_size)
    plan.token_ids = np.random.default_rng(0).integers(1000, size=count * length).astype(np.int32)
    plan.rows = rows_of(plan)
    return [plan] * steps


def drive(runner: Runner, plans: Sequence[Plan]) -> list[float]:
    """Run consecutive steps, each launched before the one before it is collected. Seconds that each launch took."""
    pending, launches = None, []
    for plan in plans:
        started = time.perf_counter()
        launched = runner.launch(plan)
        launches.append(time.perf_counter() - started)
        if pending is not None:
            runner.collect(pending)
        pending = launched
    if pending is not None:
        runner.collect(pending)
    return launches


def step_times(runner: Runner, plans: Sequence[Plan]) -> dict[str, float]:
    """Of the steps after a warm-up: milliseconds a step, and microseconds of the CPU to launch one."""
    drive(runner, plans[:WARM_UP])
    started = time.perf_counter()
    launches = drive(runner, plans[WARM_UP:])
    step_s = (time.perf_counter() - started) / len(launches)
    return {"step_ms": round(step_s * 1e3, 4), "launch_us": round(statistics.median(launches) * 1e6, 1)}


def trace(runner: Runner, plans: Sequence[Plan], keep: Path | None) -> list[dict[str, Any]]:
    """What ran on the device during the steps after a warm-up: name, `ts` and `dur` in µs. `keep`: also leave the
    trace there, for a viewer."""
    on_gpu = runner.device == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json.gz"
        with torch.profiler.profile(
            activities=[kinds.CUDA] if on_gpu else [kinds.CPU],
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda profile: profile.export_chrome_trace(str(path)),
        ) as profile:
            drive(runner, plans[:WARM_UP])
            profile.step()
            drive(runner, plans[WARM_UP:])
            profile.step()
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
    wanted = ON_DEVICE if on_gpu else ("cpu_op",)
    return sorted((event for event in events if event.get("cat") in wanted), key=lambda event: event["ts"])


def table(events: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Time by kernel, largest first, and the idle part between the first kernel and the last. Kernels may overlap."""
    if not events:
        raise RuntimeError("the profiler saw no kernel: does this machine let torch read the GPU's counters (CUPTI)?")
    calls: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    busy, gaps, end = 0.0, [], events[0]["ts"]
    for event in events:
        name = event["name"][:NAME]
        calls[name] += 1
        spent[name] += event["dur"]
        if event["ts"] > end:
            gaps.append(event["ts"] - end)
        busy += max(0.0, event["ts"] + event["dur"] - max(end, event["ts"]))
        end = max(end, event["ts"] + event["dur"])
    span, total = end - events[0]["ts"], sum(spent.values())
    kernels = [
        {
            "kernel": name,
            "calls_a_step": round(calls[name] / steps, 2),
            "us_a_step": round(us / steps, 2),
            "us_a_call": round(us / calls[name], 3),
            "share": round(us / total, 4),
        }
        for name, us in sorted(spent.items(), key=lambda item: -item[1])
    ]
    return {
        "profiled_step_ms": round(span / steps / 1e3, 4),
        "busy_ms": round(busy / steps / 1e3, 4),
        "idle_share": round(1 - busy / span, 4),
        "gaps_a_step": round(len(gaps) / steps, 1),
        "longest_gap_us": round(max(gaps, default=0.0), 1),
        "gaps_over_10_us_a_step": round(sum(gap > 10 for gap in gaps) / steps, 2),
        "kernels": kernels,
    }


def show(what: str, found: dict[str, Any], top: int) -> None:
    facts = ", ".join(f"{key} {value}" for key, value in found.items() if key not in ("what", "kernels"))
    print(f"-- {what}: {facts}", flush=True)
    for kernel in found["kernels"][:top]:
        numbers = "{calls_a_step:9.2f} calls {us_a_step:11.2f} µs {us_a_call:9.2f} µs each {share:6.1%}"
        print(f"  {numbers.format(**kernel)}  {kernel['kernel']}", flush=True)


def one(runner: Runner, what: str, plans: Sequence[Plan], args: argparse.Namespace, page_size: int) -> dict[str, Any]:
    """Times, then a profile, of consecutive plans; or why there are none."""
    needed = num_pages(plans[-1], page_size)
    if needed > runner.num_pages:
        return {"what": what, "left_out": f"needs {needed} pages, the pool has {runner.num_pages}"}
    found: dict[str, Any] = {"what": what, **step_times(runner, plans)}
    keep = Path(args.traces) / f"{what.replace(' ', '-').replace(',', '')}.json.gz" if args.traces else None
    found |= table(trace(runner, plans, keep), len(plans) - WARM_UP)
    show(what, found, args.top)
    return found


def main() -> int:
    argv, extra = split_flags(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="Qwen3-0.6B")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32, 256], help="of decode steps")
    parser.add_argument("--context", type=int, default=1024, help="tokens that the sequences have")
    parser.add_argument("--prefill", type=cell, nargs="*", default=[], help="prompts x tokens of one step: 1x4096")
    parser.add_argument("--steps", type=int, default=20, help="that are profiled")
    parser.add_argument("--top", type=int, default=25, help="kernels that are printed; all are written")
    parser.add_argument("--traces", default="", help="folder for traces that Chrome and Perfetto show")
    parser.add_argument("--label", default="", help="added to the name of the results")
    parser.add_argument("--json", default="", help="where results go (default: benchmarks/results/)")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    args = parser.parse_args(argv)
    if args.rehearse:
        args.model, args.context = REHEARSAL.name, min(args.context, 64)
    if args.traces:
        Path(args.traces).mkdir(parents=True, exist_ok=True)
    device = "cpu" if args.rehearse else "cuda"
    flags = ["--dtype", "float32"] if args.rehearse else ["--dtype", "bfloat16", "--chunked-prefill-size", str(CHUNK)]
    found = []
    with model_folder(args.model) as folder:
        base = ["--model-path", folder, "--device", device, "--load-format", "dummy", *flags, *extra]
        config = parse_server_args(base).on_device(device)
        started = time.perf_counter()
        runner = Runner(config, progress=lambda what: print(f"  {what}", flush=True))
        load_s = round(time.perf_counter() - started, 1)
        print(f"{args.model} loaded in {load_s} s", flush=True)
        steps, size = args.steps + WARM_UP, config.page_size
        for batch in args.batch:
            plans = decode_plans(batch, args.context, steps, size)
            found.append(one(runner, f"decode, {batch} x {args.context}", plans, args, size))
        for count, length in args.prefill:
            plans = prefill_plans(count, length, steps, size)
            found.append(one(runner, f"prefill, {count} x {length}", plans, args, size))
    if args.json or not args.rehearse:
        name = "-".join(["gpu-profile", args.model.lower(), *([args.label] if args.label else [])])
        told = {"label": args.label, "model": args.model, "flags": extra, "page_size": config.page_size}
        told |= {"load_s": load_s, "exact": runner.exact, "profiles": found}
        print(write(name, told, args.json).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
