"""Administration, information, metrics over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import msgspec
import pytest
from api_server import DEMO, HEALTHY, INFERENCE, Serve
from mock_engine_client import EOS
from prometheus_client.parser import text_string_to_metric_families

from diptych.errors import BadRequest, DeadlineExceeded
from diptych.text.tokenizer import Tokenizer
from diptych.types import Stats

CHAT = "/v1/chat/completions"


# ---- administration ----


@pytest.mark.parametrize("path", INFERENCE)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by", ["rid", "prefix", "all"])
async def test_abort(serve: Serve, path: str, stream: bool, by: str) -> None:
    """An aborted request ends at once, with what there is and the reason `abort`."""
    server = await serve("x" * 50)
    server.engine.gate.clear()
    body = {**INFERENCE[path], "rid": "job-12345", "stream": stream}
    task = asyncio.create_task(server.http.post(server.url + path, json=body))
    await server.engine.until(lambda: len(server.engine.requests) == 1)
    order = {"rid": {"rid": "job-12345"}, "prefix": {"rid": "job-"}, "all": {"abort_all": True}}[by]
    assert await server.post("/abort_request", order) == (200, {"success": True, "aborted": 1})
    reply = await task
    text = await reply.text()
    assert reply.status == 200 and '"abort"' in text
    if path == "/generate" and not stream:
        reason = json.loads(text)["meta_info"]["finish_reason"]
        assert (reason["type"], reason["status_code"]) == ("abort", 499)
    server.engine.gate.set()


async def test_abort_of_nothing(serve: Serve) -> None:
    server = await serve()
    assert await server.post("/abort_request", {"rid": "unknown"}) == (200, {"success": True, "aborted": 0})
    assert server.engine.aborted == []
    for body in ({}, {"rid": ""}, {"rid": None}):
        assert (await server.post("/abort_request", body))[0] == 400
    assert server.engine.aborted == []


async def test_two_clients_with_one_id(serve: Serve) -> None:
    """Both are served; aborting the id aborts both."""
    server = await serve("x" * 50)
    server.engine.gate.clear()
    tasks = [asyncio.create_task(server.post("/generate", {"text": "a", "rid": "same"})) for _ in range(2)]
    await server.engine.until(lambda: len(server.engine.requests) == 2)
    assert len({request.rid for request in server.engine.requests}) == 2
    assert (await server.post("/abort_request", {"rid": "same"}))[1]["aborted"] == 2
    for status, _ in await asyncio.gather(*tasks):
        assert status == 200
    server.engine.gate.set()


async def test_flush_cache(serve: Serve) -> None:
    server = await serve()
    for method in ("GET", "POST"):
        async with server.http.request(method, server.url + "/flush_cache") as reply:
            assert reply.status == 200
    assert server.engine.controls == [("flush_cache", {})] * 2
    server.engine.control_error = BadRequest("pages are held by hand-overs")
    status, reply_ = await server.post("/flush_cache", {})
    assert status == 400 and "hand-overs" in reply_["error"]["message"]


async def test_flush_cache_needs_an_idle_server(serve: Serve) -> None:
    server = await serve()
    server.engine.gate.clear()
    task = asyncio.create_task(server.post(CHAT, INFERENCE[CHAT]))
    await server.engine.until(lambda: len(server.engine.requests) == 1)
    status, reply = await server.post("/flush_cache", {})
    assert status == 400 and "1 requests are running" in reply["error"]["message"]
    assert server.engine.controls == []
    await server.engine.open_gate()
    assert (await task)[0] == 200


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
async def test_pause_and_continue(serve: Serve, mode: str) -> None:
    server = await serve()
    status, reply = await server.post("/pause_generation", {"mode": mode})
    assert (status, reply["mode"]) == (200, mode)
    assert server.engine.controls == [("pause", {"mode": mode})]
    assert [rid for rid, _ in server.engine.aborted] == ([""] if mode == "abort" else [])
    assert (await server.get("/health"))[0] == 200
    status, reply = await server.get("/health_generate")
    assert status == 503 and "paused" in reply["error"]["message"]
    assert (await server.post("/continue_generation", {}))[0] == 200
    assert server.engine.controls[-1] == ("continue", {})
    assert (await server.get("/health_generate"))[0] == 200


async def test_pause_without_a_body_aborts(serve: Serve) -> None:
    server = await serve()
    async with server.http.post(server.url + "/pause_generation") as reply:
        assert reply.status == 200
    assert server.engine.controls == [("pause", {"mode": "abort"})]
    assert (await server.post("/pause_generation", {"mode": "sleep"}))[0] == 400


async def test_control_that_times_out(serve: Serve) -> None:
    server = await serve()
    server.engine.control_error = DeadlineExceeded("the engine did not answer flush_cache within 10 s")
    assert (await server.post("/flush_cache", {}))[0] == 504
    status, reply = await server.get("/server_info")
    assert status == 200 and "did not answer" in reply["internal_states"][0]["error"]


# ---- information ----


async def test_models(serve: Serve) -> None:
    server = await serve(served_model_name="/models/Qwen3-32B")
    status, reply = await server.get("/v1/models")
    assert status == 200 and reply["object"] == "list"
    assert reply["data"][0]["id"] == "/models/Qwen3-32B" and reply["data"][0]["max_model_len"] == 8192
    for path in ("/v1/models//models/Qwen3-32B", "/v1/models/%2Fmodels%2FQwen3-32B", "/v1/models/models/Qwen3-32B"):
        import yarl

        async with server.http.get(yarl.URL(server.url + path, encoded=True)) as found:
            assert (found.status, await found.json()) == (200, reply["data"][0])
    status, error = await server.get("/v1/models/gpt-4")
    assert (status, error["error"]["code"]) == (404, "model_not_found")


async def test_default_name_is_the_path(serve: Serve) -> None:
    server = await serve(served_model_name="")
    _, reply = await server.post(CHAT, INFERENCE[CHAT])
    assert reply["model"] == DEMO


async def test_model_info(serve: Serve) -> None:
    server = await serve()
    for path in ("/get_model_info", "/model_info"):
        status, reply = await server.get(path)
        assert status == 200 and reply["model_path"] == DEMO and reply["is_generation"] is True


async def test_server_info_has_no_secrets(serve: Serve) -> None:
    server = await serve(api_key="sesame-1", admin_api_key="sesame-2", disaggregation_secret_file="")
    headers = {"Authorization": "Bearer sesame-1"}
    for path in ("/server_info", "/get_server_info"):
        status, reply = await server.get(path, headers=headers)
        assert status == 200 and "sesame" not in json.dumps(reply)
        state = reply["internal_states"][0]
        assert reply["disable_radix_cache"] is False and reply["tp_size"] == 1
        assert state["last_gen_throughput"] == 0.0 and state["exact"] is True
        assert state["num_running_reqs"] == 0 and state["num_queue_reqs"] == 0
        assert reply["max_total_num_tokens"] == state["max_total_num_tokens"] == 100_000


async def test_loads(serve: Serve) -> None:
    server = await serve()
    server.engine.stats = Stats(num_running_reqs=3, num_used_tokens=50_000)
    _, reply = await server.get("/v1/loads")
    assert (reply["loads"][0]["num_running_reqs"], reply["loads"][0]["token_usage"]) == (3, 0.5)


async def test_tokenize(serve: Serve, demo: Tokenizer) -> None:
    server = await serve()
    ids = demo.encode("hé 你", special=True)
    for prefix in ("", "/v1"):
        _, reply = await server.post(f"{prefix}/tokenize", {"prompt": "hé 你"})
        assert reply == {"tokens": ids, "count": len(ids), "max_model_len": 8192}
        assert (await server.post(f"{prefix}/detokenize", {"tokens": ids}))[1] == {"text": "hé 你"}
    _, reply = await server.post("/tokenize", {"prompt": ["a", "b"]})
    assert reply["count"] == [1, 1]
    assert (await server.post("/detokenize", {"tokens": [[ids[0]], [EOS]]}))[1]["text"] == [demo.decode(ids[:1]), ""]
    kept = {"tokens": [EOS], "skip_special_tokens": False}
    assert (await server.post("/detokenize", kept))[1]["text"] == "<|im_end|>"
    for bad in ([5000], [-1], [1, [2]], ["a"]):
        assert (await server.post("/detokenize", {"tokens": bad}))[0] == 400


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_tokenizing_is_bounded_as_prompts_are(serve: Serve, demo: Tokenizer, prefix: str) -> None:
    """To the last token, in batches too, and a text that is hopeless is not even encoded."""
    server = await serve()
    longest = server.engine.model.context_len
    fits = demo.decode([300] * longest)
    ids = demo.encode(fits, special=True)
    fits = demo.decode(ids[:longest])
    assert len(demo.encode(fits, special=True)) == longest
    for path, field, good, bad in (
        ("tokenize", "prompt", fits, fits + " more"),
        ("tokenize", "prompt", ["a", fits], ["a", "x" * (demo.longest_token * longest + 1)]),
        ("detokenize", "tokens", [300] * longest, [300] * (longest + 1)),
        ("detokenize", "tokens", [[1], [300] * longest], [[1], [300] * (longest + 1)]),
    ):
        assert (await server.post(f"{prefix}/{path}", {field: good}))[0] == 200
        status, reply = await server.post(f"{prefix}/{path}", {field: bad})
        assert (status, reply["error"]["code"]) == (400, "context_length_exceeded"), reply
        assert reply["error"]["param"] == (
            f"{field}[1]" if isinstance(good[-1], str | list) and len(good) == 2 else field
        )
    for path, field, item in (("tokenize", "prompt", "a"), ("detokenize", "tokens", [300])):
        assert (await server.post(f"{prefix}/{path}", {field: [item] * 1024}))[0] == 200
        status, reply = await server.post(f"{prefix}/{path}", {field: [item] * 1025})
        assert status == 400 and "1024" in reply["error"]["message"]


# ---- metrics ----


def samples(text: str) -> dict[str, float]:
    """name{own labels} -> value; the labels that all have are checked and left out."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("model_name"), labels.pop("tp_rank")) == ("demo", "0")
            assert labels.pop("engine_type") in ("unified", "prefill", "decode")
            name = sample.name + ("" if not labels else str(sorted(labels.items())))
            found[name] = sample.value
    return found


async def scrape(server: Any) -> dict[str, float]:
    async with server.http.get(server.url + "/metrics") as reply:
        assert reply.status == 200 and reply.content_type == "text/plain"
        return samples(await reply.text())


@pytest.mark.parametrize("prefix", ["sglang:", "diptych_"])
async def test_requests_are_measured(serve: Serve, prefix: str) -> None:
    server = await serve(enable_metrics=True, metrics_prefix=prefix)
    _, reply = await server.post(CHAT, INFERENCE[CHAT])
    await server.events("/v1/completions", {**INFERENCE["/v1/completions"], "max_tokens": 4})
    await server.post(CHAT, {"messages": []})
    found = await scrape(server)

    def value(name: str, **labels: str) -> float:
        return found[prefix + name + ("" if not labels else str(sorted(labels.items())))]

    generated = reply["usage"]["completion_tokens"]
    assert value("num_requests_total") == 2
    assert value("time_to_first_token_seconds_count") == 2
    assert value("e2e_request_latency_seconds_count") == 2
    assert value("request_time_per_output_token_seconds_count") == 2
    assert value("inter_token_latency_seconds_count") == generated - 1 + 3
    assert value("generation_tokens_histogram_sum") == generated + 4
    assert value("prompt_tokens_histogram_sum") == sum(len(request.prompt) for request in server.engine.requests)
    ok = {"endpoint": CHAT, "method": "POST", "status_code": "200"}
    assert value("http_responses_total", **ok) == 1
    assert value("http_responses_total", **{**ok, "status_code": "400"}) == 1
    assert value("http_requests_total", endpoint=CHAT, method="POST") == 2
    assert value("http_requests_active", endpoint=CHAT, method="POST") == 0
    assert value("http_requests_active", endpoint="/metrics", method="GET") == 1


async def test_reports_of_the_engine_become_metrics(serve: Serve) -> None:
    server = await serve(enable_metrics=True, disaggregation_mode="decode")
    metrics = server.ctx.metrics
    assert metrics is not None
    report = Stats(
        num_running_reqs=2,
        num_used_tokens=250,
        max_total_num_tokens=1000,
        page_size=16,
        num_pages=63,
        free_pages=10,
        evictable_tokens=32,
        kv_pages_received_total=7,
        kv_bytes_received_total=7000,
        kv_transfer_latency_ms=[3.0, 4.0],
    )
    metrics.update(report)
    metrics.update(msgspec.structs.replace(report, kv_transfer_latency_ms=[5.0], kv_pages_received_total=9))
    found = await scrape(server)
    assert found["sglang:num_running_reqs"] == 2
    assert found["sglang:token_usage"] == 0.25
    assert found["sglang:kv_available_tokens"] == 192
    assert found["sglang:kv_pages_received_total"] == 9
    assert found["sglang:kv_transfer_latency_ms_count"] == 3 and found["sglang:kv_transfer_latency_ms_sum"] == 12.0
    assert found["sglang:cache_config_info[('num_pages', '63'), ('page_size', '16')]"] == 1
    assert not any(name.endswith("_created") for name in found)


async def test_unknown_paths_do_not_make_labels(serve: Serve) -> None:
    server = await serve(enable_metrics=True)
    for index in range(20):
        await server.get(f"/nowhere-{index}")
    for verb in ("PATCH", "PROPFIND", "LOCK"):
        async with server.http.request(verb, server.url + "/health") as reply:
            assert reply.status == 405
    names = [name for name in await scrape(server) if name.startswith("sglang:http_requests_total")]
    assert len(names) == 3  # GET other, other /health, GET /metrics


async def test_logs_have_no_prompts(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = await serve("the secret answer")
    await server.post(CHAT, {"messages": [{"role": "user", "content": "the secret question"}]})
    await server.post(CHAT, {"messages": [{"role": "wizard", "content": "the secret question"}]})
    for path in HEALTHY:
        await server.get(path)
    assert not any("secret" in record.getMessage() for record in caplog.records if record.name.startswith("diptych"))
