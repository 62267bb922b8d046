"""POST /v1/completions: prompts of all forms, echo, log-probabilities as evaluation harnesses read them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_server import TEXT, Serve

from diptych.text.tokenizer import Tokenizer

PATH = "/v1/completions"


async def test_shape(serve: Serve) -> None:
    server = await serve()
    status, reply = await server.post(PATH, {"model": "m", "prompt": "abc"})
    assert status == 200
    assert list(reply) == ["id", "object", "created", "model", "choices", "usage"]
    assert list(reply["choices"][0]) == ["index", "text", "logprobs", "finish_reason", "matched_stop"]
    assert (reply["object"], reply["model"]) == ("text_completion", "m")
    assert reply["choices"][0]["logprobs"] is None
    assert server.engine.requests[0].sampling.max_new_tokens == 16  # OpenAI's default


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("abc", ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["abc", [5]], ["abc", [5]]),
    ],
)
async def test_forms_of_prompts(serve: Serve, demo: Tokenizer, prompt: Any, expected: list[Any]) -> None:
    server = await serve()
    status, reply = await server.post(PATH, {"prompt": prompt, "max_tokens": 100})
    assert status == 200
    wanted = [demo.encode(item, special=True) if isinstance(item, str) else item for item in expected]
    assert [request.prompt for request in server.engine.requests] == wanted
    assert [choice["text"] for choice in reply["choices"]] == [TEXT] * len(wanted)
    assert reply["usage"]["prompt_tokens"] == sum(len(ids) for ids in wanted)


async def test_batch_with_n(serve: Serve) -> None:
    server = await serve()
    _, reply = await server.post(PATH, {"prompt": ["a", "b"], "n": 2, "seed": 1, "max_tokens": 2})
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [request.sampling.seed for request in server.engine.requests] == [1, 2, 1, 2]
    assert reply["usage"] == {
        "prompt_tokens": 2,
        "total_tokens": 10,
        "completion_tokens": 8,
        "prompt_tokens_details": None,
    }


async def test_stream(serve: Serve) -> None:
    server = await serve()
    body = {"prompt": ["a", "b"], "max_tokens": 100, "stream_options": {"include_usage": True}}
    *events, done = await server.events(PATH, body)
    assert done == b"[DONE]"
    chunks = [json.loads(event) for event in events]
    texts = {0: "", 1: ""}
    ends: dict[int, list[str]] = {0: [], 1: []}
    for chunk in chunks[:-1]:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] += [choice["finish_reason"]] if choice["finish_reason"] else []
        assert chunk["usage"] is None
    assert texts == {0: TEXT, 1: TEXT} and ends == {0: ["stop"], 1: ["stop"]}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("prompt", ["What is 1+1?", [10, 11, 12]])
@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_scoring_as_lm_eval_does(serve: Serve, demo: Tokenizer, prompt: Any, max_tokens: int) -> None:
    """echo, logprobs 1 and almost no tokens: the log-probabilities of the prompt itself."""
    server = await serve()
    body = {"prompt": prompt, "max_tokens": max_tokens, "logprobs": 1, "echo": True, "temperature": 0}
    _, reply = await server.post(PATH, body)
    choice = reply["choices"][0]
    request = server.engine.requests[0]
    ids = request.prompt
    logprobs = choice["logprobs"]
    assert list(logprobs) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
    assert request.logprobs is not None and request.logprobs.prompt_start == 0
    assert {len(values) for values in logprobs.values()} == {len(ids) + max_tokens}
    assert logprobs["tokens"][: len(ids)] == [demo.token_text(id) for id in ids]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value == -0.25 for value in logprobs["token_logprobs"][1:])
    for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert max(top, key=top.get) == token
    assert choice["text"].startswith(prompt if isinstance(prompt, str) else demo.decode(prompt))
    assert reply["usage"]["completion_tokens"] == max_tokens
    if max_tokens == 0:
        assert choice["finish_reason"] == "length" and choice["text"] == (
            prompt if isinstance(prompt, str) else demo.decode(prompt)
        )


async def test_offsets_locate_the_tokens(serve: Serve) -> None:
    server = await serve("plain words only")
    body = {"prompt": "some text", "max_tokens": 50, "logprobs": 0, "echo": True}
    _, reply = await server.post(PATH, body)
    choice = reply["choices"][0]
    found = choice["logprobs"]
    for offset, token in zip(found["text_offset"][:-1], found["tokens"][:-1], strict=True):
        assert choice["text"][offset : offset + len(token)] == token


async def test_streamed_logprobs_are_the_whole_ones(serve: Serve) -> None:
    server = await serve("plain words only")
    body = {"prompt": "some text", "max_tokens": 50, "logprobs": 2, "echo": True}
    _, reply = await server.post(PATH, body)
    *events, _ = await server.events(PATH, body)
    parts = [json.loads(event)["choices"][0] for event in events]
    merged: dict[str, list[Any]] = {}
    for part in parts:
        for key, values in part["logprobs"].items():
            merged.setdefault(key, []).extend(values)
    assert merged == reply["choices"][0]["logprobs"]
    assert "".join(part["text"] for part in parts) == reply["choices"][0]["text"]


async def test_echo_alone(serve: Serve) -> None:
    server = await serve()
    _, reply = await server.post(PATH, {"prompt": ["ab", "cd"], "echo": True, "max_tokens": 100})
    assert [choice["text"] for choice in reply["choices"]] == ["ab" + TEXT, "cd" + TEXT]
    *events, _ = await server.events(PATH, {"prompt": "ab", "echo": True, "max_tokens": 100})
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == "ab" + TEXT


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1], [5000]]}, "prompt[1]"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
    ],
)
async def test_refusals(serve: Serve, change: dict[str, Any], param: str) -> None:
    server = await serve()
    status, reply = await server.post(PATH, {"prompt": "a", **change})
    assert (status, reply["error"]["param"]) == (400, param), reply
    assert server.engine.requests == []
