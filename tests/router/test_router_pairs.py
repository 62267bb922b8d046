"""One request through a prefill and a decode server."""

from __future__ import annotations

import json

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
