"""One server as its clients see it: TPOT, prefill, throughput, time to start; over HTTP, weights of the true shape.

    python -m benchmarks.gpu.engine --model Qwen3-32B [--tp 2] [--quick] [-- FLAGS OF diptych serve]

TPOT at batch B and context C is (time for 129 output tokens - time for 1) / 128: B prompts of C random tokens in one
HTTP request, new ones each time, greedy, end of text ignored, no prefix cache. Prefill is tokens by the time for 1
output token. `fixed` is 256 x (128 -> 512), `mix` 256 x (100 to 1,024 -> 100 to 1,024), all sent at once, output
tokens by the whole time. Each figure is the median of the repetitions, printed and written beside its floor, the peer's
figure (vLLM 0.25.1, measured by the project on 2026-11-22, not here) and the target. `--rehearse` runs all of it with
a tiny model on the CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.gpu import reference
from benchmarks.gpu.models import MODELS, REHEARSAL, model_folder
from benchmarks.gpu.reference import Beside
from benchmarks.gpu.served import Served, draw, serve_flags
from benchmarks.programs import end_on_sigterm
from benchmarks.results import write
from diptych.bench.machine import without_places

Cell = tuple[int, int]  # prompts, tokens of each
LAST = 129  # output tokens of the longer of the two runs that make a TPOT
CHUNK = 8192
MOST_REPS = 15


@dataclass(frozen=True)
class Cells:
    tpot: tuple[Cell, ...] = ()
    prefill: tuple[Cell, ...] = ()
    loads: tuple[str, ...] = ()


DEFAULT: dict[tuple[str, int], Cells] = {
    ("Qwen3-32B", 1): Cells(
        tuple((batch, 1024) for batch in (1, 8, 32, 64, 128)), ((1, 1024), (1, 4096), (64, 1024), (16, 4096))
    ),
    ("Qwen3-32B", 2): Cells(((1, 1024), (32, 1024)), ((1, 4096), (8, 4096), (32, 1024)), ("fixed", "mix")),
    ("Qwen3-8B", 1): Cells(((1, 1024), (32, 1024), (64, 1024)), ((1, 4096), (8, 4096))),
    ("Qwen3-0.6B", 1): Cells(((1, 1024), (32, 1024)), ((32, 1024), (8, 4096)), ("fixed", "mix")),
    ("rehearsal", 1): Cells(((1, 32), (3, 32)), ((3, 32), (2, 700)), ("fixed", "mix")),
}
QUICK = Cells(((1, 1024), (32, 1024)), ((1, 4096),))


@dataclass
class Run:
    """Repetitions against one server, and the rows they make."""

    args: argparse.Namespace
    served: Served
    rng: np.random.Generator
    rows: list[dict[str, Any]] = field(default_factory=list)
    first_s: dict[Cell, list[float]] = field(default_factory=lambda: defaultdict(list))  # time for 1 output token
    started: float = field(default_factory=time.perf_counter)

    def seconds(self, count: int, length: int, output_len: int) -> float:
        vocab = MODELS[self.args.model].vocab
        return self.served.seconds(draw(self.rng, [length] * count, vocab), [output_len] * count)

    def repeats(self) -> Iterator[int]:
        """Counts repetitions: `--reps`; fewer if they take more than `--cell-s` together, more if they take little."""
        started = time.perf_counter()
        for number in range(MOST_REPS):
            took_s = time.perf_counter() - started
            if number and (took_s > self.args.cell_s or (number >= self.args.reps and took_s > self.args.least_s)):
                return
            yield number

    def late(self, what: str) -> bool:
        """Whether `--budget-s` is spent; the row that is left out says so."""
        late = 0 < self.args.budget_s < time.perf_counter() - self.started
        if late:
            self.rows.append({"what": what, "left_out": f"after --budget-s {self.args.budget_s:g}"})
        return late

    def add(self, what: str, value: float, unit: str, beside: Beside, **more: Any) -> None:
        row = {"what": what, "value": round(value, 4), "unit": unit}
        row |= {key: round(known, 4) for key, known in vars(beside).items() if known is not None}
        self.rows.append(row | more)
        aside = ", ".join(f"{key} {row[key]:,.5g}" for key in ("floor", "peer", "target") if key in row)
        print(f"{what:36} {value:12,.2f} {unit:20} {aside}", flush=True)

    # ---- what is measured --------------------------------------------------------------------------------------------

    def warm_up(self, cells: Cells) -> None:
        """Every batch size once, short; and a full chunk of a prompt."""
        longest = max((length for _, length in (*cells.tpot, *cells.prefill)), default=0)
        for count in sorted({count for count, _ in cells.tpot}):
            self.seconds(count, 16, 4)
        if longest:
            self.seconds(2, longest, 2)
        if cells.loads:
            self.seconds(self.args.load_count, 16, 4)

    def tpot(self, batch: int, context: int) -> None:
        what = f"TPOT, {batch} x {context}"
        if self.late(what):
            return
        first, last, steps = [], [], []
        for _ in self.repeats():
            first.append(self.seconds(batch, context, 1))
            before = self.counts()
            last.append(self.seconds(batch, context, LAST))
            steps.append(self.counts() - before)
        self.first_s[batch, context] += first
        tpots = [1e3 * (b - a) / (LAST - 1) for a, b in zip(first, last, strict=True)]
        value = 1e3 * (statistics.median(last) - statistics.median(first)) / (LAST - 1)
        beside = reference.tpot(self.args.model, self.args.tp, batch, context)
        more = {"first_s": first, "last_s": last, "engine_steps": steps, "output_tok_s": round(batch / value * 1e3, 1)}
        self.add(what, value, "ms", beside, kind="tpot", batch=batch, context=context, each=tpots, **more)

    def counts(self) -> int:
        """Steps of the engine so far."""
        return int(self.served.info()["internal_states"][0]["steps_total"])

    def prefill(self, count: int, length: int) -> None:
        what = f"prefill, {count} x {length}"
        if not self.first_s[count, length]:  # a TPOT of the same prompts has measured it
            if self.late(what):
                return
            self.first_s[count, length] = [self.seconds(count, length, 1) for _ in self.repeats()]
        times = self.first_s[count, length]
        rate = count * length / statistics.median(times)
        beside = reference.prefill(self.args.model, self.args.tp, count, length)
        self.add(what, rate, "tok/s", beside, kind="prefill", count=count, length=length, first_s=times)

    def load(self, name: str) -> None:
        count, (low, high), (prompt, answer) = self.args.load_count, self.args.mix_range, self.args.fixed_lens
        what = f"output of {count} x ({prompt} -> {answer})" if name == "fixed" else f"output of {count} x the mix"
        if self.late(what):
            return
        times, tokens = [], 0
        for _ in self.repeats():
            lens = self.rng.integers(low, high + 1, (2, count)) if name == "mix" else np.full((2, count), prompt)
            outputs = [int(n) for n in lens[1]] if name == "mix" else [answer] * count
            prompts = draw(self.rng, [int(n) for n in lens[0]], MODELS[self.args.model].vocab)
            times.append(self.served.seconds(prompts, outputs) / sum(outputs))
            tokens += sum(outputs)
        rate = 1 / statistics.median(times)
        beside = reference.output(self.args.model, self.args.tp, name)
        each = [round(1 / seconds, 1) for seconds in times]
        self.add(what, rate, "output tok/s", beside, kind="output", load=name, each=each, output_tokens=tokens)


def chosen(args: argparse.Namespace) -> Cells:
    cells = QUICK if args.quick else DEFAULT.get((args.model, args.tp), QUICK)
    if args.tpot is None and args.prefill is None and args.loads is None:
        return cells
    return Cells(tuple(args.tpot or ()), tuple(args.prefill or ()), tuple(args.loads or ()))


def cell(text: str) -> Cell:
    """ "8x1024" to (8, 1024)."""
    count, _, length = text.partition("x")
    return int(count), int(length)


def measure(args: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    cells = chosen(args)
    more = ["--chunked-prefill-size", str(512 if args.rehearse else CHUNK), "--tp", str(args.tp), *extra]
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"model": args.model, "tp": args.tp, "flags": extra, "peer": reference.PEER, "rows": rows}
    with model_folder(args.model) as folder:
        flags = serve_flags(folder, args.model, *more, rehearse=args.rehearse)
        with Served(flags) as served:
            served.wait_ready()
            run = Run(args, served, np.random.default_rng(args.seed), rows)
            result["server"] = server_facts(served)
            run.add("start to ready", served.ready_s, "s", reference.ready(args.model, args.tp), kind="ready")
            run.warm_up(cells)
            try:
                for count, length in cells.tpot:
                    run.tpot(count, length)
                for count, length in cells.prefill:
                    run.prefill(count, length)
                for name in cells.loads:
                    run.load(name)
            except (OSError, RuntimeError) as error:  # what was measured before is worth keeping
                result["failed"] = str(error)
                print(served.process.tail(), flush=True)
            else:
                result["metrics"] = metrics(served)
    return result


def server_facts(served: Served) -> dict[str, Any]:
    """What the server says of itself: settings, pool, graphs; without what names the machine."""
    info = without_places(served.info())
    return {key: value for key, value in info.items() if value not in ("", None) and key != "model_path"}


def metrics(served: Served) -> dict[str, float]:
    """The engine's counters and gauges at the end."""
    page: str = served.process.get("/metrics")
    found: dict[str, float] = {}
    for line in page.splitlines():
        name, _, value = line.rpartition(" ")
        if not line.startswith("#") and "_bucket" not in line and float(value):
            found[name.partition("{")[0]] = float(value)
    return found


def main() -> int:
    argv, extra = split_flags(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="Qwen3-0.6B")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of the server")
    parser.add_argument("--tpot", type=cell, nargs="*", help="batch x context, such as 1x1024; given: no other cells")
    parser.add_argument("--prefill", type=cell, nargs="*", help="prompts x tokens, such as 1x4096")
    parser.add_argument("--loads", nargs="*", choices=("fixed", "mix"))
    parser.add_argument("--quick", action="store_true", help="TPOT at batch 1 and 32, one long prompt")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--cell-s", type=float, default=30, help="no further repetition of a cell after so long")
    parser.add_argument("--least-s", type=float, default=3, help="cells that took less are repeated more often")
    parser.add_argument("--budget-s", type=float, default=0, help="no further cell after so long; 0: no limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="added to the name of the results")
    parser.add_argument("--json", default="", help="where results go (default: benchmarks/results/)")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    args = parser.parse_args(argv)
    args.load_count, args.mix_range, args.fixed_lens = 256, (100, 1024), (128, 512)
    if args.rehearse:
        args.model, args.load_count, args.mix_range, args.fixed_lens = REHEARSAL.name, 8, (10, 100), (16, 24)
        args.least_s = 0.0
    end_on_sigterm()
    result = measure(args, extra)
    name = "-".join(["gpu-engine", args.model.lower(), f"tp{args.tp}", *([args.label] if args.label else [])])
    if args.json or not args.rehearse:
        told = {"label": args.label, "settings": {"seed": args.seed, "reps": args.reps}}
        print(write(name, told | result, args.json).name)
    if "failed" in result:
        print(f"failed: {result['failed']}", file=sys.stderr)
    return int("failed" in result)


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """This script's flags, and those after `--`, which are the server's."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
