"""`diptych bench` as a user runs it, against a scripted server in this process."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scripted_server import ScriptedServer, event, generated

from diptych.bench import commands
from diptych.bench.backends import BACKENDS
from diptych.bench.commands import add_command, run_bench
from diptych.bench.dataset import DATASETS
from diptych.bench.machine import describe_machine, without_places
from diptych.bench.report import RunProgress, append_line, result_block
from diptych.bench.run import base_url, benchmark, request_headers
from diptych.bench.sample import Sample
from diptych.errors import ConfigError, DeadlineExceeded, UpstreamError

DONE = event(b"[DONE]")
STREAM = [event(generated("a", 1)), event(generated("ab", 2)), event(generated("ab", 2, {"type": "length"})) + DONE]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    args = parser.parse_args(["bench", *argv])
    assert args.handler is run_bench
    return args


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}", "output_len": 2}) + "\n" for i in range(30)))
    return str(path)


async def bench(server: ScriptedServer, *argv: str) -> dict[str, Any]:
    return await benchmark(parse("--base-url", server.url, *argv), Console(file=io.StringIO()))


async def test_a_whole_run(prompts: str) -> None:
    async with ScriptedServer(list(STREAM)) as server:
        server.gets["/server_info"] = {"model_path": "/somewhere/models/x", "host": "10.0.0.1", "tp_size": 2}
        result = await bench(
            server,
            *("--dataset-name", "custom", "--dataset-path", prompts, "--num-prompts", "20", "--max-concurrency", "3"),
            *("--warmup-requests", "2", "--flush-cache", "--goodput", "ttft:60000", "--output-details", "--tag", "t"),
        )
    assert len(server.requests) == 22
    assert server.posts == ["/flush_cache"]
    assert server.peak <= 3
    assert result["completed"] == 20
    assert result["total_output_tokens"] == 40
    assert result["total_input_tokens"] == 100
    assert result["total_cached_tokens"] == 40
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert result["total_chunks"] == 40
    assert result["client_cpu_us_per_chunk"] > 0
    assert result["server_info"] == {"model_path": "x", "tp_size": 2}
    assert (result["backend"], result["model"], result["max_concurrency"]) == ("sglang", "scripted", 3)
    assert (result["request_rate"], result["tag"], result["accept_length"]) == ("inf", "t", None)
    assert result["generated_texts"] == ["ab"] * 20
    assert result["errors"] == [""] * 20
    assert [len(itls) for itls in result["itls"]] == [1] * 20
    block = result_block(result)
    assert "Serving Benchmark Result" in block
    assert "Successful requests:                     20" in block
    assert json.loads(json.dumps(result)) == result


async def test_failures_are_counted_by_reason(prompts: str) -> None:
    async with ScriptedServer(
        status=503, body=b'{"error": {"message": "starting", "code": "service_unavailable"}}'
    ) as server:
        flags = ("--dataset-name", "custom", "--dataset-path", prompts, "--num-prompts", "4")
        with pytest.raises(UpstreamError, match="warm-up request failed: HTTP 503"):
            await bench(server, *flags)
        result = await bench(server, *flags, "--warmup-requests", "0")
    assert (result["completed"], result["failed"]) == (0, 4)
    assert result["failures"] == {"HTTP 503: service_unavailable: starting": 4}
    assert result["mean_ttft_ms"] is None
    assert "4 failed: HTTP 503" in result_block(result)


async def test_poisson_arrivals_and_the_fake_prefill_fields(prompts: str) -> None:
    async with ScriptedServer(list(STREAM)) as server:
        flags = ("--dataset-name", "custom", "--dataset-path", prompts, "--num-prompts", "5", "--fake-prefill")
        result = await bench(server, *flags, "--request-rate", "500", "--extra-request-body", '{"priority": 1}')
    assert result["request_rate"] == 500.0
    assert result["completed"] == 5
    body = server.requests[-1][1]
    assert (body["bootstrap_host"], body["bootstrap_room"], body["priority"]) == ("2.2.2.2", 0, 1)


async def test_the_server_has_to_be_there(prompts: str) -> None:
    async with ScriptedServer() as server:
        del server.gets["/v1/models"]
        with pytest.raises(DeadlineExceeded, match="not ready within"):
            await bench(server, "--ready-check-timeout-sec", "0.01")


def test_the_handler_prints_and_writes(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """run_bench owns its event loop, so the scripted server runs in it: the handler is given both."""
    out = tmp_path / "out.jsonl"

    async def with_server(args: argparse.Namespace, console: Console) -> dict[str, Any]:
        async with ScriptedServer(list(STREAM)) as server:
            args.base_url = server.url
            return await benchmark(args, console)

    monkeypatch.setattr("diptych.bench.run.benchmark", with_server)
    flags = ("--dataset-name", "custom", "--dataset-path", prompts, "--num-prompts", "10", "--output-file", str(out))
    assert run_bench(parse(*flags)) == 0
    assert run_bench(parse(*flags)) == 0
    printed = capsys.readouterr()
    assert printed.out.count("Serving Benchmark Result") == 2
    assert "10/10 requests, 0 failed" in printed.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["completed"] for line in lines] == [10, 10]
    assert "itls" not in lines[0]


def test_progress_on_a_terminal_is_a_bar_and_elsewhere_lines() -> None:
    plain = io.StringIO()
    with RunProgress(20, Console(file=plain)) as progress:
        for i in range(20):
            progress.one_done(Sample(start_s=0.0, error="x" if i == 3 else ""))
    lines = plain.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("2/20 requests, 0 failed")
    assert lines[-1].startswith("20/20 requests, 1 failed")
    bar = io.StringIO()
    with RunProgress(5, Console(file=bar, force_terminal=True, width=80)) as progress:
        for _ in range(5):
            progress.one_done(Sample(start_s=0.0))
    assert "5/5" in bar.getvalue()
    quiet = io.StringIO()
    with RunProgress(5, Console(file=quiet), quiet=True) as progress:
        progress.one_done(Sample(start_s=0.0))
    assert quiet.getvalue() == ""


def test_urls_and_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("DIPTYCH_API_KEY", "k")
    assert base_url(parse("--port", "8000")) == "http://127.0.0.1:8000"
    assert base_url(parse("--host", "::1")) == "http://[::1]:30000"
    assert base_url(parse("--base-url", "http://x/")) == "http://x"
    assert request_headers(["A=b=c"]) == {"Authorization": "Bearer k", "A": "b=c"}
    with pytest.raises(ConfigError, match="--header"):
        request_headers(["oops"])


def test_the_flags_offer_what_there_is() -> None:
    assert tuple(BACKENDS) == commands.BACKENDS
    assert tuple(DATASETS) == commands.DATASETS


def test_bad_flags_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--num-prompts", "0"], ["--backend", "vllm"], ["--unknown"]):
        with pytest.raises(SystemExit):
            parse(*argv)
        assert argv[0] in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--output-file"):
        append_line(str(tmp_path / "no" / "such" / "folder"), {})


def test_the_machine_has_no_name_and_no_place() -> None:
    import socket

    text = json.dumps(describe_machine())
    assert socket.gethostname() not in text
    assert "/home" not in text and str(Path.cwd()) not in text
    assert describe_machine()["cores"] > 0
    info = {
        "host": "h",
        "port": 1,
        "api_key": "k",
        "tokenizer_path": "/a/b/c",
        "disaggregation_secret_file": "/s",
        "states": [{"dist_init_addr": "x:1", "page_size": 16, "model": "/m/Qwen3"}],
    }
    assert without_places(info) == {"port": 1, "tokenizer_path": "c", "states": [{"page_size": 16, "model": "Qwen3"}]}


async def test_ctrl_c_leaves_nothing_running(prompts: str) -> None:
    never, all_there = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        if server.running == 4:
            all_there.set()
        await never.wait()

    async with ScriptedServer([hang]) as server:
        flags = ("--dataset-name", "custom", "--dataset-path", prompts, "--num-prompts", "4", "--warmup-requests", "0")
        run = asyncio.create_task(bench(server, *flags))
        async with asyncio.timeout(10):
            await all_there.wait()
        run.cancel()
        assert (await asyncio.gather(run, return_exceptions=True))[0].__class__ is asyncio.CancelledError
        never.set()


async def test_an_interrupted_run_keeps_what_it_has(prompts: str) -> None:
    flags = ("--dataset-name", "custom", "--dataset-path", prompts, "--num-prompts", "30", "--max-concurrency", "1")
    async with ScriptedServer(list(STREAM)) as server:
        running = asyncio.create_task(bench(server, *flags, "--warmup-requests", "0", "--output-details"))
        while len(server.requests) < 5 and not running.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGINT)
        result = await running
    assert result["interrupted"] and 4 <= result["completed"] < 30
    assert len(result["output_lens"]) == result["completed"]
    assert f"{result['completed']} of 30 requests" in result_block(result)


async def test_a_run_that_is_cancelled_is_not_interrupted(prompts: str) -> None:
    flags = ("--dataset-name", "custom", "--dataset-path", prompts, "--num-prompts", "30", "--max-concurrency", "1")
    async with ScriptedServer(list(STREAM)) as server:
        running = asyncio.create_task(bench(server, *flags, "--warmup-requests", "0"))
        while len(server.requests) < 5 and not running.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
