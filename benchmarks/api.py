"""What the API process costs for a token: its CPU time while an engine makes a token for each of many requests a step.

The API process is the real one (application, channel to the engine, uvloop) in a process of its own; this one is its
engine, which makes no tokens but sends them, and its clients. A step follows when every stream has shown the one
before it, so no two tokens of a stream share an event, and not sooner than `--interval-ms`. With `--unpaced` steps
follow by the clock alone, as an engine's do: what the API process cannot show in time it shows together. Prints JSON.

    python benchmarks/api.py [--requests 256] [--tokens 512] [--case NAME ...] [--profile] [--output FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from types import FrameType
from typing import Any

import psutil
import results
import uvloop
from programs import ROOT

from diptych import net
from diptych.api.app import build_app, spare_collector
from diptych.api.site import start_site
from diptych.config import ServerConfig
from diptych.engine.channel import Channel
from diptych.engine.client import EngineLink
from diptych.text.tokenizer import Tokenizer
from diptych.types import (
    Complete,
    Finish,
    FromEngine,
    ModelInfo,
    Output,
    Outputs,
    Request,
    Submit,
    ToEngine,
    TokenLogprob,
)

MODEL = str(ROOT / "models" / "demo")
CHAT = "/v1/chat/completions"
NEVER = ["\n\nUser:", "<end of the answer>"]  # stop strings that the text does not have
TIMEOUT_S = 600.0
SAMPLE_S = 0.001
Body = dict[str, Any]


def native(**more: Any) -> Body:
    return {
        "input_ids": [1, 2, 3, 4],
        **more,
        "sampling_params": {"ignore_eos": True, **more.get("sampling_params", {})},
    }


def chat(**more: Any) -> Body:
    return {"messages": [{"role": "user", "content": "Tell me about the sea."}], "ignore_eos": True, **more}


CASES: dict[str, tuple[str, Body]] = {
    "generate": ("/generate", native()),
    "generate_batch": ("/generate", native()),  # all in one request
    "generate_stops": ("/generate", native(sampling_params={"stop": NEVER})),
    "generate_logprobs": ("/generate", native(return_logprob=True)),
    "chat": (CHAT, chat()),
    "chat_stream": (CHAT, chat(stream=True)),
    "chat_stream_stops": (CHAT, chat(stream=True, stop=NEVER)),
    "chat_stream_logprobs": (CHAT, chat(stream=True, logprobs=True)),
    "completions_stream": ("/v1/completions", {"prompt": [1, 2, 3, 4], "ignore_eos": True, "stream": True}),
}


# ---- the API process ---------------------------------------------------------------------------------------------


async def serve(fd: int, metrics: bool, profile: bool) -> None:
    """Serve until the engine closes `fd`. The port and, with `profile`, the samples go to standard output."""
    info = ModelInfo(
        architecture="benchmark",
        vocab_size=1 << 20,
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        kv_dtype="float32",
        context_len=1 << 20,
        eos_token_ids=(),
        num_parameters=1,
        weight_bytes=1,
        fingerprint="",
    )
    gone = asyncio.Event()
    channel = Channel(FromEngine, lambda message: link.receive(message), gone.set)
    link = EngineLink(channel.send, info, 1 << 20)
    app = build_app(ServerConfig(model_path=MODEL, enable_metrics=metrics, sampling_defaults="openai"), link)
    sock = net.listen_socket("127.0.0.1", 0)
    runner = await start_site(app, sock)
    await channel.open(fd)
    spare_collector()
    samples: Counter[str] = Counter()
    if profile:
        signal.signal(signal.SIGPROF, lambda _, frame: samples.update([place_of(frame)]))
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_S, SAMPLE_S)
    print(sock.getsockname()[1], flush=True)
    await gone.wait()
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(dict(samples.most_common(40))), flush=True)
    await runner.cleanup()


def place_of(frame: FrameType | None) -> str:
    """file.function of a sample; what C code does counts for the function that called it."""
    if frame is None:
        return ""
    return f"{os.path.basename(frame.f_code.co_filename).removesuffix('.py')}.{frame.f_code.co_name}"


# ---- its engine --------------------------------------------------------------------------------------------------


class FakeEngine:
    """Knows what to say beforehand: real words, one token a request and step."""

    def __init__(self, count: int, num_tokens: int) -> None:
        tokenizer = Tokenizer.load(MODEL)
        words = tokenizer.encode("The sea is wide and deep, and its waves never rest. " * num_tokens, special=False)
        self._words, self._num_tokens, self._count = words, num_tokens, count
        self._requests: list[Request] = []
        self._begin = asyncio.Event()
        self.closed = asyncio.Event()
        self.channel = Channel(ToEngine, self._hear, self.closed.set)

    def _hear(self, message: ToEngine) -> None:
        if isinstance(message, Complete) or not isinstance(message, Submit):
            raise RuntimeError(f"the API process ended a request early: {message}")
        self._requests.append(message.request)
        if len(self._requests) == self._count:
            self._begin.set()

    async def begin(self) -> None:
        """Wait until all requests are here."""
        await self._begin.wait()
        self._begin.clear()

    def step(self, number: int) -> None:
        last = number == self._num_tokens - 1
        outputs = [self._output(index, request, number, last) for index, request in enumerate(self._requests)]
        self.channel.send(Outputs(outputs))
        if last:
            self._requests.clear()

    def _output(self, index: int, request: Request, number: int, last: bool) -> Output:
        token = self._words[index + number]
        return Output(
            rid=request.rid,
            tokens=[token],
            logprobs=[TokenLogprob(-1.25 - index, token)] if request.logprobs else None,
            finish=Finish("length") if last else None,
            prompt_tokens=len(request.prompt),
            cached_tokens=3,
        )


# ---- its clients -------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One request on a connection of its own, which its server closes after the answer."""

    def __init__(self, heard: asyncio.Event) -> None:
        self._heard = heard
        self.answer = bytearray()
        self.fresh = False  # something came since somebody looked
        self.over = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.answer += data
        self.fresh = True
        self._heard.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set_result(None)

    def check(self, stream: bool, tokens: int) -> None:
        """Raise unless the answer is whole."""
        complete = b"[DONE]" in self.answer and self.answer.count(b"data: ") >= tokens if stream else True
        if b" 200 OK" not in self.answer[:20] or b'"length"' not in self.answer or not complete:
            raise RuntimeError(f"not the answer that was asked for: {bytes(self.answer[:400])!r}")


def request_bytes(path: str, body: Body) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return b"%bcontent-length: %d\r\n\r\n%b" % (head.encode(), len(data), data)


async def ask(port: int, name: str, args: argparse.Namespace, heard: asyncio.Event) -> list[Client]:
    """Send a case's requests."""
    path, body = CASES[name]
    body = dict(body)
    if path == "/generate":
        body["sampling_params"] = {**body["sampling_params"], "max_new_tokens": args.tokens}
    else:
        body["max_tokens"] = args.tokens
    count = args.requests
    if name == "generate_batch":
        body["input_ids"], count = [body["input_ids"]] * count, 1
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(count):
        transport, client = await loop.create_connection(lambda: Client(heard), "127.0.0.1", port)
        transport.write(request_bytes(path, body))
        clients.append(client)
    return clients


async def run_case(name: str, port: int, pid: int, engine: FakeEngine, args: argparse.Namespace) -> dict[str, float]:
    """One round of a case: CPU time of the API process, from before the first request to after the last answer."""
    process, heard = psutil.Process(pid), asyncio.Event()
    stream = bool(CASES[name][1].get("stream"))
    before, start = process.cpu_times(), time.perf_counter()
    async with asyncio.timeout(TIMEOUT_S):
        clients = await ask(port, name, args, heard)
        await engine.begin()
        for number in range(args.tokens):
            engine.step(number)
            await asyncio.sleep(args.interval_ms / 1000)
            while stream and not args.unpaced and not all(client.fresh for client in clients):
                heard.clear()
                await heard.wait()
            for client in clients:
                client.fresh = False
        await asyncio.gather(*(client.over for client in clients))
    after, wall_s = process.cpu_times(), time.perf_counter() - start
    for client in clients:
        client.check(stream, 0 if args.unpaced else args.tokens)
    tokens = args.requests * args.tokens
    user, system = after.user - before.user, after.system - before.system
    return {
        "cpu_us_per_token": round((user + system) / tokens * 1e6, 2),
        "user_us": round(user / tokens * 1e6, 2),
        "system_us": round(system / tokens * 1e6, 2),
        "tokens_per_s": round(tokens / wall_s),
        "answer_bytes_per_token": round(sum(len(client.answer) for client in clients) / tokens, 1),
    }


async def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of a case in a fresh API process; the first, which warms it up, does not count."""
    ours, theirs = socket.socketpair()
    flags = [*(["--profile"] if args.profile else []), *(["--metrics"] if args.metrics else [])]
    command = [sys.executable, __file__, "--serve", str(theirs.fileno()), *flags]
    child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE)  # noqa: ASYNC220
    theirs.close()
    engine = FakeEngine(args.requests, args.tokens)
    await engine.channel.open(ours.detach())
    assert child.stdout is not None
    port = int(await asyncio.to_thread(child.stdout.readline))
    try:
        rounds = [await run_case(name, port, child.pid, engine, args) for _ in range(args.rounds + 1)][1:]
        rss_mb = round(psutil.Process(child.pid).memory_info().rss / 1e6, 1)
    finally:
        engine.channel.close()
        samples = json.loads(await asyncio.to_thread(child.stdout.readline) or b"{}")
        child.wait(30)
    result = {key: results.spread([found[key] for found in rounds]) for key in rounds[0]} | {"rss_mb": rss_mb}
    return result | ({"profile_us": shares(samples, rounds)} if samples else {})


def shares(samples: dict[str, int], rounds: list[dict[str, float]]) -> dict[str, float]:
    """Samples as microseconds a token."""
    each = rounds[0]["cpu_us_per_token"] / sum(samples.values())
    return {place: round(count * each, 2) for place, count in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="What the API process costs for a token.")
    parser.add_argument("--requests", type=int, default=256, help="at a time")
    parser.add_argument("--tokens", type=int, default=512, help="of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--interval-ms", type=float, default=5.0, help="least time between two steps")
    parser.add_argument("--unpaced", action="store_true", help="the engine does not wait for the streams")
    parser.add_argument("--case", action="append", choices=CASES, help="(default: all)")
    parser.add_argument("--metrics", action="store_true", help="the API process keeps Prometheus metrics")
    parser.add_argument("--profile", action="store_true", help="sample the API process; makes it a little slower")
    parser.add_argument("--output", default="")
    parser.add_argument("--serve", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve >= 0:
        uvloop.run(serve(args.serve, args.metrics, args.profile))
        return
    found = {name: uvloop.run(measure(name, args)) for name in args.case or CASES}
    skipped = ("output", "serve", "case", "profile")
    load = {key: value for key, value in vars(args).items() if key not in skipped}
    result = {"settings": load, "summary": found}
    print(json.dumps(result, indent=1))
    if args.output:
        results.write("api", result, args.output)


if __name__ == "__main__":
    main()
