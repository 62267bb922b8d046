"""One benchmark: find the server, make the rows, warm up, drive the load, add up the figures."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from diptych.bench.arrivals import arrival_offsets
from diptych.bench.backends import BACKENDS, Options
from diptych.bench.client import Client
from diptych.bench.dataset import Row, load_rows
from diptych.bench.load import LagWatch, drive
from diptych.bench.machine import describe_machine, without_places
from diptych.bench.report import RunProgress, details
from diptych.bench.sample import Sample
from diptych.bench.server import Server
from diptych.bench.stats import client_figures, goodput, parse_slo, summarize
from diptych.bench.tokens import Tokens
from diptych.errors import ConfigError, UpstreamError
from diptych.types import FAKE_BOOTSTRAP_HOST


async def benchmark(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The result of one run, ready for JSON. Raises ConfigError (flags), Unavailable or UpstreamError (the server)."""
    slo = parse_slo(args.goodput)
    url, headers = base_url(args), request_headers(args.header)
    async with Server(url, headers) as server:
        await server.wait_ready(args.ready_check_timeout_sec)
        model = args.model or await server.model_name()
        tokens = await _tokens(args, server)
        rows = load_rows(args, tokens)
        offsets_s = arrival_offsets(len(rows), args.request_rate, args.seed)
        options = Options(model=model, stream=not args.disable_stream, ignore_eos=not args.disable_ignore_eos)
        client = Client(
            url,
            BACKENDS[args.backend](),
            options,
            headers=headers,
            extra=_extra_body(args),
            timeout_s=args.request_timeout,
        )
        async with client:
            await _warm_up(client, rows[0], args.warmup_requests)
            if args.flush_cache:
                await server.flush_cache()
            with RunProgress(len(rows), console, quiet=args.disable_tqdm) as progress:
                samples, duration_s, watched = await _measure(
                    client, rows, list(offsets_s), args.max_concurrency, progress
                )
            if not samples:
                raise KeyboardInterrupt
        server_info = await server.info()
    retokenized = sum(tokens.count(sample.text) for sample in samples if not sample.error) if tokens else None
    return {
        **_arguments(args, model),
        "interrupted": len(samples) < len(rows),
        "server_info": without_places(server_info),
        **summarize(samples, duration_s, retokenized=retokenized),
        "accept_length": _accept_length(server_info),
        **(goodput(samples, duration_s, slo) if slo else {}),
        **watched,
        "machine": describe_machine(),
        **(details(samples) if args.output_details else {}),
    }


async def _measure(
    client: Client, rows: Sequence[Row], offsets_s: list[float], max_concurrency: int | None, progress: RunProgress
) -> tuple[list[Sample], float, dict[str, Any]]:
    """Drive the load; samples, seconds it took, and the client's own figures. Ctrl-C ends it: then the samples are
    those of the requests that have finished, in that order.
    """
    gc.collect()
    gc.freeze()  # the rows stay: no collection has to walk them while requests are timed
    async with LagWatch() as lag:
        start_s, cpu_start_s = time.perf_counter(), time.process_time()
        samples = await _until_interrupt(
            lambda on_done: drive(rows, offsets_s, max_concurrency, client.send, on_done), progress
        )
        duration_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_start_s
    gc.unfreeze()
    num_chunks = sum(sample.num_chunks for sample in samples)
    return samples, duration_s, client_figures(lag.lags_s, cpu_s, duration_s, num_chunks)


async def _until_interrupt(
    start: Callable[[Callable[[Sample], None]], Coroutine[Any, Any, list[Sample]]], progress: RunProgress
) -> list[Sample]:
    """What `start` gives or, if SIGINT comes first, the samples that were done by then."""
    done: list[Sample] = []
    interrupted = False

    def one_done(sample: Sample) -> None:
        done.append(sample)
        progress.one_done(sample)

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        task.cancel()

    task = asyncio.create_task(start(one_done))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        if not interrupted:
            raise
        return done
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _warm_up(client: Client, row: Row, num: int) -> None:
    """`num` copies of the first request at once, at most 32 tokens each. Raises UpstreamError if none succeeds."""
    if not num:
        return
    short = msgspec.structs.replace(row, output_len=min(row.output_len, 32))
    samples = await asyncio.gather(*(client.send(short) for _ in range(num)))
    if all(sample.error for sample in samples):
        raise UpstreamError(f"the warm-up request failed: {samples[0].error}")


async def _tokens(args: argparse.Namespace, server: Server) -> Tokens | None:
    """The tokenizer given, else that of the server's model where its folder is on this machine."""
    if args.tokenizer:
        return Tokens.open(args.tokenizer)
    info = await server.model_info()
    candidates = (args.model, info.get("tokenizer_path"), info.get("model_path"))
    folders = [folder for folder in candidates if folder and (Path(folder) / "tokenizer.json").is_file()]
    return Tokens.open(folders[0]) if folders else None


def base_url(args: argparse.Namespace) -> str:
    if args.base_url:
        return str(args.base_url).rstrip("/")
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"http://{host}:{args.port}"


def request_headers(items: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` items, and the bearer key from OPENAI_API_KEY or DIPTYCH_API_KEY. Raises ConfigError."""
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("DIPTYCH_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for item in items:
        name, mark, value = item.partition("=")
        if not mark or not name:
            raise ConfigError(f"--header {name}: give NAME=VALUE")
        headers[name] = value
    return headers


def _extra_body(args: argparse.Namespace) -> dict[str, Any]:
    extra: dict[str, Any] = {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": 0} if args.fake_prefill else {}
    if args.extra_request_body:
        try:
            extra |= msgspec.json.decode(args.extra_request_body, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigError(f"--extra-request-body: not a JSON object ({error})") from None
    return extra


def _arguments(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """The run's settings that belong to its figures."""
    rate = args.request_rate
    return {
        "tag": args.tag,
        "backend": args.backend,
        "model": without_places(model),
        "dataset_name": args.dataset_name,
        "request_rate": "inf" if rate == float("inf") else rate,
        "max_concurrency": args.max_concurrency,
        "num_prompts": args.num_prompts,
        "sharegpt_output_len": args.sharegpt_output_len,
        "random_input_len": args.random_input_len,
        "random_output_len": args.random_output_len,
        "random_range_ratio": args.random_range_ratio,
        "stream": not args.disable_stream,
        "ignore_eos": not args.disable_ignore_eos,
        "seed": args.seed,
    }


def _accept_length(server_info: dict[str, Any]) -> float | None:
    """Tokens accepted a step by a server that speculates, where it says so."""
    states = server_info.get("internal_states")
    state = states[0] if isinstance(states, list) and states else {}
    return state.get("avg_spec_accept_length") if isinstance(state, dict) else None
