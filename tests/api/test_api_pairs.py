"""Requests on the two halves of a pair: which need a room, and what becomes of the three fields."""

from __future__ import annotations

from typing import Any

import pytest
from api_server import Serve, Server

from diptych.types import FAKE_BOOTSTRAP_HOST, Bootstrap

ROOM = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 34000, "bootstrap_room": 7}
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 5}},
    "/v1/completions": {"prompt": "a", "max_tokens": 5},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5},
}


def seen(server: Server) -> list[Bootstrap | None]:
    return [request.bootstrap for request in server.engine.requests]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("mode", ["prefill", "decode"])
async def test_a_room_is_needed(serve: Serve, path: str, mode: str) -> None:
    server = await serve(disaggregation_mode=mode)
    status, reply = await server.post(path, BODIES[path])
    assert (status, reply["error"]["param"]) == (400, "bootstrap_room")
    assert "bootstrap_room" in reply["error"]["message"] and server.engine.requests == []
    status, _ = await server.post(path, {**BODIES[path], **ROOM})
    assert status == 200 and seen(server) == [Bootstrap("10.0.0.1", 34000, 7)]


@pytest.mark.parametrize("path", BODIES)
async def test_a_server_of_both_phases_ignores_rooms(serve: Serve, path: str) -> None:
    server = await serve()
    assert (await server.post(path, {**BODIES[path], **ROOM}))[0] == 200
    assert seen(server) == [None]


@pytest.mark.parametrize("path", BODIES)
async def test_prefill_makes_one_token(serve: Serve, path: str) -> None:
    server = await serve(disaggregation_mode="prefill")
    status, reply = await server.post(path, {**BODIES[path], **ROOM, "stop": "H"})
    assert status == 200
    assert server.engine.requests[0].sampling.max_new_tokens == 1
    reason = (
        reply["meta_info"]["finish_reason"]["type"] if path == "/generate" else reply["choices"][0]["finish_reason"]
    )
    assert reason == "length"
    assert server.engine.closed_early == []


async def test_decode_does_its_own_prefill_when_told(serve: Serve) -> None:
    server = await serve(disaggregation_mode="decode")
    for path, body in BODIES.items():
        assert (await server.post(path, {**body, "bootstrap_host": None}))[0] == 200
        assert (await server.post(path, {**body, "bootstrap_host": None, "bootstrap_room": None}))[0] == 200
    assert seen(server) == [None] * 6
    status, reply = await server.post("/generate", {**BODIES["/generate"], "bootstrap_host": None, "bootstrap_room": 1})
    assert (status, reply["error"]["param"]) == (400, "bootstrap_host")


async def test_prefill_does_not(serve: Serve) -> None:
    server = await serve(disaggregation_mode="prefill")
    status, reply = await server.post("/generate", {**BODIES["/generate"], "bootstrap_host": None})
    assert (status, reply["error"]["param"]) == (400, "bootstrap_room")


async def test_own_port_where_none_is_given(serve: Serve) -> None:
    server = await serve(disaggregation_mode="decode", disaggregation_bootstrap_port=1234)
    for port in ({"bootstrap_port": None}, {}):
        body = {**BODIES["/generate"], "bootstrap_host": "10.0.0.2", "bootstrap_room": 1, **port}
        assert (await server.post("/generate", body))[0] == 200
    assert seen(server) == [Bootstrap("10.0.0.2", 1234, 1)] * 2


async def test_batches_need_a_room_each(serve: Serve) -> None:
    server = await serve(disaggregation_mode="decode")
    body = {
        "input_ids": [[1], [2]],
        "bootstrap_host": "10.0.0.2",
        "bootstrap_port": [1, None],
        "bootstrap_room": [5, 6],
    }
    assert (await server.post("/generate", body))[0] == 200
    assert seen(server) == [Bootstrap("10.0.0.2", 1, 5), Bootstrap("10.0.0.2", 8998, 6)]
    chat = {**BODIES["/v1/chat/completions"], "n": 2, **ROOM, "bootstrap_room": [8, 9]}
    assert (await server.post("/v1/chat/completions", chat))[0] == 200
    assert [pair.room for pair in seen(server) if pair is not None] == [5, 6, 8, 9]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"bootstrap_room": 5}, "bootstrap_room"),
        ({"bootstrap_room": [5]}, "bootstrap_room"),
        ({"bootstrap_room": [5, 5]}, "bootstrap_room"),
        ({"bootstrap_room": [5, None]}, "bootstrap_room"),
        ({"bootstrap_room": [5, -1]}, "bootstrap_room"),
        ({"bootstrap_room": [5, 2**63]}, "bootstrap_room"),
        ({"bootstrap_room": "5"}, "bootstrap_room"),
        ({"bootstrap_host": ["10.0.0.2"]}, "bootstrap_host"),
        ({"bootstrap_host": ["10.0.0.2", None]}, "bootstrap_host"),
        ({"bootstrap_host": "x" * 256}, "bootstrap_host"),
        ({"bootstrap_host": "a\nb"}, "bootstrap_host"),
        ({"bootstrap_port": [1, 2, 3]}, "bootstrap_port"),
        ({"bootstrap_port": 65536}, "bootstrap_port"),
        ({"bootstrap_port": 0}, "bootstrap_port"),
    ],
)
async def test_refusals(serve: Serve, change: dict[str, Any], param: str) -> None:
    server = await serve(disaggregation_mode="decode")
    body = {"input_ids": [[1], [2]], "bootstrap_host": "10.0.0.2", "bootstrap_room": [5, 6], **change}
    status, reply = await server.post("/generate", body)
    assert (status, reply["error"]["param"]) == (400, param), reply
    assert server.engine.requests == []


async def test_prompt_logprobs_that_decode_does_not_know(serve: Serve) -> None:
    """Places are kept, so that a router can fill them from the prefill server's reply."""
    from mock_engine_client import outputs_for

    from diptych.types import Finish, Output, Request

    def script(request: Request) -> list[Output | Exception]:
        import msgspec

        found = outputs_for(request, [20, 21], Finish("length"))
        assert isinstance(found[0], Output)
        return [msgspec.structs.replace(found[0], prompt_logprobs=None), *found[1:]]

    server = await serve(script, disaggregation_mode="decode")
    body = {"prompt": [5, 6, 7], "echo": True, "logprobs": 1, "max_tokens": 2, **ROOM}
    _, reply = await server.post("/v1/completions", body)
    assert reply["choices"][0]["logprobs"]["token_logprobs"] == [None, None, None, -0.25, -0.25]
    native = {"input_ids": [5, 6, 7], "return_logprob": True, "logprob_start_len": 0, **ROOM}
    _, reply = await server.post("/generate", native)
    assert reply["meta_info"]["input_token_logprobs"] == []


@pytest.mark.parametrize("mode", ["prefill", "decode"])
async def test_the_probe_meets_nobody(serve: Serve, mode: str) -> None:
    server = await serve(disaggregation_mode=mode)
    assert (await server.get("/health_generate"))[0] == 200
    request = server.engine.requests[0]
    assert request.bootstrap == Bootstrap(FAKE_BOOTSTRAP_HOST, 8998, 0)
    assert request.rid.startswith("HEALTH_CHECK")


async def test_the_answer_need_not_fit_prefills_pool(serve: Serve) -> None:
    """Only the prompt must: the answer grows on the decode server, which may be larger."""
    body = {"input_ids": [1] * 15, "sampling_params": {"max_new_tokens": 50, "min_new_tokens": 20}, **ROOM}
    for mode, status in (("prefill", 200), ("decode", 400)):
        server = await serve(disaggregation_mode=mode)
        server.engine.max_total_num_tokens = 20
        assert (await server.post("/generate", body))[0] == status
        status, reply = await server.post("/generate", {**body, "input_ids": [1] * 20})
        assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
