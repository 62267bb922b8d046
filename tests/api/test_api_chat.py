"""POST /v1/chat/completions: the reply's exact shape, streams, parsers, tools, choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api_server import TEXT, Serve, says
from mock_engine_client import EOS, outputs_for

from diptych.api.chat_output import Chunks
from diptych.text.tokenizer import Tokenizer
from diptych.types import Finish, Grammar, Output, Request

PATH = "/v1/chat/completions"
HI: dict[str, Any] = {"model": "any/name", "messages": [{"role": "user", "content": "hi"}]}
REPLY = json.loads((Path(__file__).parent / "reply.json").read_text())


def shape(value: Any) -> Any:
    """Keys in their order, and which values are null; leaves by type."""
    if isinstance(value, dict):
        return [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


async def test_shape_of_the_reply(serve: Serve) -> None:
    server = await serve()
    status, reply = await server.post(PATH, {**HI, "max_tokens": 3})
    assert status == 200
    assert shape(reply) == shape(REPLY)
    assert len(reply["id"]) == 32 and reply["object"] == "chat.completion" and reply["model"] == "any/name"
    assert reply["choices"][0]["finish_reason"] == "length"
    usage = reply["usage"]
    assert usage["completion_tokens"] == 3 and usage["total_tokens"] == usage["prompt_tokens"] + 3


async def test_whole_answer(serve: Serve) -> None:
    server = await serve()
    status, reply = await server.post(PATH, HI)
    choice = reply["choices"][0]
    assert (status, choice["message"]["content"]) == (200, TEXT)
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", EOS)


async def test_the_prompt_is_the_templates(serve: Serve, demo: Tokenizer) -> None:
    server = await serve()
    await server.post(PATH, HI)
    text = demo.decode(server.engine.requests[0].prompt, skip_special=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_stream(serve: Serve) -> None:
    server = await serve()
    *events, done = await server.events(PATH, HI)
    assert done == b"[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "reasoning_content": None, "tool_calls": None}
    assert "".join(choice["delta"]["content"] or "" for choice in choices) == TEXT
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["matched_stop"] == EOS
    assert not any("\ufffd" in (choice["delta"]["content"] or "") for choice in choices)


async def test_stream_usage(serve: Serve) -> None:
    server = await serve()
    *events, _ = await server.events(PATH, {**HI, "stream_options": {"include_usage": True}})
    chunks = [json.loads(event) for event in events]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    whole = (await server.post(PATH, HI))[1]["usage"]
    assert chunks[-1]["usage"] == whole

    *events, _ = await server.events(PATH, {**HI, "stream_options": {"continuous_usage_stats": True}})
    counts = [json.loads(event)["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == whole["completion_tokens"]


async def test_cache_report(serve: Serve) -> None:
    server = await serve(enable_cache_report=True)
    _, reply = await server.post(PATH, HI)
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices(serve: Serve, stream: bool) -> None:
    server = await serve()
    body = {**HI, "n": 3, "seed": 7, "max_tokens": 4}
    if stream:
        *events, _ = await server.events(PATH, {**body, "stream_options": {"include_usage": True}})
        chunks = [json.loads(event) for event in events]
        texts = ["", "", ""]
        for chunk in chunks[:-1]:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"] or ""
        usage = chunks[-1]["usage"]
    else:
        _, reply = await server.post(PATH, body)
        texts = [choice["message"]["content"] for choice in reply["choices"]]
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
        usage = reply["usage"]
    assert len(set(texts)) == 1 and texts[0]
    assert [request.sampling.seed for request in server.engine.requests] == [7, 8, 9]
    assert usage["completion_tokens"] == 12 and usage["prompt_tokens"] == len(server.engine.requests[0].prompt)
    assert len({request.rid for request in server.engine.requests}) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_across_tokens(serve: Serve, demo: Tokenizer, stream: bool) -> None:
    server = await serve("one two three four")
    ids = demo.encode("one two three four", special=False)
    body = {**HI, "stop": ["o thr", "never"]}
    if stream:
        *events, _ = await server.events(PATH, {**body, "stream_options": {"include_usage": True}})
        chunks = [json.loads(event) for event in events]
        text = "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks[:-1])
        choice, usage = chunks[-2]["choices"][0], chunks[-1]["usage"]
    else:
        _, reply = await server.post(PATH, body)
        choice, usage = reply["choices"][0], reply["usage"]
        text = choice["message"]["content"]
    assert (text, choice["finish_reason"], choice["matched_stop"]) == ("one tw", "stop", "o thr")
    needed = next(n for n in range(len(ids)) if "o thr" in demo.decode(ids[:n]))
    assert usage["completion_tokens"] == needed
    assert server.engine.closed_early == [server.engine.requests[0].rid]  # the engine has been told


async def test_stop_string_kept(serve: Serve) -> None:
    server = await serve("one two three")
    _, reply = await server.post(PATH, {**HI, "stop": "two", "no_stop_trim": True})
    assert reply["choices"][0]["message"]["content"] == "one two"


async def test_stop_string_counts_tokens_of_one_step(serve: Serve, demo: Tokenizer) -> None:
    server = await serve(says(demo, "ab cd ef gh", step=100))
    _, reply = await server.post(PATH, {**HI, "stop": "cd"})
    assert reply["choices"][0]["message"]["content"] == "ab "
    ids = demo.encode("ab cd ef gh", special=False)
    assert reply["usage"]["completion_tokens"] == next(n for n in range(len(ids)) if "cd" in demo.decode(ids[:n]))


async def test_logprobs(serve: Serve, demo: Tokenizer) -> None:
    server = await serve()
    _, reply = await server.post(PATH, {**HI, "logprobs": True, "top_logprobs": 2, "max_tokens": 5})
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    assert bytes(b for item in content for b in item["bytes"]).decode() == reply["choices"][0]["message"]["content"]
    assert all(item["logprob"] == -0.25 and len(item["top_logprobs"]) == 2 for item in content)
    *events, _ = await server.events(PATH, {**HI, "logprobs": True, "top_logprobs": 2, "max_tokens": 5})
    streamed = [json.loads(event)["choices"][0]["logprobs"] for event in events]
    assert [item for part in streamed if part for item in part["content"]] == content


REASONED = "<think>\nhm, let me\n</think>\n\nfour"


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning(serve: Serve, stream: bool) -> None:
    server = await serve(REASONED, reasoning_parser="qwen3")
    assert await _answer(server, HI, stream) == ("four", "hm, let me", [], "stop")
    assert await _answer(server, {**HI, "separate_reasoning": False}, stream) == (REASONED, "", [], "stop")
    assert await _answer(server, {**HI, "stream_reasoning": False}, stream) == ("four", "hm, let me", [], "stop")


async def test_without_a_parser_thoughts_stay(serve: Serve) -> None:
    server = await serve(REASONED)
    assert await _answer(server, HI, False) == (REASONED, "", [], "stop")


async def _answer(server: Any, body: dict[str, Any], stream: bool) -> tuple[str, str, list[tuple[str, Any]], str]:
    """(content, reasoning, calls, finish reason)"""
    if not stream:
        _, reply = await server.post(PATH, body)
        message = reply["choices"][0]["message"]
        calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"] or []]
        return message["content"] or "", message["reasoning_content"] or "", calls, reply["choices"][0]["finish_reason"]
    *events, _ = await server.events(PATH, body)
    content = reasoning = ""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    reason = ""
    for event in events:
        choice = json.loads(event)["choices"][0]
        delta = choice["delta"]
        content += delta["content"] or ""
        reasoning += delta["reasoning_content"] or ""
        for call in delta["tool_calls"] or []:
            if call["id"]:
                names[call["index"]] = call["function"]["name"]
            arguments[call["index"]] = arguments.get(call["index"], "") + call["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return content, reasoning, [(names[i], json.loads(arguments[i])) for i in names], reason


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CALLS = (
    "<think>\nx\n</think>\n\nLooking.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


@pytest.mark.parametrize("stream", [False, True])
async def test_tool_calls(serve: Serve, stream: bool) -> None:
    server = await serve(CALLS, reasoning_parser="qwen3", tool_call_parser="qwen25")
    body = {**HI, "tools": [tool("weather"), tool("time")]}
    both = [("weather", {"city": "Köln"}), ("time", {})]
    assert await _answer(server, body, stream) == ("Looking.", "x", both, "tool_calls")
    assert await _answer(server, {**body, "parallel_tool_calls": False}, stream) == (
        "Looking.",
        "x",
        both[:1],
        "tool_calls",
    )
    content, _, calls, reason = await _answer(server, {**body, "tool_choice": "none"}, stream)
    assert calls == [] and content.count("<tool_call>") == 2 and reason == "stop"


async def test_forced_tool_call(serve: Serve) -> None:
    server = await serve('<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>')
    body = {**HI, "tools": [tool("weather"), tool("time")]}
    for choice in ("required", {"type": "function", "function": {"name": "time"}}):
        assert await _answer(server, {**body, "tool_choice": choice}, False) == ("", "", [("time", {})], "tool_calls")
    required, named = (request.sampling.grammar for request in server.engine.requests)
    assert required is not None and named is not None
    assert "weather" in required.text and "weather" not in named.text


async def test_response_format(serve: Serve, demo: Tokenizer) -> None:
    server = await serve("{}", reasoning_parser="qwen3")
    schema = {"type": "object"}
    body = {**HI, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    await server.post(PATH, body)
    await server.post(PATH, {**body, "chat_template_kwargs": {"enable_thinking": False}})
    await server.post(PATH, {**HI, "response_format": {"type": "json_object"}})
    await server.post(PATH, {**HI, "response_format": {"type": "text"}})
    sampled = [request.sampling for request in server.engine.requests]
    assert [s.grammar for s in sampled] == [
        Grammar("json_schema", '{"type":"object"}'),
        Grammar("json_schema", '{"type":"object"}'),
        Grammar("json_object"),
        None,
    ]
    assert [s.grammar_after for s in sampled] == [demo.id_of("</think>"), None, demo.id_of("</think>"), None]


async def test_sampling_fields_arrive(serve: Serve) -> None:
    server = await serve()
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "seed": 11,
        "stop_token_ids": [5, 6],
        "ignore_eos": True,
    }
    extra = {"max_tokens": 9, "max_completion_tokens": 8, "min_tokens": 2, "logit_bias": {"42": 3}, "stop": "x"}
    await server.post(PATH, {**HI, **given, **extra, "cache_salt": "me", "rid": "mine"})
    request = server.engine.requests[0]
    for name, value in given.items():
        assert getattr(request.sampling, name) == (tuple(value) if isinstance(value, list) else value)
    assert (request.sampling.max_new_tokens, request.sampling.min_new_tokens) == (8, 2)
    assert (request.sampling.logit_bias, request.sampling.stop) == ({42: 3.0}, ("x",))
    assert (request.namespace, request.rid) == ("me", "mine")


async def test_a_grammar_decides_the_end(serve: Serve) -> None:
    server = await serve("1")
    await server.post(PATH, {**HI, "regex": "1", "ignore_eos": True, "min_tokens": 5})
    sampling = server.engine.requests[0].sampling
    assert (sampling.ignore_eos, sampling.min_new_tokens) == (False, 0)


async def test_models_defaults(serve: Serve) -> None:
    server = await serve(sampling_defaults="model")
    await server.post(PATH, HI)
    await server.post(PATH, {**HI, "temperature": 0, "top_k": -1, "top_p": 1})
    first, second = (request.sampling for request in server.engine.requests)
    assert (first.temperature, first.top_k, first.top_p) == (0.6, 20, 0.95)
    assert (second.temperature, second.top_k, second.top_p) == (0.0, -1, 1.0)
    assert first.max_new_tokens == 8192 - len(server.engine.requests[0].prompt)


async def test_seeds_are_drawn(serve: Serve) -> None:
    server = await serve(random_seed=5)
    for _ in range(2):
        await server.post(PATH, HI)
    other = await serve(random_seed=5)
    for _ in range(2):
        await other.post(PATH, HI)
    seeds = [request.sampling.seed for request in server.engine.requests]
    assert len(set(seeds)) == 2 and seeds == [request.sampling.seed for request in other.engine.requests]


async def test_parts_history_and_continuation(serve: Serve, demo: Tokenizer) -> None:
    server = await serve()
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        {"role": "assistant", "content": "It is "},
    ]
    await server.post(PATH, {"messages": messages, "continue_final_message": True})
    text = demo.decode(server.engine.requests[0].prompt, skip_special=False)
    assert "<|im_start|>user\nab<|im_end|>" in text
    assert '{"name": "weather", "arguments": {"city": "Köln"}}' in text
    assert text.endswith("<|im_start|>assistant\nIt is ")


async def test_an_abort_ends_with_what_there_is(serve: Serve, demo: Tokenizer) -> None:
    ids = demo.encode("so far", special=False)

    def script(request: Request) -> list[Output | Exception]:
        found = outputs_for(request, ids, Finish("length"))
        last = found[-1]
        assert isinstance(last, Output)
        found[-1] = Output(rid=request.rid, tokens=last.tokens)
        end = Finish("abort", message="aborted by /abort_request", status=499, code="aborted")
        return [*found, Output(rid=request.rid, finish=end)]

    server = await serve(script)
    status, reply = await server.post(PATH, HI)
    assert (status, reply["choices"][0]["finish_reason"]) == (200, "abort")
    assert reply["choices"][0]["message"]["content"] == "so far"


@pytest.mark.parametrize("text", ["", 'a "quoted"\n line', "你好 😀"])
def test_the_usual_chunk_is_like_all_others(text: str) -> None:
    chunks = Chunks("id", 7, "demo")
    assert chunks.content(0, text) == chunks.content(1, text).replace(b'"index":1', b'"index":0')
