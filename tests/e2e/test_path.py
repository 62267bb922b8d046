"""The path of a request through router, prefill and decode: right answers, the bits one server gives, moved pages."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pd_cluster import PDCluster, assert_idle

from diptych.testing.processes import ServerProcess, metrics

PROMPTS = [
    "What is 12 + 30?",
    "Repeat: blue horse 77",
    "你好",
    "Compute 381 + 256.",
    "test",
]


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 60, "temperature": 0, **fields}


def flush(*servers: ServerProcess) -> None:
    for server in servers:
        server.post("/flush_cache", {})


def test_the_seeds_request_gets_the_seeds_reply_shape(cluster: PDCluster) -> None:
    body = {
        "model": "/models/Qwen3-32B",
        "messages": [{"role": "user", "content": "test"}],
        "max_tokens": 30,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 10,
    }
    reply = cluster.router.post("/v1/chat/completions", body)
    shape = json.loads(Path("examples/seed/reply.json").read_text())
    assert list(reply) == list(shape)
    assert list(reply["choices"][0]) == list(shape["choices"][0])
    assert list(reply["choices"][0]["message"]) == list(shape["choices"][0]["message"])
    assert list(reply["usage"]) == list(shape["usage"])
    assert reply["usage"]["completion_tokens"] == 30 and reply["choices"][0]["finish_reason"] == "length"
    again = cluster.router.post("/v1/chat/completions", body)
    assert again["choices"] == reply["choices"] and again["usage"] == reply["usage"]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 7}])
def test_disaggregated_and_unified_agree_bit_for_bit(
    cluster: PDCluster, unified: ServerProcess, sampling: dict[str, Any]
) -> None:
    for text in PROMPTS:
        body = chat(text, logprobs=True, top_logprobs=3, **sampling)
        one = unified.post("/v1/chat/completions", body)["choices"][0]
        two = cluster.router.post("/v1/chat/completions", body)["choices"][0]
        again = cluster.router.post("/v1/chat/completions", body)["choices"][0]  # with a cached prefix
        assert one == two == again, text


def test_logprobs_agree_bit_for_bit_and_cover_the_prompt(cluster: PDCluster, unified: ServerProcess) -> None:
    """Scenario 2 and the parity kit, 24: token ids and logprobs `==`, with flushes between and a cached resend."""
    flush(unified, *cluster.servers)
    body = {
        "text": "<|im_start|>user\nWhat is 41 + 17?<|im_end|>\n<|im_start|>assistant\n",
        "sampling_params": {"temperature": 0, "max_new_tokens": 24},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
    }
    one, two = unified.post("/generate", body), cluster.router.post("/generate", body)
    flush(*cluster.servers)
    three = cluster.router.post("/generate", body)
    for name in ("input_token_logprobs", "output_token_logprobs", "input_top_logprobs", "output_top_logprobs"):
        assert one["meta_info"][name] == two["meta_info"][name] == three["meta_info"][name], name
    assert one["output_ids"] == two["output_ids"] == three["output_ids"]
    meta = two["meta_info"]
    assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    resend = {**body, "logprob_start_len": -1}
    cluster.router.post("/generate", resend)
    cached = cluster.router.post("/generate", resend)
    assert cached["output_ids"] == one["output_ids"]
    assert cached["meta_info"]["output_token_logprobs"] == one["meta_info"]["output_token_logprobs"]


def test_a_resend_finds_its_prefix_cached(cluster: PDCluster) -> None:
    flush(*cluster.servers)
    prompt = list(range(300, 364))
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    replies = [cluster.router.post("/generate", body) for _ in range(4)]  # round robin over two prefill servers
    assert [reply["output_ids"] for reply in replies] == [replies[0]["output_ids"]] * 4
    assert [reply["meta_info"]["cached_tokens"] for reply in replies] == [0, 0, 48, 48]


def test_kv_pages_moved_between_processes(cluster: PDCluster) -> None:
    def moved() -> tuple[list[float], float]:
        pages = [metrics(server.get("/metrics")) for server in cluster.servers]
        sent = [page["sglang:kv_pages_sent_total"] for page in pages[:-1]]
        return sent, pages[-1]["sglang:kv_pages_received_total"]

    flush(*cluster.servers)
    sent_before, received_before = moved()
    steps_before = metrics(cluster.decode[0].get("/metrics"))["sglang:prompt_tokens_total"]
    body = {"input_ids": list(range(200, 300)), "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
    cluster.router.post("/generate", body)
    sent, received = moved()
    assert received - received_before == 7  # ceil(100 / 16)
    assert sum(sent) - sum(sent_before) == 7
    assert metrics(cluster.decode[0].get("/metrics"))["sglang:prompt_tokens_total"] - steps_before == 100


def test_first_token_ends_the_request(cluster: PDCluster) -> None:
    """Scenario 4: eos or a stop string as the first token."""
    eos = cluster.decode[0].get("/server_info")["model"]["eos_token_ids"][0]
    body = {
        "input_ids": [300, 301, 302],
        "sampling_params": {"temperature": 0, "max_new_tokens": 8, "logit_bias": {str(eos): 100}},
    }
    reply = cluster.router.post("/generate", body)
    assert reply["meta_info"]["completion_tokens"] == 1
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": eos}
    body["sampling_params"]["ignore_eos"] = True
    assert cluster.router.post("/generate", body)["meta_info"]["completion_tokens"] == 8
    first = cluster.router.post("/generate", {**body, "sampling_params": {"temperature": 0, "max_new_tokens": 1}})
    stop = {"temperature": 0, "max_new_tokens": 8, "stop": [first["text"]]}
    assert first["text"]
    stopped = cluster.router.post("/generate", {**body, "sampling_params": stop})
    assert stopped["meta_info"]["completion_tokens"] == 1 and stopped["text"] == ""


def test_structured_output(cluster: PDCluster, unified: ServerProcess) -> None:
    """Scenario 3, and the same bits as unified."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    body = chat(
        "Extract the name and the age as JSON: Anna is 31 years old.",
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        chat_template_kwargs={"enable_thinking": False},
        max_tokens=80,
    )
    reply = cluster.router.post("/v1/chat/completions", body)
    value = json.loads(reply["choices"][0]["message"]["content"])
    assert set(value) == {"name", "age"} and isinstance(value["age"], int)
    assert reply["choices"] == unified.post("/v1/chat/completions", body)["choices"]


def stream(server: ServerProcess, path: str, body: dict[str, Any]) -> list[str]:
    request = urllib.request.Request(
        server.url + path, json.dumps({**body, "stream": True}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        text = reply.read().decode()
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event]


def test_streaming_through_the_router(cluster: PDCluster) -> None:
    """Scenario 20: one terminal frame, and it is last; one request id; the last text extends the first."""
    body = {
        "input_ids": [300, 301, 302],
        "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
    }
    events = stream(cluster.router, "/generate", body)
    assert events[-1] == "[DONE]"
    frames = [json.loads(event) for event in events[:-1]]
    assert [frame["meta_info"]["finish_reason"] is not None for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert len({frame["meta_info"]["id"] for frame in frames}) == 1
    assert frames[-1]["text"].startswith(frames[0]["text"])
    whole = cluster.router.post("/generate", body)
    assert frames[-1]["text"] == whole["text"] and frames[-1]["output_ids"] == whole["output_ids"]


def test_a_batch_keeps_its_order(cluster: PDCluster) -> None:
    """Scenario 21, with answers that can be told apart; and n > 1, a room each."""
    bodies = ["What is 20 + 22?", "What is 50 + 13?"]
    texts = [f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n" for body in bodies]
    replies = cluster.router.post(
        "/generate", {"text": texts, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    )
    assert "42" in replies[0]["text"] and "63" in replies[1]["text"]
    reply = cluster.router.post("/v1/chat/completions", chat("Say hello.", n=3, temperature=1.0, seed=5))
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]


def test_a_request_without_bootstrap_is_refused_by_a_node(cluster: PDCluster) -> None:
    """Scenario 22: 400 at once, on either side."""
    for server in (cluster.prefill[0], cluster.decode[0]):
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.post("/generate", {"input_ids": [300], "sampling_params": {"max_new_tokens": 2}}, timeout_s=10)
        assert caught.value.code == 400
        assert "bootstrap" in json.loads(caught.value.read())["error"]["message"]


def test_health_generate_on_each_node(cluster: PDCluster, unified: ServerProcess) -> None:
    """Scenario 23."""
    for server in (*cluster.servers, unified, cluster.router):
        for path in ("/health_generate", "/health", "/ready"):
            with urllib.request.urlopen(server.url + path, timeout=30) as reply:
                assert reply.status == 200, (server.args, path)


def test_a_decode_server_prefills_by_itself_when_told_to(cluster: PDCluster, unified: ServerProcess) -> None:
    body = {"input_ids": list(range(300, 340)), "sampling_params": {"temperature": 0, "max_new_tokens": 12}}
    alone = cluster.decode[0].post("/generate", {**body, "bootstrap_host": None})
    assert alone["output_ids"] == unified.post("/generate", body)["output_ids"]


def test_fake_bootstrap_needs_no_partner(cluster: PDCluster) -> None:
    body = {
        "input_ids": [300, 301],
        "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
        "bootstrap_host": "2.2.2.2",
        "bootstrap_port": 1,
        "bootstrap_room": 3,
    }
    assert len(cluster.decode[0].post("/generate", body)["output_ids"]) == 4
    assert cluster.prefill[0].post("/generate", body)["meta_info"]["completion_tokens"] == 1


def test_long_prompts_and_many_at_once(cluster: PDCluster, unified: ServerProcess) -> None:
    """Different lengths, chunked, batched, cached: always the bits of a quiet server."""
    bodies = [
        {
            "input_ids": [(i * 37 + k * 11) % 1500 + 300 for k in range(length)],
            "sampling_params": {"temperature": 0.8, "sampling_seed": i, "max_new_tokens": 10, "ignore_eos": True},
            "return_logprob": True,
        }
        for i, length in enumerate([3, 16, 17, 100, 513, 1024, 1500, 40, 40, 2000, 15, 600])
    ]
    alone = [unified.post("/generate", body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        crowd = list(pool.map(lambda body: cluster.router.post("/generate", body), bodies))
    for one, two in zip(alone, crowd, strict=True):
        assert one["output_ids"] == two["output_ids"]
        assert one["meta_info"]["output_token_logprobs"] == two["meta_info"]["output_token_logprobs"]
        assert all(math.isfinite(entry[0]) for entry in two["meta_info"]["output_token_logprobs"])


def test_nothing_is_left(cluster: PDCluster) -> None:
    for server in cluster.servers:
        assert_idle(server)
