"""All routes besides inference, and what holds for every route."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import psutil
import pytest
from mock_server import hang, refuse
from prometheus_client.parser import text_string_to_metric_families
from router_cluster import until

BODY = {"text": "a"}


async def get(c, path, **options):
    async with c.http.get(path, **options) as response:
        return response.status, await response.read()


def error_of(data: bytes) -> dict:
    return json.loads(data)["error"]


async def test_alive_and_ready(cluster):
    c = await cluster(1, 1, health_check_interval_secs=0.02, health_failure_threshold=1)
    for path in ("/health", "/liveness", "/readiness", "/ready"):
        assert (await get(c, path))[0] == 200
        async with c.http.head(path) as response:
            assert response.status == 200
    c.decode[0].healthy = False
    await until(lambda: not c.router.fleet.ready)
    for path in ("/readiness", "/ready"):
        status, data = await get(c, path)
        assert status == 503 and "no decode server" in error_of(data)["message"]
    for path in ("/health", "/liveness"):
        assert (await get(c, path))[0] == 200
    c.decode[0].healthy = True
    await until(lambda: c.router.fleet.ready)
    assert (await get(c, "/ready"))[0] == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/model_info", "/get_model_info?x=1"])
async def test_a_prefill_server_tells_about_the_model(cluster, path):
    c = await cluster(2, 1)
    assert await get(c, path) == (200, json.dumps({"path": path.partition("?")[0], "by": "p0"}).encode())
    assert c.prefill[0].controls == [("GET", path, b"")]
    await c.prefill[0].stop()
    status, data = await get(c, path)
    assert status == 200 and json.loads(data)["by"] == "p1"


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
async def test_server_info_of_all(cluster, path):
    c = await cluster(2, 1)
    status, data = await get(c, path)
    info = json.loads(data)
    assert status == 200
    assert [server["name"] for server in info["prefill"]] == ["p0", "p1"]
    assert [server["name"] for server in info["decode"]] == ["d0"]
    assert info["internal_states"] == [{"last_gen_throughput": 1.0, "of": "d0"}]


async def test_server_info_in_plain_mode(cluster):
    c = await cluster(0, 0, num_workers=2)
    info = json.loads((await get(c, "/server_info"))[1])
    assert [server["name"] for server in info["workers"]] == ["w0", "w1"] and len(info["internal_states"]) == 2


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health_generate"), ("GET", "/flush_cache"), ("POST", "/flush_cache"), ("POST", "/abort_request")],
)
async def test_some_requests_go_to_all_servers(cluster, method, path):
    c = await cluster(2, 1)
    body = b'{"rid":"x"}' if method == "POST" else b""
    async with c.http.request(method, path, data=body) as response:
        told = json.loads(await response.read())
        assert response.status == 200 and told["success"]
    assert [(r["worker"], r["status"]) for r in told["results"]] == [(server.url, 200) for server in c.servers]
    assert all(server.controls == [(method, path, body)] for server in c.servers)


async def test_one_failure_is_told(cluster):
    c = await cluster(1, 1)
    await c.decode[0].stop()
    async with c.http.post("/flush_cache") as response:
        told = json.loads(await response.read())
        assert response.status == 502 and not told["success"]
    assert [r["status"] for r in told["results"]] == [200, 502]


async def test_other_posts_go_to_one_decode_server(cluster):
    c = await cluster(1, 2)
    for _ in range(2):
        status, data = await c.post("/v1/embeddings", {"input": "a"})
        assert status == 200 and json.loads(data)["path"] == "/v1/embeddings"
    assert [len(server.controls) for server in c.decode] == [1, 1] and not c.prefill[0].controls
    assert c.decode[0].controls[0][2] == b'{"input": "a"}'
    assert all(server.num_requests == 0 for server in c.router.fleet.servers)


async def test_workers_and_loads(cluster):
    c = await cluster(1, 1)
    c.decode[0].scripts.append(hang())
    task = asyncio.create_task(c.post("/generate", BODY))
    await until(lambda: c.decode[0].bodies and c.prefill[0].bodies)
    told = json.loads((await get(c, "/workers"))[1])
    assert told["total"] == 2 and told["stats"] == {"prefill_count": 1, "decode_count": 1}
    decode = told["workers"][1]
    assert decode["url"] == c.decode[0].url and decode["worker_type"] == "decode" and decode["is_healthy"]
    assert decode["load"] == 1 and decode["prompt_bytes"] == len(json.dumps(BODY)) and decode["circuit"] == "closed"
    assert told["workers"][0]["bootstrap_port"] == 34000
    loads = json.loads((await get(c, "/get_loads"))[1])["workers"]
    assert [load["load"] for load in loads][1] == 1
    task.cancel()
    await c.decode[0].left.wait()


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("POST", "/nope", 404, "not_found"),
        ("GET", "/v1/nope", 405, "method_not_allowed"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("PUT", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/workers", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_what_is_not_there(cluster, method, path, status, code):
    c = await cluster(1, 1)
    async with c.http.request(method, path) as response:
        assert response.status == status
        error = error_of(await response.read())
    assert error["code"] == code and error["type"] and set(error) == {"message", "type", "param", "code"}


async def test_a_body_that_is_no_json_object(cluster):
    c = await cluster(1, 1)
    for data in (b"", b"[1]", b"{"):
        async with c.http.post("/generate", data=data) as response:
            assert response.status == 400 and error_of(await response.read())["type"] == "invalid_request_error"
    assert not c.decode[0].bodies


# keys, ids, origins


async def test_every_route_but_probes_needs_the_key(cluster):
    c = await cluster(1, 1, api_key="secret")
    routes = [
        ("GET", path) for path in ("/v1/models", "/metrics", "/workers", "/get_loads", "/server_info", "/flush_cache")
    ]
    routes += [("GET", "/health_generate"), ("GET", "/model_info"), ("GET", "/nothing/known")]
    routes += [("POST", path) for path in ("/generate", "/v1/chat/completions", "/abort_request", "/v1/other")]
    for method, path in routes:
        for header in (None, "secret", "Bearer wrong", "Basic secret", "Bearer "):
            headers = {"authorization": header} if header else {}
            async with c.http.request(method, path, headers=headers) as response:
                assert response.status == (404 if path == "/nothing/known" else 401), (method, path, header)
    for path in ("/health", "/liveness", "/ready", "/readiness"):
        assert (await get(c, path))[0] == 200
    headers = {"authorization": "Bearer secret"}
    assert (await c.post("/generate", BODY, headers=headers))[0] == 200
    assert (await get(c, "/metrics", headers=headers))[0] == 200
    assert c.decode[0].headers[0]["authorization"] == "Bearer secret"


async def test_without_a_key_a_clients_own_passes(cluster):
    c = await cluster(1, 1)
    await c.post("/generate", BODY, headers={"authorization": "Bearer theirs"})
    assert c.prefill[0].headers[0]["authorization"] == "Bearer theirs"


async def test_request_ids(cluster):
    c = await cluster(1, 1, request_id_headers=("x-mine", "x-request-id"))
    for sent, expected in (({"x-mine": "a", "x-request-id": "b"}, "a"), ({"x-request-id": "b"}, "b"), ({}, None)):
        async with c.http.post("/generate", json=BODY, headers=sent) as response:
            told = response.headers.getall("x-request-id")
        assert len(told) == 1 and (told[0] == expected if expected else len(told[0]) == 32)
        for server in c.servers:
            assert server.headers[-1].getall("x-request-id") == told
    async with c.http.get("/nope", headers={"x-mine": "z"}) as response:
        assert response.headers["x-request-id"] == "z"


async def test_pages_of_other_origins(cluster):
    c = await cluster(1, 1, cors_allowed_origins=("https://ours",))
    headers = {"origin": "https://ours", "access-control-request-method": "POST"}
    async with c.http.options("/v1/chat/completions", headers=headers) as response:
        assert response.status == 204
        assert response.headers["access-control-allow-origin"] == "https://ours"
        assert "POST" in response.headers["access-control-allow-methods"]
    async with c.http.post("/generate", json=BODY, headers={"origin": "https://ours"}) as response:
        assert response.headers["access-control-allow-origin"] == "https://ours"
    async with c.http.options("/generate", headers={"origin": "https://theirs"}) as response:
        assert response.status == 400
    async with c.http.post("/generate", json=BODY, headers={"origin": "https://theirs"}) as response:
        assert "access-control-allow-origin" not in response.headers


async def test_any_origin(cluster):
    c = await cluster(1, 1, cors_allowed_origins=("*",))
    async with c.http.post("/generate", json=BODY, headers={"origin": "https://any"}) as response:
        assert response.headers["access-control-allow-origin"] == "https://any"


# limits


async def test_the_queue_is_bounded_in_length_and_time(cluster):
    c = await cluster(1, 1, max_concurrent_requests=2, queue_size=1, queue_timeout_secs=0.2)
    c.decode[0].gates = [asyncio.Event()]
    running = [asyncio.create_task(c.post("/generate", {**BODY, "stream": True})) for _ in range(2)]
    await until(lambda: len(c.decode[0].bodies) == 2)
    waiting = asyncio.create_task(c.post("/generate", BODY))
    await until(lambda: c.router.app._core.gate.num_waiting == 1)
    async with c.http.post("/generate", json=BODY) as response:
        assert response.status == 429 and response.headers["retry-after"] == "1"
        assert error_of(await response.read())["type"] == "rate_limit_error"
    status, data = await waiting
    assert status == 408 and error_of(data)["code"] == "queue_timeout"
    waiting = asyncio.create_task(c.post("/generate", BODY))
    await until(lambda: c.router.app._core.gate.num_waiting == 1)
    c.decode[0].gates[0].set()
    assert [(await task)[0] for task in (*running, waiting)] == [200, 200, 200]
    assert c.router.app._core.gate.num_inside == 0


async def test_a_client_that_leaves_the_queue_frees_its_place(cluster):
    c = await cluster(1, 1, max_concurrent_requests=1, queue_size=5)
    c.decode[0].gates = [asyncio.Event()]
    first = asyncio.create_task(c.post("/generate", {**BODY, "stream": True}))
    await until(lambda: c.decode[0].bodies)
    gone = [asyncio.create_task(c.post("/generate", BODY)) for _ in range(3)]
    await until(lambda: c.router.app._core.gate.num_waiting == 3)
    for task in gone:
        task.cancel()
    await until(lambda: c.router.app._core.gate.num_waiting == 0)
    c.decode[0].gates[0].set()
    assert (await first)[0] == 200 and (await c.post("/generate", BODY))[0] == 200
    assert len(c.decode[0].bodies) == 2


# metrics


async def test_metrics(cluster):
    c = await cluster(2, 1, prometheus_port=0)
    for _ in range(3):
        await c.post("/generate", BODY)
    await c.post("/v1/chat/completions", {**BODY, "stream": True})
    c.prefill[0].scripts.append(refuse(500))
    await c.post("/generate", BODY)
    await c.post("/made/up/by/a/client", BODY)
    status, data = await get(c, "/metrics")
    assert status == 200
    found = {}
    for family in text_string_to_metric_families(data.decode()):
        for sample in family.samples:
            found[sample.name, *sorted(sample.labels.values())] = sample.value
    assert found["smg_router_requests_total", "/generate", "200"] == 4
    assert found["smg_router_requests_total", "404", "other"] == 1
    assert found["smg_router_request_errors_total", "404", "other"] == 1
    assert found["smg_router_request_duration_seconds_count", "/generate"] == 4
    assert found["smg_router_ttft_seconds_count", "/v1/chat/completions"] == 1
    assert found["smg_worker_retries_total",] == 1
    assert found["smg_worker_errors_total", c.prefill[0].url, "prefill"] == 1
    assert found["smg_worker_selection_total", "decode", c.decode[0].url] == 6
    assert found["smg_worker_health", "decode", c.decode[0].url] == 1
    assert found["smg_worker_cb_state", "decode", c.decode[0].url] == 0
    assert found["smg_router_requests_active",] == 0
    assert found["diptych_router_ready",] == 1
    resident = psutil.Process().memory_info().rss  # the router runs in this process; tests/e2e bounds its own
    assert 0.5 * resident < found["process_resident_memory_bytes",] < 1.5 * resident
    assert b"made/up" not in data


async def test_the_metrics_port_serves_metrics_only(cluster):
    c = await cluster(1, 1, prometheus_port=0, api_key="secret")
    port = c.router.metrics_port
    assert port not in (0, c.router.port)
    status, data = await get(c, f"http://127.0.0.1:{port}/metrics")
    assert status == 200 and b"smg_worker_health" in data
    for path in ("/workers", "/generate"):
        assert (await get(c, f"http://127.0.0.1:{port}{path}"))[0] == 404


@pytest.mark.parametrize("answer", ["[]", "7", '{"internal_states": 7}', "[" * 5000, "oops"])
async def test_server_info_of_servers_that_tell_nonsense(cluster, answer):
    c = await cluster(1, 1)
    for server in c.servers:
        server.info = answer
    async with c.http.get("/server_info") as response:
        assert response.status == 200 and (await response.json())["internal_states"] == []


async def test_every_metric_is_documented_and_every_documented_one_there(cluster):
    c = await cluster(1, 1)
    assert (await c.post("/generate", {"text": "a"}))[0] == 200
    assert (await c.post("/nothing", {}))[0] == 404
    async with c.http.get("/metrics") as response:
        shown = set(re.findall(r"^# TYPE (\w+) ", await response.text(), re.MULTILINE))
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `((?:smg|diptych_router)_\w+)` ", text, re.MULTILINE))
    assert {name for name in shown if not name.startswith("process_")} == documented
