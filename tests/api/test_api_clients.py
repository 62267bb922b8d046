"""The openai package as a client, and bodies that nobody would write."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from api_server import DEMO, INFERENCE, TEXT, Serve, Server, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mock_engine_client import EOS

from diptych.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[openai.AsyncOpenAI]:
    server = await serve(reasoning_parser="qwen3", tool_call_parser="qwen25", api_key="k")
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as made:
        yield made


async def test_openai_chat(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="m", messages=MESSAGES, seed=1, temperature=0.2)
    assert reply.choices[0].message.content == TEXT and reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None and reply.usage.completion_tokens > 0


async def test_openai_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0


async def test_openai_completions(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model="m", prompt=["a", "b"], max_tokens=50, logprobs=2)
    assert [choice.text for choice in reply.choices] == [TEXT, TEXT]
    stream = await client.completions.create(model="m", prompt="a", max_tokens=50, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT


async def test_openai_logprobs(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="m", messages=MESSAGES, logprobs=True, top_logprobs=2)
    found = reply.choices[0].logprobs
    assert found is not None and found.content is not None
    assert found.content[0].logprob == -0.25 and len(found.content[0].top_logprobs) == 2


async def test_openai_tools(serve: Serve) -> None:
    server = await serve('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', tool_call_parser="qwen")
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
        reply = await client.chat.completions.create(model="m", messages=MESSAGES, tools=tools)
        calls = reply.choices[0].message.tool_calls
        assert calls is not None and reply.choices[0].finish_reason == "tool_calls"
        async with client.chat.completions.stream(model="m", messages=MESSAGES, tools=tools) as stream:
            final = await stream.get_final_completion()
        streamed = final.choices[0].message.tool_calls
        assert streamed is not None and json.loads(streamed[0].function.arguments) == {"x": 1}
        # the answer goes back into the conversation as it came
        history: Any = [*MESSAGES, reply.choices[0].message, {"role": "tool", "tool_call_id": "x", "content": "1"}]
        again = await client.chat.completions.create(model="m", messages=history, tools=tools)
        assert again.choices[0].finish_reason == "tool_calls"


async def test_openai_errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="m", messages=MESSAGES, temperature=-1)
    assert (bad.value.param, bad.value.type, bad.value.code) == (
        "temperature",
        "invalid_request_error",
        "invalid_value",
    )
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        await client.models.retrieve("nothing")
    assert missing.value.code == "model_not_found"
    assert [model.id async for model in client.models.list()] == ["demo"]


# ---- fuzz: never a 5xx, never a hang, nothing disturbed ----

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(
        ["user", "assistant", "system", "tool", "text", "json_schema", "auto", "required", "", "é😀", "\0"]
    ),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=8,
)
FIELDS = """
model messages prompt text input_ids sampling_params n temperature top_p top_k min_p frequency_penalty presence_penalty
repetition_penalty stop stop_token_ids ignore_eos skip_special_tokens no_stop_trim logit_bias regex ebnf json_schema
max_tokens max_completion_tokens max_new_tokens min_tokens seed stream stream_options response_format rid priority
cache_salt extra_key logprobs top_logprobs tools tool_choice parallel_tool_calls reasoning_effort separate_reasoning
echo continue_final_message chat_template_kwargs best_of suffix return_logprob logprob_start_len top_logprobs_num user
token_ids_logprob return_text_in_logprobs bootstrap_host bootstrap_port bootstrap_room functions lora_path made_up
"""
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"])},
    optional={"content": st.one_of(st.text(max_size=20), JSON), "tool_calls": JSON, "name": JSON},
)
BODY = st.dictionaries(st.sampled_from(FIELDS.split(None)), JSON, max_size=5)
PLAUSIBLE = st.builds(
    lambda body, messages, prompt: {"messages": messages, "prompt": prompt, "text": prompt, **body},
    BODY,
    st.lists(MESSAGE, max_size=3),
    st.one_of(st.text(max_size=20), JSON),
)


class Fuzz:
    """One server and one event loop for all examples."""

    def __init__(self, demo: Tokenizer) -> None:
        self.loop = asyncio.new_event_loop()
        settings_ = {"reasoning_parser": "qwen3", "tool_call_parser": "qwen", "enable_metrics": True}
        self.context = running(demo, TEXT, settings_)
        self.server: Server = self.loop.run_until_complete(self.context.__aenter__())

    def close(self) -> None:
        self.loop.run_until_complete(self.context.__aexit__(None, None, None))
        self.loop.close()

    async def _send(self, path: str, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        deadline = aiohttp.ClientTimeout(total=5)
        async with self.server.http.post(self.server.url + path, data=body, headers=headers, timeout=deadline) as reply:
            return reply.status, await reply.read()

    def check(self, path: str, body: bytes) -> int:
        self.server.engine.requests.clear()
        status, reply = self.loop.run_until_complete(self._send(path, body))
        assert status in (200, 400), (status, body, reply)
        if status == 400:
            error = json.loads(reply)["error"]
            assert error["message"] and "Traceback" not in error["message"] and "0x" not in error["message"]
            assert "site-packages" not in error["message"] and "object at" not in error["message"]
        else:
            assert b'"error":{' not in reply
        for request in self.server.engine.requests:  # what got through is what the engine may rely on
            sampling = request.sampling
            assert request.prompt and all(0 <= id < 4096 for id in request.prompt)
            assert 1 <= sampling.max_new_tokens <= 8192 - len(request.prompt)
            assert 0 <= sampling.seed < 2**63 and 0 < sampling.top_p <= 1 and sampling.temperature >= 0
            assert (sampling.top_k == -1 or sampling.top_k >= 1) and 0 < sampling.repetition_penalty <= 2
        assert self.server.ctx.service.num_running == 0
        return status


@pytest.fixture(scope="module")
def fuzz() -> Any:
    made = Fuzz(Tokenizer.load(DEMO))
    yield made
    made.close()


EXAMPLES = int(os.environ.get("DIPTYCH_FUZZ_EXAMPLES", "60"))
QUICK = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 60, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("path", [*INFERENCE, "/abort_request", "/tokenize", "/detokenize", "/pause_generation"])
@QUICK
@given(body=st.one_of(BODY, PLAUSIBLE))
def test_strange_bodies(fuzz: Fuzz, path: str, body: Any) -> None:
    fuzz.check(path, json.dumps(body).encode())


@pytest.mark.parametrize("path", INFERENCE)
@QUICK
@given(data=st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode())))
def test_strange_bytes(fuzz: Fuzz, path: str, data: bytes) -> None:
    assert fuzz.check(path, data) == 400


@pytest.mark.parametrize("path", INFERENCE)
@QUICK
@given(change=st.dictionaries(st.sampled_from(FIELDS.split(None)), JSON, min_size=1, max_size=1))
def test_one_strange_field(fuzz: Fuzz, path: str, change: Any) -> None:
    fuzz.check(path, json.dumps({**INFERENCE[path], **change}).encode())


def test_the_server_is_unharmed(fuzz: Fuzz) -> None:
    """After all that (tests of a file run in order)."""
    status, reply = fuzz.loop.run_until_complete(fuzz._send(CHAT, json.dumps({"messages": MESSAGES}).encode()))
    choice = json.loads(reply)["choices"][0]
    assert (status, choice["message"]["content"], choice["matched_stop"]) == (200, TEXT, EOS)
