"""One unified Diptych server against transformers' continuous batching: same checkpoint, machine, prompts and lengths.

The two sides take turns (A B, B A, …) in one run: while one works, the other is up and idle. Diptych is measured from
outside, over HTTP with streaming, as its clients see it; transformers inside its process. Both decode greedily,
`--concurrency` at a time, to the same lengths. Prompts are new in every round, so no prefix cache can help.

    python benchmarks/unified.py [--model models/demo] [--rounds 4] [--num-prompts 32] [--concurrency 16] ...
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import results
from programs import ROOT, Program, cpu_seconds, end_on_sigterm, programs, server_command, settle

from diptych.bench.backends import Generate, Options
from diptych.bench.client import Client
from diptych.bench.dataset import Row
from diptych.bench.load import LagWatch, drive
from diptych.bench.sample import Sample
from diptych.bench.stats import Figures, summarize
from diptych.bench.tokens import Tokens

Rows = list[Row]


class Side(Protocol):
    pid: int

    def run(self, rows: Rows, concurrency: int) -> list[Sample]: ...


class DiptychSide:
    """One server process and this process as its client."""

    def __init__(self, server: Program) -> None:
        self._url = server.url
        self.pid = server.process.pid

    def run(self, rows: Rows, concurrency: int) -> list[Sample]:
        return asyncio.run(self._run(rows, concurrency))

    async def _run(self, rows: Rows, concurrency: int) -> list[Sample]:
        async with Client(self._url, Generate(), Options()) as client, LagWatch():
            return await drive(rows, [0.0] * len(rows), concurrency, client.send, lambda sample: None)


class TransformersSide:
    """A transformers_side.py process."""

    def __init__(self, model: str, threads: int, context: int, concurrency: int) -> None:
        self.threads = threads
        script = str(Path(__file__).with_name("transformers_side.py"))
        command = [sys.executable, script, model, str(threads), str(context), str(concurrency)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.pid = self._process.pid

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the transformers process ended; run benchmarks/transformers_side.py by hand to see why")
        return json.loads(line)

    def wait_ready(self) -> None:
        self._answer()

    def run(self, rows: Rows, concurrency: int) -> list[Sample]:
        assert self._process.stdin is not None
        lens = [row.output_len for row in rows]
        load = {"prompts": [row.prompt for row in rows], "output_lens": lens, "concurrency": concurrency}
        print(json.dumps(load), file=self._process.stdin, flush=True)
        return msgspec.convert(self._answer(), list[Sample])

    def stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._process.stdin.closed:
            return
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        self._process.stdout.close()


def measure(side: Side, rows: Rows, concurrency: int) -> tuple[list[Sample], Figures]:
    """One round of one side, and its figures with the CPU time of all its processes (the client's not among them)."""
    before_s = cpu_seconds(side.pid)
    samples = side.run(rows, concurrency)
    cpu_s = cpu_seconds(side.pid) - before_s
    found = figures(samples)
    return samples, {**found, "cpu_s_per_1k_tokens": round(cpu_s * 1e3 / found["total_output_tokens"], 3)}


def figures(samples: list[Sample]) -> Figures:
    """Figures of a round that took from the first send to the last token."""
    failed = next((sample.error for sample in samples if sample.error), "")
    if failed:
        raise RuntimeError(f"a request failed: {failed}")
    duration_s = max(s.start_s + s.latency_s for s in samples) - min(s.start_s for s in samples)
    return results.kept(summarize(samples, duration_s))


def equal_outputs(ours: list[Sample], theirs: list[Sample]) -> int:
    return sum(a.output_ids == b.output_ids for a, b in zip(ours, theirs, strict=True))


def best_transformers(args: argparse.Namespace, rows: Rows, stack: ExitStack) -> TransformersSide:
    """transformers with --transformers-threads, or as many as suit it best here. `stack` ends its processes."""
    sides: dict[float, TransformersSide] = {}
    context = max(args.input_len) + max(args.output_len)
    for threads in [args.transformers_threads] if args.transformers_threads else sorted({1, os.cpu_count() or 1}):
        side = TransformersSide(args.model, threads, context, args.concurrency)
        stack.callback(side.stop)
        side.wait_ready()
        side.run(rows[:2], args.concurrency)  # warm-up
        speed = measure(side, rows, args.concurrency)[1]["output_throughput"]
        print(f"transformers with {threads} threads: {speed:.0f} tok/s", flush=True)
        sides[speed] = side
    best = sides.pop(max(sides))
    for side in sides.values():
        side.stop()
    return best


def compare(args: argparse.Namespace) -> dict[str, Any]:
    tokens = Tokens.open(args.model)
    rng = np.random.default_rng(args.seed)

    def draw(num: int) -> Rows:
        input_lens, output_lens = (uniform(rng, bounds, num) for bounds in (args.input_len, args.output_len))
        prompts = [tokens.random_ids(rng, n) for n in input_lens]
        return [Row(prompt=p, prompt_len=len(p), output_len=n) for p, n in zip(prompts, output_lens, strict=True)]

    rounds = []
    with ExitStack() as stack:
        theirs = best_transformers(args, draw(args.concurrency), stack)
        command = server_command(args.model, "--cpu-threads", str(args.cpu_threads))
        ours = DiptychSide(stack.enter_context(programs(command))[0])
        ours.run(draw(2), args.concurrency)  # warm-up
        sides: list[tuple[str, Side]] = [("diptych", ours), ("transformers", theirs)]
        for number in range(args.rounds):
            rows = draw(args.num_prompts)
            taken = {}
            for name, side in sides if number % 2 == 0 else sides[::-1]:
                settle()
                taken[name] = measure(side, rows, args.concurrency)
            rounds.append(one_round(number, taken))
            print(progress(rounds[-1]), flush=True)
    return {
        "settings": results.settings(args, transformers_threads=theirs.threads),
        "speedup": results.spread([r["speedup"] for r in rounds]),
        "median_itl_ratio": results.spread([r["median_itl_ratio"] for r in rounds]),
        "cpu_ratio": results.spread([r["cpu_ratio"] for r in rounds]),
        "equal_outputs": sum(r["equal_outputs"] for r in rounds),
        "outputs": args.rounds * args.num_prompts,
        "rounds": rounds,
    }


def uniform(rng: np.random.Generator, bounds: list[int], num: int) -> list[int]:
    return [int(n) for n in rng.integers(bounds[0], bounds[1] + 1, size=num)]


def one_round(number: int, taken: dict[str, tuple[list[Sample], Figures]]) -> dict[str, Any]:
    (our_samples, ours), (their_samples, theirs) = taken["diptych"], taken["transformers"]
    return {
        "round": number,
        "speedup": round(ours["output_throughput"] / theirs["output_throughput"], 3),
        "median_itl_ratio": round(theirs["median_itl_ms"] / ours["median_itl_ms"], 3),
        "cpu_ratio": round(theirs["cpu_s_per_1k_tokens"] / ours["cpu_s_per_1k_tokens"], 3),
        "equal_outputs": equal_outputs(our_samples, their_samples),
        "diptych": ours,
        "transformers": theirs,
    }


def progress(done: dict[str, Any]) -> str:
    parts = [
        f"{side} {done[side]['output_throughput']:.0f} tok/s, ITL median {done[side]['median_itl_ms']:.1f} "
        f"p99 {done[side]['p99_itl_ms']:.1f} ms, {done[side]['cpu_s_per_1k_tokens']:.1f} CPU s per 1,000 tokens"
        for side in ("diptych", "transformers")
    ]
    equal = f"{done['equal_outputs']} of {done['diptych']['completed']} outputs equal"
    return f"round {done['round']}: {'; '.join(parts)}; {done['speedup']:.2f}x; {equal}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--num-prompts", type=int, default=32, help="a round")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, nargs=2, default=[64, 256], metavar=("LEAST", "MOST"))
    parser.add_argument("--output-len", type=int, nargs=2, default=[64, 128], metavar=("LEAST", "MOST"))
    parser.add_argument("--cpu-threads", type=int, default=1, help="of the Diptych server")
    parser.add_argument(
        "--transformers-threads", type=int, default=0, help="0: one, or one a core, whichever is faster"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="", help="file (default: benchmarks/results/unified-<machine>.json)")
    args = parser.parse_args()
    end_on_sigterm()
    result = compare(args)
    path = results.write("unified", result, args.output)
    print(f"{result['speedup']['median']:.2f}x transformers' throughput (rounds: {result['speedup']['min']:.2f} to")
    print(
        f"{result['speedup']['max']:.2f}); {result['equal_outputs']} of {result['outputs']} outputs equal; {path.name}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
