"""Prefill and decode apart against unified servers behind the same router, on the same number of GPUs.

    python -m benchmarks.gpu.serve --model Qwen3-32B --topology u+u p+d [--only tail first goodput] [-- SERVER FLAGS]
    python -m benchmarks.gpu.serve --model Qwen3-32B --topology u+u+u+u p+p+d2

For each topology, one after the other on the same GPUs (`u`, `p`, `d`: a unified, prefill or decode server; a number
after it: on so many GPUs):

* `first`: TTFT of a prompt on idle servers beside what its prefill server computed, and how fast its KV moved;
* `tail`: the inter-token latency of 32 running streams, alone, then while prompts of 4k to 16k tokens arrive without
  pause;
* `goodput`: the highest rate of Poisson arrivals (prompts of 2k to 12k tokens, answers of about 350) at which 90 % of
  the requests have their first token within 2 s and the 99th percentile of their inter-token latencies within 25 ms.
  `--rates` measures given rates instead of searching.

Prompts are random tokens, without a prefix cache; the same requests go to every topology. What the load generator cost
and how late it was is in the results: `client_bottleneck` says when not to believe them. One file of results for
each topology. `--rehearse` runs all of it with a tiny model on the CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

import numpy as np
import uvloop

from benchmarks.gpu import slo, tails
from benchmarks.gpu.engine import server_facts, split_flags
from benchmarks.gpu.models import MODELS, REHEARSAL, model_folder
from benchmarks.gpu.topology import Topology, parse, running
from benchmarks.programs import end_on_sigterm
from benchmarks.results import write
from diptych.bench.backends import Generate, Options
from diptych.bench.client import Client

PARTS = ("first", "tail", "goodput")


async def warm_up(topology: Topology, args: argparse.Namespace) -> None:
    """Every server has seen the sizes that come: prompts one by one and together, decode steps of many sequences."""
    rng = np.random.default_rng(1 << 20)
    vocab = MODELS[args.model].vocab
    short, long = args.prompt_len
    async with Client(topology.url, Generate(), Options()) as client:
        for length, count in ((short, 1), (long, 1), (short // 4, args.streams), (short, 4)):
            rows = [tails.row(rng, length, 16, vocab) for _ in range(count * len(topology.servers))]
            tails.check(await asyncio.gather(*(client.send(row) for row in rows)))


async def goodput(topology: Topology, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fills `result` as it goes."""
    limits = slo.Slo(args.ttft_ms / 1e3, args.itl_ms / 1e3)
    mix = slo.Mix(tuple(args.prompt_len), tuple(args.answer_len), MODELS[args.model].vocab, args.duration_s, args.least)
    runs: list[dict[str, Any]] = []
    result |= {"limits": vars(limits), "share": args.share, "runs": runs}

    async def at(rate: float) -> bool:
        found = await slo.run(topology.url, mix, limits, rate, args.share, args.seed, whole=bool(args.rates))
        await asyncio.to_thread(topology.settle)
        runs.append(found)
        met = f"{found['share_met']:.0%} met{' at most' if found['cut_short'] else ''}"
        ends = f"TTFT p99 {found['p99_ttft_ms']} ms, ITL p99 {found['p99_itl_ms']} ms"
        late = ", the client was late" if found["client_bottleneck"] else ""
        print(f"  {rate:.3f} requests/s: {met}; {ends}, {found['duration_s']} s{late}", flush=True)
        return bool(found["holds"])

    if args.rates:
        for rate in args.rates:
            await at(rate)
        result["highest_rate"] = max((found["rate"] for found in runs if found["holds"]), default=0.0)
    else:
        search = slo.Search(args.start_rate, args.runs)
        while not search.done:
            search.add(await at(search.rate))
        result |= {"highest_rate": round(search.holds, 4), "lowest_that_fails": round(search.fails, 4)}


async def measure(topology: Topology, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fills `result` as it goes, so that what was measured survives a failure later."""
    vocab = MODELS[args.model].vocab
    await warm_up(topology, args)
    await asyncio.to_thread(topology.settle)
    if "first" in args.only:
        result["first"] = await tails.first_tokens(topology, args.first_len, args.reps, vocab, args.seed)
        for found in result["first"]:
            print("  first token: " + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    if "tail" in args.only:
        load = tails.TailLoad(args.streams, args.stream_len, tuple(args.long_len), args.tail_s, vocab)
        result["tail"] = await tails.tail(topology.url, load, args.seed)
        await asyncio.to_thread(topology.settle)
        print("  tail: " + ", ".join(f"{key} {value}" for key, value in result["tail"].items()), flush=True)
    if "goodput" in args.only:
        result["goodput"] = {}
        await goodput(topology, args, result["goodput"])
        print(f"  highest rate that holds: {result['goodput']['highest_rate']} requests/s", flush=True)


def one(text: str, folder: str, args: argparse.Namespace, extra: list[str], result: dict[str, Any]) -> None:
    """All results of one topology."""
    result |= {"model": args.model, "topology": text, "flags": extra, "policy": args.policy}
    print(f"== {args.model}, {text}", flush=True)
    with running(text, folder, args.model, args.gpus, extra, args.policy, args.rehearse) as topology:
        result["ready_s"] = [round(server.ready_s, 1) for server in topology.servers]
        print(f"  ready after {result['ready_s']} s", flush=True)
        result["servers"] = [server_facts(server) for server in topology.servers]
        try:
            uvloop.run(measure(topology, args, result))
        except (OSError, RuntimeError) as error:
            result["failed"] = str(error)
            print(*(server.process.tail() for server in (*topology.servers, topology.router)), sep="\n", flush=True)


def keep(text: str, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Writes one topology's results, also if it was cut off."""
    name = "-".join(["gpu-serve", args.model.lower(), text.replace("+", "-"), *filter(None, [args.label])])
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "topology")}
    output = f"{args.json.removesuffix('.json')}-{text.replace('+', '-')}.json" if args.json else ""
    print(write(name, {"settings": settings, **result}, output).name, flush=True)


def main() -> int:
    argv, extra = split_flags(sys.argv[1:])
    args = arguments(argv)
    end_on_sigterm()
    failed = []
    with model_folder(args.model) as folder:
        for text in args.topology:
            result: dict[str, Any] = {}
            try:
                one(text, folder, args, extra, result)
            finally:
                if args.json or not args.rehearse:
                    keep(text, args, result)
            if "failed" in result:
                failed.append(f"{text}: {result['failed']}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failed))


def arguments(argv: list[str]) -> argparse.Namespace:
    """The flags, checked; those of a rehearsal made small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="Qwen3-32B")
    parser.add_argument("--topology", nargs="+", default=["u+u", "p+d"], help="all on the same number of GPUs")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(range(8)), help="their numbers; the first are used")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--policy", default="least_load", help="of the router")
    parser.add_argument("--ttft-ms", type=float, default=2000)
    parser.add_argument("--itl-ms", type=float, default=25, help="limit of a request's own 99th percentile")
    parser.add_argument("--share", type=float, default=0.9, help="of the requests that must meet both")
    parser.add_argument("--prompt-len", type=int, nargs=2, default=[2000, 12000], metavar=("LEAST", "MOST"))
    parser.add_argument("--answer-len", type=int, nargs=2, default=[300, 400], metavar=("LEAST", "MOST"))
    parser.add_argument("--start-rate", type=float, default=0.5, help="requests per second that a search begins with")
    parser.add_argument("--runs", type=int, default=6, help="of a search, at most")
    parser.add_argument("--rates", type=float, nargs="*", help="measure these in whole, do not search")
    parser.add_argument("--duration-s", type=float, default=45, help="for which requests arrive in a run")
    parser.add_argument("--least", type=int, default=24, help="requests of a run, even if they take longer to arrive")
    parser.add_argument("--streams", type=int, default=32, help="that are running in `tail`")
    parser.add_argument("--stream-len", type=int, default=1024, help="tokens of their prompts")
    parser.add_argument("--long-len", type=int, nargs=2, default=[4096, 16384], metavar=("LEAST", "MOST"))
    parser.add_argument("--tail-s", type=float, default=20, help="for which long prompts are kept up")
    parser.add_argument("--first-len", type=int, nargs="+", default=[1024, 4096, 16384], help="prompts of `first`")
    parser.add_argument("--reps", type=int, default=5, help="of `first`, after a warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="added to the names of the results")
    parser.add_argument("--json", default="", help="where results go, the topology is added (default: results/)")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU; figures mean nothing")
    args = parser.parse_args(argv)
    try:
        sizes = {text: sum(part.tp for part in parse(text)) for text in args.topology}
    except ValueError as error:
        parser.error(str(error))
    if len(set(sizes.values())) > 1:
        parser.error(f"compared must be the same number of GPUs, not {sizes}")
    if args.rehearse:
        args.model, args.prompt_len, args.answer_len, args.start_rate = REHEARSAL.name, [30, 190], [20, 30], 4.0
        args.duration_s, args.least, args.runs, args.streams, args.stream_len = 2.0, 8, 3, 4, 16
        args.long_len, args.tail_s, args.first_len, args.reps = [64, 256], 2.0, [64, 256], 2
    return args


if __name__ == "__main__":
    sys.exit(main())
