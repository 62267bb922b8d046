"""`diptych bench`: its flags (SGLang's names) and its handler."""

from __future__ import annotations

import argparse
from typing import Any

# Every `diptych` command builds this parser: what runs a benchmark is imported when one runs.
BACKENDS = ("sglang", "sglang-oai", "sglang-oai-chat")
DATASETS = ("random", "random-ids", "generated-shared-prefix", "custom", "openai")


def add_command(subparsers: Any) -> None:
    """Put `bench` on `subparsers`; the parsed namespace has `handler` set to `run_bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure a server or a router over HTTP",
        description="Send requests to a server or a router and measure TTFT, TPOT, ITL, E2E, throughput and goodput.",
        allow_abbrev=False,
    )
    add_flags(parser)
    parser.set_defaults(handler=run_bench)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="sglang", help="/generate, completions or chat")
    parser.add_argument("--base-url", default="", help="the server's URL (default: from --host and --port)")
    parser.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=30000, help="(default: 30000)")
    parser.add_argument(
        "--ready-check-timeout-sec", type=float, default=60.0, help="wait for the server; 0: do not (default: 60)"
    )
    parser.add_argument("--model", default="", help="name that requests carry (default: the server's first)")
    parser.add_argument(
        "--tokenizer", default="", help="folder with tokenizer.json (default: the served model's, if it is here)"
    )
    parser.add_argument("--header", nargs="+", default=[], metavar="NAME=VALUE", help="headers of every request")
    _data(parser.add_argument_group("what is asked"))
    _load(parser.add_argument_group("how it is sent"))
    _output(parser.add_argument_group("what comes out"))


def _data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dataset-name", choices=DATASETS, default="random", help="(default: random)")
    group.add_argument("--dataset-path", default="", help="JSON lines of custom or openai")
    group.add_argument("--num-prompts", type=_positive, default=1000, help="requests (default: 1000)")
    group.add_argument("--random-input-len", type=_positive, default=1024, help="tokens (default: 1024)")
    group.add_argument("--random-output-len", type=_positive, default=1024, help="tokens (default: 1024)")
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, help="lengths are uniform over [ratio x len, len] (default: 0)"
    )
    group.add_argument(
        "--sharegpt-output-len", type=_positive, default=None, help="output tokens of each row of custom or openai"
    )
    group.add_argument(
        "--gsp-num-groups", type=_positive, default=64, help="system prompts of generated-shared-prefix (default: 64)"
    )
    group.add_argument("--gsp-prompts-per-group", type=_positive, default=16, help="questions to each (default: 16)")
    group.add_argument("--gsp-system-prompt-len", type=_positive, default=2048, help="tokens (default: 2048)")
    group.add_argument("--gsp-question-len", type=_positive, default=128, help="tokens (default: 128)")
    group.add_argument("--gsp-output-len", type=_positive, default=256, help="tokens (default: 256)")
    group.add_argument("--gsp-ordered", action="store_true", help="group after group, not shuffled")
    group.add_argument("--disable-ignore-eos", action="store_true", help="let answers end where the model ends them")
    group.add_argument("--extra-request-body", default="", metavar="JSON", help="object merged into every request")
    group.add_argument(
        "--fake-prefill", action="store_true", help="measure a decode server alone: a hand-over with nobody"
    )
    group.add_argument("--seed", type=int, default=42, help="of prompts, lengths and arrivals (default: 42)")


def _load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        help="Poisson arrivals per second; inf: all at once (default)",
    )
    group.add_argument(
        "--max-concurrency", type=_positive, default=None, help="requests under way at most: a closed loop"
    )
    group.add_argument("--warmup-requests", type=int, default=1, help="not measured (default: 1)")
    group.add_argument("--flush-cache", action="store_true", help="empty the server's prefix cache after the warm-up")
    group.add_argument("--disable-stream", action="store_true", help="whole answers: no TTFT, TPOT or ITL")
    group.add_argument(
        "--request-timeout", type=float, default=600.0, help="seconds before a request counts as failed (default: 600)"
    )


def _output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="limits a request must meet: ttft:2000 tpot:25 e2e:9000",
    )
    group.add_argument("--output-file", default="", help="file that a line of JSON is added to")
    group.add_argument(
        "--output-details", action="store_true", help="add lengths, latencies, texts and errors of each request"
    )
    group.add_argument("--tag", default=None, help="word to find the run by, kept in the JSON")
    group.add_argument("--disable-tqdm", action="store_true", help="show no progress")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def run_bench(args: argparse.Namespace) -> int:
    """Run it, print the block, write the JSON. Raises DiptychError.

    Exit status 0; 1 if no request succeeded; 130 after Ctrl-C, which keeps the figures of what had finished.
    """
    import uvloop
    from rich.console import Console

    from diptych.bench.report import append_line, result_block
    from diptych.bench.run import benchmark

    result = uvloop.run(benchmark(args, Console(stderr=True)))
    print(result_block(result))
    if args.output_file:
        append_line(args.output_file, result)
    return 130 if result["interrupted"] else 0 if result["completed"] else 1
