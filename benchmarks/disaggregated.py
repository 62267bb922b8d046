"""What long prompts do to running streams: two prefill servers and one decode server against unified servers.

Three topologies of real processes on this machine take turns: `unified` (one server), `unified x 3` (three behind
the router) and `2P1D` (two prefill, one decode behind the router; as many processes as the one before). In each, a few
streams decode all the time while long prompts arrive at random moments (Poisson, the same for all). What counts is the
tail of the streams' inter-token latency while long prompts are being computed, and what the long prompts pay for it.

    python benchmarks/disaggregated.py [--model models/demo] [--rounds 3] [--streams 8] [--long-len 3000] ...
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import results
from programs import end_on_sigterm, programs, server_command, settle

from diptych.bench.arrivals import arrival_offsets
from diptych.bench.backends import Generate, Options
from diptych.bench.client import Client
from diptych.bench.dataset import Row
from diptych.bench.load import drive
from diptych.bench.sample import Sample
from diptych.bench.stats import describe, token_times
from diptych.bench.tokens import Tokens

TOPOLOGIES = ("unified", "unified x 3", "2P1D")


@contextmanager
def topology(name: str, model: str) -> Iterator[str]:
    """The URL of a running topology."""
    unified = server_command(model)
    route = ["route", "--port", "0", "--log-level", "warning"]
    if name == "unified":
        with programs(unified) as (server,):
            yield server.url
    elif name == "unified x 3":
        with programs(unified, unified, unified) as servers:
            urls = [server.url for server in servers]
            with programs([*route, "--policy", "round_robin", "--worker-urls", *urls]) as (router,):
                yield router.url
    else:
        prefill = server_command(model, "--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", "0")
        decode = server_command(model, "--disaggregation-mode", "decode")
        with programs(prefill, prefill, decode) as servers:
            pairs = [flag for server in servers[:2] for flag in ("--prefill", server.url, bootstrap_port(server.url))]
            pd = ["--pd-disaggregation", *pairs, "--decode", servers[2].url, "--policy", "round_robin"]
            with programs([*route, *pd]) as (router,):
                yield router.url


def bootstrap_port(url: str) -> str:
    with urllib.request.urlopen(f"{url}/server_info", timeout=30) as reply:
        return str(json.load(reply)["disaggregation_bootstrap_port"])


class Load:
    """The prompts and arrivals of one round: the same for every topology."""

    def __init__(self, args: argparse.Namespace, number: int) -> None:
        tokens = Tokens.open(args.model)
        rng = np.random.default_rng((args.seed, number))
        self.streams = [
            row(tokens.random_ids(rng, args.stream_len), args.stream_output_len) for _ in range(args.streams)
        ]
        self.longs = [row(tokens.random_ids(rng, args.long_len), args.long_output_len) for _ in range(args.num_long)]
        self.offsets_s = [1.0 + t for t in arrival_offsets(args.num_long, args.long_rate, args.seed + number)]


def row(prompt: list[int], output_len: int) -> Row:
    return Row(prompt=prompt, prompt_len=len(prompt), output_len=output_len)


async def play(url: str, load: Load) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """The streams alone; then the streams, again and again, while the long prompts come; then the long prompts."""
    async with Client(url, Generate(), Options()) as client:
        await asyncio.gather(*(client.send(short) for short in load.streams[:2]))  # warm-up
        alone = list(await asyncio.gather(*(client.send(stream) for stream in load.streams)))
        over = asyncio.Event()
        beside: list[Sample] = []

        async def keep_streaming(stream: Row) -> None:
            while not over.is_set():
                beside.append(await client.send(stream))

        async with asyncio.TaskGroup() as group:
            for stream in load.streams:
                group.create_task(keep_streaming(stream))
            longs = await drive(load.longs, load.offsets_s, None, client.send, lambda sample: None)
            over.set()
    return alone, beside, longs


def itls_within(samples: Sequence[Sample], spans: Sequence[tuple[float, float]]) -> list[float]:
    """Inter-token latencies that overlap one of `spans` (start, end), all on the client's clock."""
    found = []
    for sample in samples:
        for start, end in itertools.pairwise(token_times(sample)):
            if any(start < last and end > first for first, last in spans):
                found.append(end - start)
    return found


def figures(alone: list[Sample], beside: list[Sample], longs: list[Sample]) -> dict[str, Any]:
    failed = next((sample.error for sample in (*alone, *beside, *longs) if sample.error), "")
    if failed:
        raise RuntimeError(f"a request failed: {failed}")
    prefilling = [(long.start_s, long.start_s + (long.ttft_s or long.latency_s)) for long in longs]
    hit = itls_within(beside, prefilling)
    found = {
        **describe("itl_alone", [itl for sample in alone for itl in sample.itls_s]),
        **describe("itl_beside", hit),
        "max_itl_beside_ms": max(hit) * 1e3,
        "num_itls_beside": len(hit),
        **describe("long_ttft", [long.ttft_s or 0.0 for long in longs]),
    }
    return {key: round(value, 3) for key, value in found.items()}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        load = Load(args, number)
        taken: dict[str, dict[str, Any]] = {}
        answers = []
        for name in TOPOLOGIES[number % 3 :] + TOPOLOGIES[: number % 3]:
            with topology(name, args.model) as url:
                settle()
                samples = asyncio.run(play(url, load))
            taken[name] = figures(*samples)
            answers.append([long.output_ids for long in samples[2]])
            print(f"round {number}: {progress(name, taken[name])}", flush=True)
        rounds.append({"round": number, "equal_outputs": all(a == answers[0] for a in answers), **taken})
    return {
        "settings": results.settings(args),
        **{name: summary([r[name] for r in rounds]) for name in TOPOLOGIES},
        "equal_outputs": all(r["equal_outputs"] for r in rounds),
        "rounds": rounds,
    }


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("median_itl_alone_ms", "p99_itl_alone_ms", "median_itl_beside_ms", "p99_itl_beside_ms", "max_itl_beside_ms")
    return {key: results.spread([one[key] for one in found]) for key in (*keys, "mean_long_ttft_ms")}


def progress(name: str, found: dict[str, Any]) -> str:
    alone = f"{found['median_itl_alone_ms']:.1f} (p99 {found['p99_itl_alone_ms']:.1f})"
    tail = f"p99 {found['p99_itl_beside_ms']:.1f}, max {found['max_itl_beside_ms']:.1f}"
    beside = f"{found['median_itl_beside_ms']:.1f} ({tail})"
    return f"{name}: ITL alone {alone}, beside long prompts {beside}; their TTFT {found['mean_long_ttft_ms']:.0f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=8, help="that decode all the time")
    parser.add_argument("--stream-len", type=int, default=32, help="tokens of their prompts")
    parser.add_argument("--stream-output-len", type=int, default=128)
    parser.add_argument("--num-long", type=int, default=8, help="long prompts a round")
    parser.add_argument("--long-len", type=int, default=3000, help="tokens")
    parser.add_argument("--long-output-len", type=int, default=4)
    parser.add_argument("--long-rate", type=float, default=0.5, help="long prompts a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="", help="file (default: benchmarks/results/disaggregated-<machine>.json)")
    args = parser.parse_args()
    end_on_sigterm()
    result = compare(args)
    path = results.write("disaggregated", result, args.output)
    for name in TOPOLOGIES:
        tail = result[name]["p99_itl_beside_ms"]
        print(f"{name}: p99 ITL beside long prompts {tail['median']:.1f} ms ({tail['min']:.1f} to {tail['max']:.1f})")
    print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
