"""What happens at the edges: errors in one envelope, limits, keys, leaving clients, dying engines, draining."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from aiohttp import web
from api_server import HEALTHY, INFERENCE, TEXT, Serve, Server
from mock_engine_client import outputs_for

from diptych.api import limits
from diptych.api.mistakes import MAX_UNKNOWN
from diptych.api.site import ended_if_unread, start_site
from diptych.api.wire import HUNG_UP
from diptych.errors import BadRequest, Overloaded, Unavailable
from diptych.net import listen_socket
from diptych.testing.processes import assert_backlog
from diptych.testing.virtual import run_virtual
from diptych.text.tokenizer import Tokenizer
from diptych.types import Finish, Output, Request

CHAT = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
}


def check_envelope(status: int, reply: Any) -> None:
    assert list(reply) == ["error"] and list(reply["error"]) == ["message", "type", "param", "code"]
    assert reply["error"]["message"] and isinstance(reply["error"]["code"], str)
    if status in TYPES:
        assert reply["error"]["type"] == TYPES[status]


async def raw(server: Server, method: str, path: str, body: bytes, content_type: str = "application/json") -> Any:
    headers = {"Content-Type": content_type}
    data = io.BytesIO(body)
    async with server.http.request(method, server.url + path, data=data, headers=headers) as reply:
        return reply.status, await reply.json()


@pytest.mark.parametrize(
    ("method", "path", "body", "content_type", "status"),
    [
        ("POST", CHAT, b"{", "application/json", 400),
        ("POST", CHAT, b"", "application/json", 400),
        ("POST", CHAT, b"\xff\xfe", "application/json", 400),
        ("POST", CHAT, b'{"messages": "\xff"}', "application/json", 400),
        ("POST", CHAT, b"[]", "application/json", 400),
        ("POST", CHAT, b"null", "application/json", 400),
        ("POST", CHAT, b'{"x":' + b"[" * 100_000, "application/json", 400),
        ("POST", CHAT, b"{}", "text/plain", 400),
        ("POST", CHAT, b"a=b", "application/x-www-form-urlencoded", 400),
        ("POST", "/nowhere", b"{}", "application/json", 404),
        ("GET", "/nowhere", b"", "application/json", 404),
        ("POST", "/../etc/passwd", b"{}", "application/json", 404),
        ("GET", CHAT, b"", "application/json", 405),
        ("GET", "/generate", b"", "application/json", 405),
        ("POST", "/health", b"{}", "application/json", 405),
        ("DELETE", "/v1/models", b"", "application/json", 405),
        ("GET", "/v1/models/other", b"", "application/json", 404),
        ("GET", "/metrics", b"", "application/json", 404),
    ],
)
async def test_errors_have_one_shape(
    serve: Serve, method: str, path: str, body: bytes, content_type: str, status: int
) -> None:
    server = await serve()
    found, reply = await raw(server, method, path, body, content_type)
    assert found == status
    check_envelope(status, reply)
    assert (await server.post(CHAT, HI))[0] == 200  # nothing else is disturbed


MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": ""}]}, "messages[0].role"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0].function"),
        ({"messages": MESSAGES * 4097}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e308}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 8192}, "max_tokens"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 1 << 40}, "n"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": "x"}}, "logit_bias[...]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wat"}}}}, "response_format"),
        ({"json_schema": {"type": "wat"}}, "json_schema"),
        ({"response_format": {"type": "text"}, "json_schema": "{"}, "json_schema"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "wat"}}}], "tool_choice": "required"}, "tools"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
        ({"regex": "("}, "regex"),
        ({"ebnf": "root ::= ("}, "ebnf"),
        ({"tools": [{}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0]"),
        ({"tools": "x"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "some"}, "tool_choice"),
        (
            {"tool_choice": {"function": {"name": "g"}}, "tools": [{"function": {"name": "f"}}]},
            "tool_choice",
        ),
        ({"tool_choice": "required", "tools": [{"function": {"name": "f"}}], "regex": "a"}, "tool_choice"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"rid": "x" * 129}, "rid"),
        ({"rid": "a\nb"}, "rid"),
        ({"rid": ["a", "b"]}, "rid"),
        ({"priority": 1 << 31}, "priority"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"stream_options": 1}, "stream_options"),
        ({"functions": [{}]}, "functions"),
        ({"lora_path": "x"}, "lora_path"),
        ({"stop_regex": "x"}, "stop_regex"),
        ({"guided_choice": ["a", "b"]}, "guided_choice"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"guided_grammar": "root ::= 'a'"}, "guided_grammar"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"temprature": 0}, "temprature"),
        ({"max_token": 5}, "max_token"),
        ({"respnose_format": {"type": "json_object"}}, "respnose_format"),
    ],
)
async def test_bad_parameters_are_named(serve: Serve, change: dict[str, Any], param: str) -> None:
    server = await serve()
    status, reply = await server.post(CHAT, {**HI, **change})
    assert (status, reply["error"]["param"]) == (400, param), reply
    assert server.engine.requests == []


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {}, "messages: is required"),
        (CHAT, [], "the body: must be an object, not a list"),
        (CHAT, {**HI, "temperature": "hot"}, "temperature: must be a number, not text"),
        (CHAT, {**HI, "top_k": 1.5}, "top_k: must be a whole number, not a number with decimals"),
        (CHAT, {**HI, "stop": 5}, "stop: must be text or a list, not a number"),
        (CHAT, {**HI, "stream": {}}, "stream: must be true or false, not an object"),
        (CHAT, {**HI, "tools": [{}]}, "tools[0].function: is required"),
        (CHAT, {**HI, "response_format": {}}, "response_format.type: is required"),
        (
            "/generate",
            {"text": "a", "sampling_params": 1},
            "sampling_params: must be an object or a list, not a number",
        ),
        (
            "/generate",
            {"text": "a", "sampling_params": {"n": True}},
            "sampling_params.n: must be a whole number, not true or false",
        ),
        ("/tokenize", {"prompt": None}, "prompt: must be text or a list, not null"),
    ],
)
async def test_mistakes_are_told_in_plain_words(serve: Serve, path: str, body: Any, message: str) -> None:
    server = await serve()
    status, reply = await server.post(path, body)
    assert (status, reply["error"]["message"]) == (400, message)


async def test_a_bad_schema_is_told_by_the_field_that_it_came_in(serve: Serve) -> None:
    server = await serve()
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(40):
        schema = {"type": "object", "properties": {"a": schema}}
    formatted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for field, name in (({"response_format": formatted}, "response_format"), ({"json_schema": schema}, "json_schema")):
        _, reply = await server.post(CHAT, {**HI, **field})
        assert reply["error"]["message"].startswith(f"{name} must not be nested deeper") and (
            reply["error"]["param"] == name
        )


async def test_unknown_fields_and_nulls_are_ignored(serve: Serve) -> None:
    server = await serve()
    nulls = dict.fromkeys(("temperature", "stop", "tools", "n", "seed", "logprobs", "stream", "max_tokens"))
    assert (await server.post(CHAT, {**HI, **nulls, "store": True, "user": "u", "made_up": [1]}))[0] == 200


async def test_a_refused_field_has_another_name_here(serve: Serve) -> None:
    server = await serve()
    for path, field, ours in (
        (CHAT, {"guided_json": {"type": "object"}}, "response_format"),
        (CHAT, {"guided_choice": ["a"]}, "regex"),
        (CHAT, {"structured_outputs": {"grammar": "x"}}, "ebnf"),
        (CHAT, {"temprature": 0}, "did you mean temperature?"),
        ("/v1/completions", {"guided_grammar": "x"}, "ebnf"),
        ("/generate", {"sampling_params": {"guided_regex": "x"}}, "use regex"),
        ("/generate", {"sampling_params": {"max_tokens": 5}}, "did you mean max_new_tokens?"),
        ("/generate", {"sampling_params": [{"temprature": 5}]}, "sampling_params[0].temprature: there is no such"),
    ):
        status, reply = await server.post(path, {**INFERENCE[path], **field})
        assert status == 400 and ours in reply["error"]["message"], reply


async def test_fields_that_other_clients_send_are_no_near_misses(serve: Serve) -> None:
    server = await serve()
    openai = (
        "metadata modalities moderation prediction prompt_cache_key prompt_cache_retention safety_identifier "
        "service_tier store user verbosity web_search_options"
    )
    vllm = (
        "use_beam_search length_penalty include_stop_str_in_output spaces_between_special_tokens bad_words request_id "
        "truncate_prompt_tokens prompt_logprobs allowed_token_ids add_generation_prompt add_special_tokens documents "
        "chat_template mm_processor_kwargs return_tokens_as_token_ids kv_transfer_params include_reasoning thinking "
        "stream_interval data_parallel_rank return_routed_experts bootstrap_pair_key logprob_start_len max_new_tokens"
    )
    for name in (openai + " " + vllm).split():
        for path in ("/v1/completions", CHAT):
            assert (await server.post(path, {**INFERENCE[path], name: "x"}))[0] == 200, name
    sglang = {"spaces_between_special_tokens": True, "stream_interval": 1, "skip_special_tokens": True}
    assert (await server.post("/generate", {"text": "a", "sampling_params": sglang}))[0] == 200


async def test_a_body_full_of_unknown_names_costs_little(serve: Serve) -> None:
    server = await serve()
    names = {f"made_up_{i}": 1 for i in range(MAX_UNKNOWN)}
    assert (await server.post(CHAT, {**HI, **names, "temprature": 1}))[0] == 200  # only so many are compared
    assert (await server.post(CHAT, {"temprature": 1, **HI, **names}))[0] == 400


def chat_of(size: int) -> bytes:
    """A chat body of exactly `size` bytes."""
    head, tail = b'{"max_tokens":1,"pad":"', b'","messages":[{"role":"user","content":"hi"}]}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


async def test_body_limit(serve: Serve) -> None:
    server = await serve()
    for size, expected in ((-1, 200), (0, 200), (1, 413)):
        status, reply = await raw(server, "POST", CHAT, chat_of(limits.MAX_BODY_BYTES + size))
        assert status == expected
    check_envelope(413, reply)


@pytest.mark.parametrize(
    ("make", "limit", "change"),
    [
        (lambda k: {"n": k, "max_tokens": 1}, limits.MAX_N, {}),
        (lambda k: {"stop": [f"s{i}" for i in range(k)]}, limits.MAX_STOPS, {}),
        (lambda k: {"stop": "x" * k}, limits.MAX_STOP_CHARS, {}),
        (lambda k: {"top_logprobs": k, "logprobs": True}, limits.MAX_TOP_LOGPROBS, {}),
        (lambda k: {"stop_token_ids": list(range(k))}, limits.MAX_STOP_TOKEN_IDS, {}),
        (lambda k: {"logit_bias": {str(i): 1 for i in range(k)}}, limits.MAX_LOGIT_BIAS, {}),
        (lambda k: {"rid": "r" * k}, limits.MAX_RID_CHARS, {}),
        (lambda k: {"cache_salt": "r" * k}, limits.MAX_SALT_CHARS, {}),
        (lambda k: {"messages": MESSAGES * k}, limits.MAX_MESSAGES // 8, {"scale": 8}),
        (
            lambda k: {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(k)]},
            limits.MAX_TOOLS,
            {},
        ),
    ],
)
async def test_limits(serve: Serve, monkeypatch: pytest.MonkeyPatch, make: Any, limit: int, change: Any) -> None:
    if change:  # a context of 8192 tokens cannot hold so many messages
        monkeypatch.setattr("diptych.api.prompts.MAX_MESSAGES", limit)
    server = await serve()
    for count, expected in ((limit - 1, 200), (limit, 200), (limit + 1, 400)):
        status, reply = await server.post(CHAT, {**HI, **make(count)})
        assert status == expected, reply


async def test_container_limit(serve: Serve) -> None:
    server = await serve()
    for size, expected in ((-1, 200), (0, 200), (1, 400)):
        pads = b"[]," * (limits.MAX_CONTAINERS + size - 4) + b"[]"  # three more open around them
        body = b'{"text":"a","sampling_params":{"max_new_tokens":1},"pad":[' + pads + b"]}"
        assert (await raw(server, "POST", "/generate", body))[0] == expected


@pytest.mark.parametrize("drips", [False, True])
async def test_slow_bodies_have_a_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch, drips: bool) -> None:
    """Whether nothing comes any more or a byte now and then."""
    monkeypatch.setattr("diptych.api.wire.BODY_TIMEOUT_S", 0.05)
    server = await serve()
    release = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"text":'
        while drips and not release.is_set():
            yield b" "
            await asyncio.sleep(0.005)
        await release.wait()

    headers = {"Content-Type": "application/json"}
    async with server.http.post(server.url + "/generate", data=slowly(), headers=headers) as reply:
        assert reply.status == 400 and "did not arrive" in (await reply.json())["error"]["message"]
    release.set()


async def test_a_client_that_does_not_read(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream ends after a deadline, the engine is told, and its connection is not kept until it reads on."""
    monkeypatch.setattr("diptych.api.sse.WRITE_TIMEOUT_S", 0.1)

    def script(request: Request) -> list[Output | Exception]:
        return [Output(rid=request.rid, tokens=[20])] * 5000

    server = await serve(script)
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1)
    body = json.dumps({"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 5000}})
    writer.write(
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    await server.engine.until(lambda: len(server.engine.closed_early) == 1)
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass
    writer.close()


async def test_a_burst_of_clients_finds_room(serve: Serve) -> None:
    server = await serve()
    assert_backlog(int(server.url.rpartition(":")[2]))


@pytest.mark.parametrize("reads", [True, False])
async def test_a_client_that_does_not_read_a_whole_answer(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection ends, and with it what is kept for it; one that reads gets all."""
    size = 64 << 20  # more than sockets hold
    app = web.Application()
    over = asyncio.Event()  # the connection has ended on the server's side

    async def answer(request: web.Request) -> web.Response:
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: over.set())
        return web.Response(body=bytes(size))

    app.router.add_get("/", answer)
    sock = listen_socket("127.0.0.1", 0)
    runner = await start_site(app, sock)
    if not reads:
        monkeypatch.setattr("diptych.api.site.WRITE_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_connection(*sock.getsockname(), limit=1)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    got = 0
    async with asyncio.timeout(60):
        if not reads:
            await over.wait()
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(1 << 20):
                got += len(part)
    assert (got > size) == reads
    writer.close()
    await runner.cleanup()


@pytest.mark.parametrize(("unsent", "ends"), [([10, 10], 2.0), ([10, 5, 5], 3.0), ([10, 5, 1, 0], None)])
def test_an_answer_that_goes_out_slowly_is_not_unread(unsent: list[int], ends: float | None) -> None:
    """Looked at after each WRITE_TIMEOUT_S, when so many bytes are left."""
    ended: list[float] = []

    class Slow:
        def get_write_buffer_size(self) -> int:
            return unsent.pop(0)

        def abort(self) -> None:
            ended.append(asyncio.get_running_loop().time() / limits.WRITE_TIMEOUT_S)

    async def story() -> None:
        with ended_if_unread(cast(Any, Slow())):
            await asyncio.sleep(limits.WRITE_TIMEOUT_S * 4 + 1)

    run_virtual(story())
    assert ended == ([] if ends is None else [ends]) and not unsent


async def test_a_client_that_does_not_read_holds_nobody_up(serve: Serve) -> None:
    def script(request: Request) -> list[Output | Exception]:
        count = request.sampling.max_new_tokens
        return outputs_for(request, [20] * count, Finish("length"))

    server = await serve(script)
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1)
    body = json.dumps({"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 5000}})
    writer.write(
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    await server.engine.until(lambda: len(server.engine.requests) == 1)
    async with asyncio.timeout(60):
        events = await server.events("/generate", {"text": "b", "sampling_params": {"max_new_tokens": 1000}})
    assert len(events) == 1001 and server.ctx.service.num_running == 1  # the other one still waits for its client
    writer.transport.abort()
    await server.engine.until(lambda: len(server.engine.closed_early) == 1)


async def test_batch_limit(serve: Serve) -> None:
    server = await serve()
    for count, expected in ((limits.MAX_BATCH - 1, 200), (limits.MAX_BATCH, 200), (limits.MAX_BATCH + 1, 400)):
        body = {"input_ids": [[1]] * count, "sampling_params": {"max_new_tokens": 1}}
        assert (await server.post("/generate", body))[0] == expected


@pytest.mark.parametrize("size", [limits.MAX_HEADER_BYTES - 20, limits.MAX_HEADER_BYTES + 20])
async def test_header_limit(serve: Serve, size: int) -> None:
    server = await serve()
    async with server.http.get(server.url + "/health", headers={"X-Long": "x" * size}) as reply:
        assert reply.status == (200 if size < limits.MAX_HEADER_BYTES else 400)
        if reply.status == 400:
            assert (await reply.json())["error"]["message"].endswith(f"more than {limits.MAX_HEADER_BYTES} bytes")


async def test_context_length(serve: Serve, demo: Tokenizer) -> None:
    server = await serve()
    for count, expected in ((8191, 200), (8192, 400)):
        status, reply = await server.post(
            "/generate", {"input_ids": [1] * count, "sampling_params": {"max_new_tokens": 1}}
        )
        assert status == expected
    assert reply["error"]["code"] == "context_length_exceeded"
    status, reply = await server.post(CHAT, {"messages": [{"role": "user", "content": "word " * 9000}]})
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    assert "8192" in reply["error"]["message"]


SMUGGLING = [
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nhello",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\n Folded: y\r\n\r\n",
    b"GET /health\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("data", SMUGGLING)
async def test_ambiguous_http_is_refused(serve: Serve, data: bytes) -> None:
    """One request must not be two for somebody else; the connection ends with at most one reply, a 4xx."""
    server = await serve()
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data + b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(5):
        reply = await reader.read()
    writer.close()
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 400 ") and b"HTTP/1.1 " not in head
    assert b"\r\nServer: diptych" in head and b"\r\nContent-Type: application/json" in head
    error = json.loads(body)["error"]
    assert (error["type"], error["message"]) == ("invalid_request_error", "the request is malformed HTTP")
    assert server.engine.requests == []


# ---- errors of the engine ----


def fails_after(count: int, error: Exception | Finish) -> Any:
    def script(request: Request) -> list[Output | Exception]:
        found: list[Output | Exception] = [Output(rid=request.rid, tokens=[20]) for _ in range(count)]
        end = error if isinstance(error, Exception) else Output(rid=request.rid, finish=error)
        return [*found, end]

    return script


ENDS: list[tuple[Exception | Finish, int, str]] = [
    (Finish("abort", message="too long", status=400, code="context_length_exceeded"), 400, "context_length_exceeded"),
    (Finish("abort", message="queue is full", status=429, code="rate_limit_exceeded"), 429, "rate_limit_exceeded"),
    (
        Finish("abort", message="KV hand-over failed: abort", status=500, code="kv_transfer_failed"),
        500,
        "kv_transfer_failed",
    ),
    (Finish("abort", message="prefill died", status=503, code="service_unavailable"), 503, "service_unavailable"),
    (Finish("abort", message="late", status=504, code="deadline_exceeded"), 504, "deadline_exceeded"),
    (Unavailable("the engine has stopped"), 503, "service_unavailable"),
    (Overloaded("full", retry_after_s=2.5), 429, "rate_limit_exceeded"),
    (BadRequest("no", param="x"), 400, "invalid_value"),
    (RuntimeError("secret 0xdeadbeef"), 500, "internal_error"),
]


@pytest.mark.parametrize("path", INFERENCE)
@pytest.mark.parametrize(("end", "status", "code"), ENDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_byte(
    serve: Serve, path: str, end: Exception | Finish, status: int, code: str, stream: bool
) -> None:
    server = await serve(fails_after(0, end))
    async with server.http.post(server.url + path, json={**INFERENCE[path], "stream": stream}) as reply:
        assert reply.status == status
        body = await reply.json()
        assert ("Retry-After" in reply.headers) == (status in (429, 503))
    check_envelope(status, body)
    assert body["error"]["code"] == code
    assert "0xdead" not in json.dumps(body)


@pytest.mark.parametrize("path", INFERENCE)
@pytest.mark.parametrize(("end", "status", "code"), ENDS)
async def test_errors_after_the_first_byte(
    serve: Serve, path: str, end: Exception | Finish, status: int, code: str
) -> None:
    server = await serve(fails_after(2, end))
    *_, error, done = await server.events(path, INFERENCE[path])
    assert done == b"[DONE]"
    check_envelope(status, json.loads(error))
    assert json.loads(error)["error"]["code"] == code
    status_whole, reply = await server.post(path, INFERENCE[path])
    assert (status_whole, reply["error"]["code"]) == (status, code)


async def test_a_batch_fails_as_one(serve: Serve) -> None:
    """The first error ends the others, and they are aborted in the engine."""

    def script(request: Request) -> list[Output | Exception]:
        if request.prompt == [2]:
            return fails_after(1, Finish("abort", message="x", status=500, code="kv_transfer_failed"))(request)
        return [Output(rid=request.rid, tokens=[20])] * 1000

    server = await serve(script)
    status, _ = await server.post("/generate", {"input_ids": [[1], [2], [3]]})
    assert status == 500
    assert len(server.engine.closed_early) == 2  # the third ended by itself
    assert server.ctx.service.num_running == 0


# ---- clients that leave ----


@pytest.mark.parametrize("path", INFERENCE)
@pytest.mark.parametrize("when", ["queued", "whole", "streaming"])
async def test_a_client_that_leaves(serve: Serve, path: str, when: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its request is aborted in the engine at once, and nothing stays behind. It may have been a router."""
    caplog.set_level("INFO")
    server = await serve("x" * 200)
    engine = server.engine
    if when != "streaming":
        engine.gate.clear()
    body = {**INFERENCE[path], "stream": when != "whole"}
    if when == "streaming":
        reply = await server.http.post(server.url + path, json=body)
        await reply.content.readline()
        engine.gate.clear()
        reply.close()
    else:
        task = asyncio.create_task(server.http.post(server.url + path, json=body))
        await engine.until(lambda: len(engine.requests) == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await engine.until(lambda: len(engine.closed_early) == 1)
    await server.ctx.service.idle()
    assert server.ctx.service.num_running == 0
    engine.gate.set()
    assert (await server.post(CHAT, HI))[0] == 200
    assert any(HUNG_UP in line for line in caplog.messages)


async def test_leaving_aborts_all_choices(serve: Serve) -> None:
    server = await serve("x" * 200)
    server.engine.gate.clear()
    task = asyncio.create_task(server.http.post(server.url + CHAT, json={**HI, "n": 4}))
    await server.engine.until(lambda: len(server.engine.requests) == 4)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await server.engine.until(lambda: len(server.engine.closed_early) == 4)


# ---- the server's life ----


async def test_health(serve: Serve) -> None:
    server = await serve()
    async with server.http.get(server.url + "/health") as reply:
        assert reply.headers["Server"] == "diptych"
    for path in HEALTHY:
        assert (await server.get(path)) == (200, {"status": "ok"})


async def test_a_dead_engine(serve: Serve) -> None:
    server = await serve()
    server.engine.alive = False
    for path in HEALTHY:
        status, reply = await server.get(path)
        assert status == 503 and "stopped" in reply["error"]["message"]
    assert (await server.post(CHAT, HI))[0] == 503
    assert (await server.get("/v1/models"))[0] == 200


async def test_draining(serve: Serve) -> None:
    """Health says so, new requests are refused, running ones end well."""
    server = await serve()
    server.engine.gate.clear()
    running = asyncio.create_task(server.post(CHAT, HI))
    await server.engine.until(lambda: len(server.engine.requests) == 1)
    server.ctx.begin_drain()
    for path in HEALTHY:
        status, reply = await server.get(path)
        assert status == 503 and "draining" in reply["error"]["message"]
    for path, body in INFERENCE.items():
        assert (await server.post(path, body))[0] == 503
    idle = asyncio.create_task(server.ctx.service.idle())
    assert not idle.done()
    await server.engine.open_gate()
    status, reply = await running
    assert (status, reply["choices"][0]["message"]["content"]) == (200, TEXT)
    await idle


@pytest.mark.parametrize("path", INFERENCE)
async def test_draining_begins_while_a_request_is_read(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Draining has waited for nobody, and the engine ends: the request is refused, not lost."""
    server = await serve()
    encode = Tokenizer.encode

    def late(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
        server.ctx.begin_drain()
        return encode(tokenizer, text, special=special)

    monkeypatch.setattr(Tokenizer, "encode", late)
    status, reply = await server.post(path, INFERENCE[path])
    check_envelope(status, reply)
    assert status == 503 and "draining" in reply["error"]["message"] and server.engine.requests == []


async def test_drain_answers_when_the_running_requests_have_ended(serve: Serve) -> None:
    server = await serve()
    server.engine.gate.clear()
    running = asyncio.create_task(server.post(CHAT, HI))
    await server.engine.until(lambda: len(server.engine.requests) == 1)
    drain = asyncio.create_task(server.get("/drain"))
    while (await server.get("/ready"))[0] == 200:
        pass
    assert (await server.post(CHAT, HI))[0] == 503 and not drain.done()
    await server.engine.open_gate()
    assert (await running)[0] == 200
    assert (await drain)[0] == 200 and (await server.get("/drain"))[0] == 200
    assert (await server.get("/ready"))[0] == 503  # for good


async def test_drain_has_a_deadline_and_the_end_that_follows_no_other_one(serve: Serve) -> None:
    server = await serve(drain_timeout=0.05)
    server.engine.gate.clear()
    running = asyncio.create_task(server.post(CHAT, HI))
    await server.engine.until(lambda: len(server.engine.requests) == 1)
    status, reply = await server.get("/drain")
    assert status == 504 and "1 requests are still running" in reply["error"]["message"]
    server.ctx.begin_drain()  # SIGTERM
    assert not await server.ctx.drained()
    await server.engine.open_gate()
    assert (await running)[0] == 200 and await server.ctx.drained()


async def test_the_probe_fails_when_the_engine_does(serve: Serve) -> None:
    server = await serve(fails_after(0, Finish("abort", message="broken", status=500)))
    status, reply = await server.get("/health_generate")
    assert (status, reply["error"]["message"]) == (500, "broken")


async def test_the_probe_has_a_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.api.health.PROBE_TIMEOUT_S", 0.05)
    server = await serve()
    server.engine.gate.clear()
    replies = await asyncio.gather(*(server.get("/health_generate") for _ in range(5)))
    assert {status for status, _ in replies} == {503}
    assert len(server.engine.requests) == 1  # shared
    assert len(server.engine.closed_early) == 1


async def test_any_progress_satisfies_the_probe(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full server is healthy: the probe waits in its queue, but others get their tokens."""

    def script(request: Request) -> list[Output | Exception]:
        if request.rid.startswith("HEALTH_CHECK"):
            return [Output(rid=request.rid)] * 0
        return outputs_for(request, [20] * 50, Finish("length"))

    server = await serve(script)
    server.engine.gate.clear()
    other = asyncio.create_task(server.post(CHAT, HI))
    await server.engine.until(lambda: len(server.engine.requests) == 1)

    def waits(request: Request) -> list[Output | Exception]:
        return [Output(rid=request.rid, tokens=[1])]

    server.engine.script = waits
    probe = asyncio.create_task(server.get("/health_generate"))
    await server.engine.until(lambda: len(server.engine.requests) == 2)
    await server.engine.open_gate()
    assert (await probe)[0] == 200
    assert (await other)[0] == 200


# ---- keys ----

OPEN = ("/health", "/health_generate", "/ready", "/metrics")


def routes(server: Server) -> list[tuple[str, str]]:
    found = [(route.method, route.resource.canonical) for route in server.app.router.routes() if route.resource]
    return [(method, path.replace("{id}", "x")) for method, path in found if method != "HEAD"]


async def status_of(server: Server, method: str, path: str, key: str | None) -> int:
    headers = {"Authorization": key} if key is not None else {}
    async with server.http.request(method, server.url + path, headers=headers) as reply:
        body = await reply.read()
        if reply.status == 401:
            check_envelope(401, json.loads(body))
        return reply.status


async def test_every_route_but_health_needs_the_key(serve: Serve) -> None:
    server = await serve(api_key="sesame", enable_metrics=True)
    for method, path in [*routes(server), ("GET", "/nowhere")]:
        closed = await status_of(server, method, path, None)
        assert (closed == 401) == (path not in OPEN), path
        for wrong in ("Bearer wrong", "Bearer", "sesame", "Basic sesame", "Bearer sesam", "Bearer sesame2"):
            assert (await status_of(server, method, path, wrong) == 401) == (path not in OPEN), path
        assert await status_of(server, method, path, "Bearer sesame") != 401


async def test_the_admin_key(serve: Serve) -> None:
    server = await serve(api_key="user", admin_api_key="root")
    for path in ("/drain", "/flush_cache", "/abort_request", "/pause_generation", "/continue_generation"):
        assert await status_of(server, "POST", path, "Bearer user") == 401
        assert await status_of(server, "POST", path, "Bearer root") != 401
    assert await status_of(server, "GET", "/v1/models", "Bearer root") == 401
    assert await status_of(server, "GET", "/v1/models", "Bearer user") == 200


async def test_key_from_the_environment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_API_KEY", "hidden")
    server = await serve()
    assert await status_of(server, "GET", "/v1/models", None) == 401
    assert await status_of(server, "GET", "/v1/models", "bearer hidden") == 200


@pytest.mark.parametrize(
    "path", ["/%66lush_cache", "//flush_cache", "/flush_cache/", "/flush_cache?x=1", "/./flush_cache"]
)
async def test_spelling_a_path_otherwise_opens_nothing(serve: Serve, path: str) -> None:
    import yarl

    server = await serve(api_key="user", admin_api_key="root")
    headers = {"Authorization": "Bearer user"}
    async with server.http.get(yarl.URL(server.url + path, encoded=True), headers=headers) as reply:
        assert reply.status in (401, 404)
    assert server.engine.controls == []
