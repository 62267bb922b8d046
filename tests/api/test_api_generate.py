"""POST /generate: SGLang's native endpoint."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from api_server import TEXT, Serve
from mock_engine_client import EOS

from diptych.text.tokenizer import Tokenizer
from diptych.types import Grammar

PATH = "/generate"


async def test_reply(serve: Serve, demo: Tokenizer) -> None:
    server = await serve()
    status, reply = await server.post(PATH, {"text": "abc", "rid": "r1"})
    assert status == 200 and list(reply) == ["text", "output_ids", "meta_info"]
    assert reply["text"] == TEXT
    assert reply["output_ids"] == [*demo.encode(TEXT, special=False), EOS]
    meta = reply["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "r1",
        "finish_reason": {"type": "stop", "matched": EOS},
        "prompt_tokens": len(demo.encode("abc", special=True)),
        "completion_tokens": len(reply["output_ids"]),
        "cached_tokens": len(demo.encode("abc", special=True)) - 1,
        "cached_tokens_details": None,
        "weight_version": "default",
        "num_retractions": 0,
        "dp_rank": None,
    }
    assert server.engine.requests[0].sampling.max_new_tokens == 128


async def test_length(serve: Serve) -> None:
    server = await serve()
    _, reply = await server.post(PATH, {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2}})
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    assert server.engine.requests[0].prompt == [1, 2, 3]


async def test_batch(serve: Serve) -> None:
    server = await serve()
    body = {
        "input_ids": [[1, 2], [3]],
        "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 2, "sampling_seed": 9}],
        "rid": ["a", "b"],
    }
    _, reply = await server.post(PATH, body)
    assert [len(item["output_ids"]) for item in reply] == [1, 2]
    assert [item["meta_info"]["id"] for item in reply] == ["a", "b"]
    assert server.engine.requests[1].sampling.seed == 9


async def test_batch_of_one_is_a_list(serve: Serve) -> None:
    server = await serve()
    _, reply = await server.post(PATH, {"text": ["a"]})
    assert isinstance(reply, list) and len(reply) == 1


async def test_n_samples(serve: Serve) -> None:
    server = await serve()
    _, reply = await server.post(PATH, {"text": "a", "sampling_params": {"n": 2, "max_new_tokens": 1}, "rid": "x"})
    assert [item["meta_info"]["id"] for item in reply] == ["x-0", "x-1"]


async def test_stream_is_cumulative(serve: Serve) -> None:
    server = await serve()
    *events, done = await server.events(PATH, {"text": "abc"})
    assert done == b"[DONE]"
    frames = [json.loads(event) for event in events]
    for before, after in pairwise(frames):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert before["meta_info"]["finish_reason"] is None
    assert frames[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    assert len({frame["meta_info"]["id"] for frame in frames}) == 1
    _, whole = await server.post(PATH, {"text": "abc"})
    assert (frames[-1]["text"], frames[-1]["output_ids"]) == (whole["text"], whole["output_ids"])


async def test_stream_of_a_batch(serve: Serve) -> None:
    server = await serve()
    *events, _ = await server.events(PATH, {"text": ["a", "b"]})
    last: dict[int, Any] = {}
    for event in events:
        frame = json.loads(event)
        assert frame["index"] not in last or last[frame["index"]]["meta_info"]["finish_reason"] is None
        last[frame["index"]] = frame
    assert {index: frame["text"] for index, frame in last.items()} == {0: TEXT, 1: TEXT}


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(serve: Serve, demo: Tokenizer, stream: bool) -> None:
    server = await serve()
    body = {
        "input_ids": [10, 11, 12],
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [7, 8],
        "return_text_in_logprobs": True,
        "sampling_params": {"max_new_tokens": 4},
    }
    if stream:
        *events, _ = await server.events(PATH, body)
        meta = json.loads(events[-1])["meta_info"]
    else:
        meta = (await server.post(PATH, body))[1]["meta_info"]
    ids = demo.encode(TEXT, special=False)[:4]
    assert meta["output_token_logprobs"] == [[-0.25, id, demo.token_text(id)] for id in ids]
    assert meta["input_token_logprobs"] == [
        [None, 10, demo.token_text(10)],
        [-0.25, 11, demo.token_text(11)],
        [-0.25, 12, demo.token_text(12)],
    ]
    assert [len(item) for item in meta["output_top_logprobs"]] == [2] * 4
    assert meta["input_top_logprobs"][0] is None and len(meta["input_top_logprobs"]) == 3
    assert [[pair[1] for pair in item] for item in meta["output_token_ids_logprobs"]] == [[7, 8]] * 4
    assert meta["completion_tokens"] == len(meta["output_token_logprobs"])


async def test_logprobs_of_the_output_only(serve: Serve) -> None:
    server = await serve()
    _, reply = await server.post(PATH, {"text": "abc", "return_logprob": True})
    meta = reply["meta_info"]
    assert meta["input_token_logprobs"] == [] and "output_top_logprobs" not in meta
    assert all(text is None for _, _, text in meta["output_token_logprobs"])


async def test_logprobs_per_item(serve: Serve) -> None:
    server = await serve()
    body = {
        "input_ids": [[1, 2], [3, 4]],
        "return_logprob": [True, False],
        "logprob_start_len": [1, -1],
        "top_logprobs_num": [1, 0],
        "token_ids_logprob": [[5], None],
    }
    _, reply = await server.post(PATH, body)
    assert "output_token_logprobs" in reply[0]["meta_info"] and "output_token_logprobs" not in reply[1]["meta_info"]
    spec = server.engine.requests[0].logprobs
    assert spec is not None and (spec.prompt_start, spec.top, spec.token_ids) == (1, 1, (5,))


async def test_grammars(serve: Serve) -> None:
    server = await serve("1")
    for name, text in (("json_schema", '{"type": "integer"}'), ("regex", "[0-9]"), ("ebnf", 'root ::= "1"')):
        status, _ = await server.post(PATH, {"text": "a", "sampling_params": {name: text}})
        assert status == 200
        assert server.engine.requests[-1].sampling.grammar == Grammar(name, text)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"text": None}, "text"),
        ({"input_ids": [1]}, "text"),
        ({"text": []}, "text"),
        ({"text": ""}, "text"),
        ({"text": None, "input_ids": []}, "input_ids"),
        ({"text": None, "input_ids": [1, [2]]}, "input_ids"),
        ({"text": None, "input_ids": [9999999999999999999999]}, "input_ids"),
        ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"sampling_params": {"temperature": "x"}}, "sampling_params"),
        ({"sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
        ({"sampling_params": {"top_k": -2}}, "sampling_params.top_k"),
        ({"sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        ({"sampling_params": {"min_new_tokens": 5, "max_new_tokens": 4}}, "sampling_params.min_new_tokens"),
        ({"sampling_params": {"logit_bias": {"4096": 1}}}, "sampling_params.logit_bias"),
        ({"sampling_params": {"stop_token_ids": [-1]}}, "sampling_params.stop_token_ids"),
        ({"sampling_params": {"sampling_seed": 2**64}}, "sampling_params.sampling_seed"),
        ({"sampling_params": {"stop_regex": "a"}}, "sampling_params.stop_regex"),
        ({"sampling_params": {"max_tokens": 5}}, "sampling_params.max_tokens"),
        ({"sampling_params": {"made_up": 5}}, "sampling_params.made_up"),
        ({"sampling_params": {"guided_json": {"type": "object"}}}, "sampling_params.guided_json"),
        ({"sampling_param": {}}, "sampling_param"),
        ({"sampling_params": {"json_schema": "{"}}, "sampling_params.json_schema"),
        ({"sampling_params": {"regex": "a", "ebnf": "b"}}, "sampling_params.ebnf"),
        ({"sampling_params": [{}, {}]}, "sampling_params"),
        ({"sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"return_logprob": True, "logprob_start_len": 100}, "logprob_start_len"),
        ({"return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"return_logprob": True, "token_ids_logprob": [4096]}, "token_ids_logprob"),
        ({"return_logprob": [True, True]}, "return_logprob"),
        ({"lora_path": "x"}, "lora_path"),
        ({"rid": ""}, "rid"),
        ({"rid": ["a", "b"]}, "rid"),
        ({"priority": 2**40}, "priority"),
    ],
)
async def test_refusals(serve: Serve, change: dict[str, Any], param: str) -> None:
    server = await serve()
    status, reply = await server.post(PATH, {"text": "a", **change})
    assert status == 400 and (reply["error"]["param"] or "").startswith(param), reply
    assert server.engine.requests == []
