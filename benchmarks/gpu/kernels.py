"""The GPU kernels one by one: right first, then how fast. `python -m benchmarks.gpu.kernels [--json FILE] [--only …]`.

Needs a GPU and nothing else; `--rehearse` goes through all of it with tiny shapes in Triton's interpreter instead.
Every variant of the tiles is timed inside a CUDA graph, over inputs that no cache holds, beside a floor (bytes at the
rate of a device copy) and what torch has. `layer` is a whole decode layer, from which a step is the layers' number of
times, plus the head. Compiling is most of the time: `--workers` processes fill Triton's cache first.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

SECTIONS = ("products", "decode", "prefill", "fused", "layer", "sampling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; times mean nothing")
    parser.add_argument("--json", default="", help="where results go (default: benchmarks/results/)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the checks' inputs (default: the clock)")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile first")
    parser.add_argument("--bandwidth", type=float, default=0, help="TB/s of the floors (default: a copy is timed)")
    args = parser.parse_args()
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from benchmarks.gpu import checks, sections
    from benchmarks.gpu.timing import Bench, copy_bandwidth
    from benchmarks.results import write

    started = time.perf_counter()
    if not args.rehearse and args.workers:
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(sections.compile_part, list(args.only), i, args.workers) for i in range(args.workers)]
            compiled = [job.result() for job in jobs]
        errors = sorted({error for _, found in compiled for error in found})
        took = f"{time.perf_counter() - started:.0f} s"
        print(f"{sum(count for count, _ in compiled)} variants compiled in {took}", *errors, sep="\n  ", flush=True)
    bandwidth = args.bandwidth * 1e12 or (1.0 if args.rehearse else copy_bandwidth())
    print(f"floors at {bandwidth / 1e12:.2f} TB/s; seed {args.seed}", flush=True)
    bench = Bench(args.rehearse, bandwidth)
    checked, wrong = checks.run(bench, args.seed)
    for name in args.only:
        print(f"-- {name}, at {time.perf_counter() - started:.0f} s", flush=True)
        getattr(sections, name)(bench)
    result = {
        "bandwidth_tb_per_s": bandwidth / 1e12,
        "seed": args.seed,
        "triton": importlib.metadata.version("triton"),
        "seconds": round(time.perf_counter() - started),
        "checks": checked,
        "rows": bench.rows,
    }
    if args.json or not args.rehearse:
        print(write("gpu-kernels", result, args.json))
    if wrong:
        sys.exit("wrong results: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
