"""Requests through pairs of servers that are well."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter

import pytest
from mock_server import TOKENS, say

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def test_pair_gets_the_same_body_in_one_room(cluster):
    c = await cluster(1, 1)
    status, data = await c.post("/v1/chat/completions", CHAT)
    assert status == 200
    assert data == json.dumps(c.decode[0].answer("/v1/chat/completions", CHAT)).encode()
    assert c.prefill[0].raw == c.decode[0].raw
    body = c.prefill[0].bodies[0]
    assert body["bootstrap_host"] == "127.0.0.1" and body["bootstrap_port"] == 34000
    assert 0 <= body["bootstrap_room"] < 2**63
    assert {name: body[name] for name in CHAT} == CHAT


async def test_stream_is_relayed_byte_for_byte(cluster):
    c = await cluster(1, 1)
    body = {**CHAT, "stream": True}
    async with c.http.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["x-served-by"] == "d0"
        data = await response.read()
    assert data == b"".join(c.decode[0].events("/v1/chat/completions", body))


async def test_parts_of_a_stream_come_as_they_are_written(cluster):
    c = await cluster(1, 1)
    decode = c.decode[0]
    decode.gates = [asyncio.Event() for _ in TOKENS]
    body = {**CHAT, "stream": True}
    expected = decode.events("/v1/chat/completions", body)
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(c.http.post("/v1/chat/completions", json=body).__aenter__())
        decode.gates[0].set()
        response = await answer
        parts = response.content.iter_chunks()
        for number in range(len(TOKENS)):
            part, _ = await anext(parts)
            assert part == expected[number]
            if number + 1 < len(TOKENS):
                decode.gates[number + 1].set()
        assert [part async for part, _ in parts] == [expected[-1]]


async def test_status_and_headers_are_kept_but_for_hop_by_hop_ones(cluster):
    c = await cluster(1, 1)
    headers = {"content-type": "application/json", "x-own": "1", "connection": "x-hop, keep-alive", "x-hop": "1"}
    c.decode[0].scripts.append(say(b'{"a": 1}', 201, headers))
    sent = {"x-mine": "2", "connection": "x-drop", "x-drop": "3", "te": "trailers", "accept-encoding": "gzip"}
    async with c.http.post("/generate", json={"text": "a"}, headers=sent) as response:
        assert response.status == 201 and await response.read() == b'{"a": 1}'
        assert response.headers["x-own"] == "1" and "x-hop" not in response.headers
    for server in c.servers:
        got = server.headers[0]
        assert got["x-mine"] == "2" and got["host"] == f"127.0.0.1:{server.port}"
        assert not {"x-drop", "te", "accept-encoding"} & {name.lower() for name in got}


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
async def test_a_thousand_rooms_are_met_by_the_right_pairs(cluster, path):
    c = await cluster(2, 2, policy="random")
    answers = await asyncio.gather(*(c.post(path, {"text": "a", "stream": i % 2 == 0}) for i in range(200)))
    assert all(status == 200 for status, _ in answers)
    asked = Counter(room for server in c.prefill for room in server.rooms())
    met = Counter(room for server in c.decode for room in server.rooms())
    assert asked == met and len(asked) == 200
    assert all(server.bodies for server in c.servers)
    assert all(server.num_requests == 0 for server in c.router.fleet.servers)


async def test_batches_have_a_room_each(cluster):
    c = await cluster(1, 1)
    status, data = await c.post("/generate", {"text": ["a", "b"], "sampling_params": {"n": 2}})
    assert status == 200 and len(json.loads(data)) == 4
    body = c.decode[0].bodies[0]
    assert len(set(body["bootstrap_room"])) == 4
    assert body["bootstrap_host"] == ["127.0.0.1"] * 4 and body["bootstrap_port"] == [34000] * 4


async def test_logprobs_of_the_prompt_come_from_prefill(cluster):
    c = await cluster(1, 1)
    for body in ({"text": "a", "return_logprob": True}, {"text": ["a", "b"], "return_logprob": True}):
        status, data = await c.post("/generate", body)
        assert status == 200
        items = json.loads(data)
        for index, item in enumerate(items if isinstance(items, list) else [items]):
            meta = item["meta_info"]
            assert meta["input_token_logprobs"] == [[None, 1, None], [-0.5, 2 + index, None], [-1.5, 3, None]]
            assert len(meta["output_token_logprobs"]) == len(TOKENS)


async def test_logprobs_of_the_prompt_come_in_a_stream_too(cluster):
    c = await cluster(1, 1)
    status, data = await c.post("/generate", {"text": "a", "return_logprob": True, "stream": True})
    events = data.split(b"\n\n")
    assert status == 200 and events[-2:] == [b"data: [DONE]", b""]
    for number, event in enumerate(events[:-2]):
        meta = json.loads(event.removeprefix(b"data: "))["meta_info"]
        assert len(meta["input_token_logprobs"]) == 3 and len(meta["output_token_logprobs"]) == number + 1


async def test_plain_mode_adds_nothing(cluster):
    c = await cluster(0, 0, num_workers=2)
    answers = [await c.post("/v1/chat/completions", CHAT) for _ in range(4)]
    assert all(status == 200 for status, _ in answers)
    assert [server.bodies for server in c.workers] == [[CHAT, CHAT], [CHAT, CHAT]]
    _, data = await c.post("/generate", {"text": "a", "stream": True})
    assert data == b"".join(c.workers[0].events("/generate", {"text": "a"}))


async def test_connections_to_servers_are_kept(cluster):
    c = await cluster(1, 1)
    for _ in range(20):
        assert (await c.post("/generate", {"text": "a"}))[0] == 200
    assert all(len(server.peers) <= 2 for server in c.servers)  # one of them is the health check's


async def test_a_big_body_passes(cluster):
    c = await cluster(1, 1)
    text = "x" * (5 << 20)
    async with c.http.post("/generate", data=io.BytesIO(json.dumps({"text": text}).encode())) as response:
        assert response.status == 200
    assert c.decode[0].bodies[0]["text"] == text == c.prefill[0].bodies[0]["text"]
