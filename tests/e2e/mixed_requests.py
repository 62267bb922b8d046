"""Requests of every kind for the tests of exactness, and what of their answers must agree to the last bit."""

from __future__ import annotations

import random
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diptych.testing.processes import ServerProcess

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 90, 127, 128, 129, 200, 255, 257, 300)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "presence_penalty": 0.8, "frequency_penalty": 0.5},
    {"temperature": 1.2, "min_new_tokens": 6, "logit_bias": {"301": 4.0, "302": -100}},
    {"temperature": 0, "json_schema": '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'},
    {"temperature": 0.9, "regex": "[a-c]{4,9} [0-9]{2}"},
    {"temperature": 0, "ignore_eos": True, "stop_token_ids": [310, 311]},
    {"temperature": 0.5, "top_k": 50, "ignore_eos": True},
)
LOGPROBS: tuple[dict[str, Any], ...] = (
    {"return_logprob": True},
    {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2},
    {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [300, 301]},
    {},
)


def mixed_requests(count: int = 40, *, most_new: int = 20) -> list[dict[str, Any]]:
    """`count` bodies for /generate; many prompts share a beginning, so that prefixes are found in caches."""
    rng = random.Random(20)
    shared = [[rng.randrange(300, 3000) for _ in range(300)] for _ in range(3)]
    bodies = []
    for index in range(count):
        length = LENGTHS[index % len(LENGTHS)]
        prompt = shared[index % 3][: length * 2 // 3]
        prompt += [rng.randrange(300, 3000) for _ in range(length - len(prompt))]
        sampling = {"sampling_seed": index, "max_new_tokens": rng.randint(6, most_new), **SAMPLINGS[index % 10]}
        logprobs = LOGPROBS[(index // 3) % len(LOGPROBS)]
        start = min(logprobs.get("logprob_start_len", -1), length - 1)
        bodies.append({"input_ids": prompt, "sampling_params": sampling, **logprobs, "logprob_start_len": start})
    return bodies


def essence(reply: dict[str, Any]) -> dict[str, Any]:
    """What must be the same wherever and however the request was served."""
    meta = reply["meta_info"]
    kept = {name: meta[name] for name in meta if name.endswith("logprobs")}
    names = ("finish_reason", "prompt_tokens", "completion_tokens")
    return {"text": reply["text"], "ids": reply["output_ids"], **kept, **{name: meta[name] for name in names}}


def generate(server: ServerProcess, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request. An error of the server fails the test with its text."""
    try:
        return dict(server.post("/generate", body, timeout_s=240))
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.code}: {error.read().decode()} for {body}") from None


def one_by_one(server: ServerProcess, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [generate(server, body) for body in bodies]


def all_at_once(server: ServerProcess, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: generate(server, body), bodies))


def assert_same(expected: list[dict[str, Any]], replies: list[dict[str, Any]], what: str) -> None:
    for index, (one, two) in enumerate(zip(expected, replies, strict=True)):
        assert essence(one) == essence(two), f"{what}: request {index}"
