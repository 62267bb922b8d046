"""The client against a scripted server: what it asks, what it times, how it fails."""

from __future__ import annotations

import asyncio
import json

import pytest
from scripted_server import ScriptedClock, ScriptedServer, Step, chat_chunk, event, generated

from diptych.bench.backends import BACKENDS, Options
from diptych.bench.client import Client, EventLines
from diptych.bench.dataset import Row
from diptych.bench.sample import Sample

ROW = Row(prompt=[1, 2, 3], prompt_len=3, output_len=8)
CHAT = Row(prompt="hello", prompt_len=0, output_len=8, extra={"top_p": 0.5})
DONE = event(b"[DONE]")


async def ask(
    server: ScriptedServer, backend: str, row: Row, clock: ScriptedClock | None = None, **more: object
) -> Sample:
    options = Options(model="m", stream=server.steps is not None)
    client = Client(server.url, BACKENDS[backend](), options, clock=clock or ScriptedClock([0.0]), **more)  # type: ignore[arg-type]
    async with client:
        return await client.send(row)


async def test_native_stream_is_timed_by_the_tokens_each_frame_adds() -> None:
    clock = ScriptedClock([100.0, 100.5, 100.75, 101.75, 102.0])
    steps: list[Step] = [
        event(generated("a", 1)),
        clock.read(2),
        event(generated("ab", 2)),
        clock.read(3),
        event(generated("abcdef", 6)),
        clock.read(4),
        event(generated("abcdef", 6, {"type": "length", "length": 6})) + DONE,
    ]
    async with ScriptedServer(steps) as server:
        sample = await ask(server, "sglang", ROW, clock)
    assert sample == Sample(
        start_s=100.0,
        latency_s=2.0,
        ttft_s=0.5,
        itls_s=[0.25, 0.25, 0.25, 0.25, 0.25],
        num_chunks=3,
        prompt_tokens=5,
        output_tokens=6,
        cached_tokens=2,
        text="abcdef",
        output_ids=[0, 1, 2, 3, 4, 5],
    )
    path, body, _ = server.requests[0]
    assert path == "/generate"
    assert body == {
        "input_ids": [1, 2, 3],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True},
        "stream": True,
    }


async def test_a_token_without_text_yet_is_a_token() -> None:
    """The detokenizer may hold back half a character; the token was there all the same."""
    clock = ScriptedClock([0.0, 1.0, 2.0])
    steps: list[Step] = [event(generated("", 1)), clock.read(2), event(generated("é", 2, {"type": "length"}))]
    async with ScriptedServer(steps) as server:
        sample = await ask(server, "sglang", ROW, clock)
    assert (sample.ttft_s, sample.itls_s, sample.error) == (1.0, [1.0], "")


async def test_chat_stream_counts_content_and_takes_totals_from_usage() -> None:
    clock = ScriptedClock([0.0, 1.0, 2.0, 3.0, 5.0])
    usage = {"prompt_tokens": 7, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
    steps: list[Step] = [
        event(chat_chunk(None, role="assistant")),  # no token in it
        clock.read(2),
        event(chat_chunk(None, reasoning_content="hm")),
        clock.read(3),
        event(chat_chunk("hi ")),
        clock.read(4),
        event(chat_chunk("you", finish="stop")) + event({"choices": [], "usage": usage}) + DONE,
    ]
    async with ScriptedServer(steps) as server:
        sample = await ask(server, "sglang-oai-chat", CHAT, clock, extra={"seed": 3})
    assert (sample.ttft_s, sample.itls_s, sample.latency_s) == (2.0, [1.0, 2.0], 5.0)
    assert (sample.prompt_tokens, sample.output_tokens, sample.cached_tokens) == (7, 9, 4)
    assert (sample.text, sample.num_chunks, sample.error) == ("hmhi you", 3, "")
    path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 8,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 3,
        "top_p": 0.5,
    }


async def test_usage_on_every_chunk_says_how_many_tokens_each_carries() -> None:
    clock = ScriptedClock([0.0, 1.0, 3.0])
    usage = [{"prompt_tokens": 3, "completion_tokens": n} for n in (1, 5)]
    steps: list[Step] = [
        event({"choices": [{"index": 0, "text": "a"}], "usage": usage[0]}),
        clock.read(2),
        event({"choices": [{"index": 0, "text": "bcde", "finish_reason": "length"}], "usage": usage[1]}) + DONE,
    ]
    async with ScriptedServer(steps) as server:
        sample = await ask(server, "sglang-oai", ROW, clock)
    assert (sample.ttft_s, sample.itls_s, sample.output_tokens) == (1.0, [0.5] * 4, 5)
    assert server.requests[0][1]["prompt"] == [1, 2, 3]
    assert server.requests[0][1]["max_tokens"] == 8


async def test_token_ids_in_a_chunk_count_its_tokens() -> None:
    clock = ScriptedClock([0.0, 1.0, 3.0])
    steps: list[Step] = [
        event({"choices": [{"index": 0, "text": "a", "token_ids": [4]}]}),
        clock.read(2),
        event({"choices": [{"index": 0, "text": "b", "token_ids": [5, 6]}]}) + DONE,
    ]
    async with ScriptedServer(steps) as server:
        sample = await ask(server, "sglang-oai", ROW, clock)
    assert (sample.itls_s, sample.output_tokens, sample.output_ids) == ([1.0, 1.0], 3, [4, 5, 6])


@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "sglang-oai-chat"])
async def test_whole_replies_have_an_e2e_latency_and_nothing_else_timed(backend: str) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    replies = {
        "sglang": generated("ab", 2, {"type": "length"}),
        "sglang-oai": {"choices": [{"text": "ab", "finish_reason": "length"}], "usage": usage},
        "sglang-oai-chat": {"choices": [{"message": {"content": "ab"}, "finish_reason": "length"}], "usage": usage},
    }
    body = json.dumps(replies[backend]).encode()
    async with ScriptedServer(body=body) as server:
        sample = await ask(server, backend, CHAT, ScriptedClock([1.0, 4.0]))
    assert server.requests[0][1]["stream"] is False
    assert "stream_options" not in server.requests[0][1]
    assert (sample.latency_s, sample.ttft_s, sample.itls_s, sample.tpot_s) == (3.0, None, [], None)
    assert (sample.output_tokens, sample.prompt_tokens, sample.text, sample.error) == (2, 5, "ab", "")


async def test_http_errors_give_their_reason() -> None:
    envelope = {"error": {"message": "try later", "type": "rate_limit_error", "code": "rate_limit_exceeded"}}
    async with ScriptedServer(status=429, body=json.dumps(envelope).encode()) as server:
        assert (await ask(server, "sglang", ROW)).error == "HTTP 429: rate_limit_exceeded: try later"
    async with ScriptedServer(status=500, body=b"oops") as server:
        assert (await ask(server, "sglang", ROW)).error == "HTTP 500"


async def test_an_error_inside_a_stream_is_a_failure() -> None:
    steps: list[Step] = [event(generated("a", 1)), event({"error": {"message": "gone", "code": "aborted"}}) + DONE]
    async with ScriptedServer(steps) as server:
        assert (await ask(server, "sglang", ROW)).error == "aborted: gone"
    steps = [event(generated("a", 1, {"type": "abort", "message": "by the client"})) + DONE]
    async with ScriptedServer(steps) as server:
        assert (await ask(server, "sglang", ROW)).error == "aborted: by the client"
    async with ScriptedServer([event(chat_chunk("a", finish="abort")) + DONE]) as server:
        assert (await ask(server, "sglang-oai-chat", CHAT)).error == "aborted: no reason given"


async def test_a_stream_that_stops_half_way_is_a_failure() -> None:
    async with ScriptedServer([event(generated("a", 1))]) as server:
        assert (await ask(server, "sglang", ROW)).error == "the stream ended before the answer did"
        server.cut = True
        assert (await ask(server, "sglang", ROW)).error.startswith("connection failed: ")


async def test_unreadable_frames_are_a_failure() -> None:
    async with ScriptedServer([event(b"{not json"), DONE]) as server:
        assert (await ask(server, "sglang", ROW)).error.startswith("unreadable reply: ")


async def test_nobody_there() -> None:
    async with ScriptedServer([]) as server:
        pass
    assert (await ask(server, "sglang", ROW)).error.startswith("cannot connect: ")


async def test_a_request_that_hangs_fails_at_its_deadline() -> None:
    never = asyncio.Event()

    async def hang() -> None:
        await never.wait()

    async with ScriptedServer([event(generated("a", 1)), hang]) as server:
        sample = await ask(server, "sglang", ROW, timeout_s=0.05)
        never.set()
    assert sample.error == "no whole answer within 0.05 s (--request-timeout)"
    assert sample.num_chunks == 1


async def test_headers_go_along() -> None:
    async with ScriptedServer([event(generated("a", 1)) + DONE]) as server:
        await ask(server, "sglang", ROW, headers={"Authorization": "Bearer x"})
    assert server.requests[0][2]["Authorization"] == "Bearer x"


def test_events_survive_any_boundaries() -> None:
    stream = b'data: {"a": 1}\r\n\r\n: comment\n\nevent: x\ndata:{"b": 2}\n\ndata: [DONE]\n\n'
    expected = [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]
    for size in range(1, len(stream) + 1):
        lines = EventLines()
        parts = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert [payload for part in parts for payload in lines.feed(part)] == expected
