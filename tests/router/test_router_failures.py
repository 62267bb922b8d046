"""Servers that fail: what the client sees, who is tried next, and who is blamed."""

from __future__ import annotations

import asyncio
import json

import pytest
from mock_server import die_after, hang, refuse, reset, say
from router_cluster import held, until

from diptych.errors import EngineLost
from diptych.router.attempt import VERDICT_S
from diptych.router.breaker import Circuit

BODY = {"text": "a"}


def fleet_server(c, mock):
    return next(s for s in c.router.fleet.servers if s.address.port == mock.port)


def message(data: bytes) -> str:
    return json.loads(data)["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prefill_error_reaches_the_client_and_ends_decode(cluster, stream):
    c = await cluster(1, 1)
    c.prefill[0].scripts.append(refuse(400, "the prompt is too long"))
    async with asyncio.timeout(2):  # decode would wait for its room for 5 s
        status, data = await c.post("/generate", {**BODY, "stream": stream})
        await c.decode[0].left.wait()
    assert status == 400 and message(data) == "the prompt is too long"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_decode_error_reaches_the_client_as_it_is(cluster, stream):
    c = await cluster(1, 1)
    c.decode[0].scripts.append(refuse(422, "bad schema"))
    status, data = await c.post("/generate", {**BODY, "stream": stream})
    assert status == 422 and message(data) == "bad schema"
    assert all(server.breaker.state(0) is Circuit.CLOSED for server in c.router.fleet.servers)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_such_statuses_are_tried_elsewhere_in_a_new_room(cluster, role, status):
    c = await cluster(2, 2)
    bad, good = c.prefill if role == "prefill" else c.decode
    bad.scripts.append(refuse(status))
    assert (await c.post("/generate", BODY))[0] == 200
    assert len(bad.bodies) == 1 and len(good.bodies) == 1
    rooms = [room for server in (c.prefill if role == "decode" else c.decode) for room in server.rooms()]
    assert len(rooms) == len(set(rooms)) == 2
    assert c.router.metrics.retries == 1


@pytest.mark.parametrize("script", [reset(), refuse(503), refuse(503, sse=True), die_after([])])
async def test_a_stream_that_has_not_begun_is_tried_elsewhere(cluster, script):
    c = await cluster(1, 2)
    c.decode[0].scripts.append(script)
    body = {**BODY, "stream": True}
    status, data = await c.post("/generate", body)
    assert status == 200 and data == b"".join(c.decode[1].events("/generate", body))


async def test_a_body_that_breaks_off_is_tried_elsewhere(cluster):
    c = await cluster(1, 2)
    headers = {"content-type": "application/json", "content-length": "100"}
    c.decode[0].scripts.append(die_after([b'{"half'], headers))
    status, data = await c.post("/generate", BODY)
    assert status == 200 and json.loads(data) == c.decode[1].answer("/generate", BODY)


async def test_an_error_that_no_other_server_can_help_is_not_repeated(cluster):
    c = await cluster(2, 2)
    c.decode[0].scripts.append(refuse(501))
    assert (await c.post("/generate", BODY))[0] == 501
    assert len(c.decode[1].bodies) == 0


async def test_retries_end(cluster):
    c = await cluster(1, 2, retry_max_retries=3)
    for server in c.decode:
        server.scripts.extend(refuse(503, "full") for _ in range(5))
    status, data = await c.post("/generate", BODY)
    assert status == 503 and message(data) == "full"
    assert sum(len(server.bodies) for server in c.decode) == 4
    assert len(set(c.prefill[0].rooms())) == 4


async def test_retries_can_be_switched_off(cluster):
    c = await cluster(1, 2, disable_retries=True)
    c.decode[0].scripts.append(refuse(503))
    assert (await c.post("/generate", BODY))[0] == 503
    assert not c.decode[1].bodies


async def test_a_storm_of_errors_does_not_become_a_storm_of_retries(cluster):
    c = await cluster(1, 2)
    for server in c.decode:
        server.scripts.extend(refuse(500) for _ in range(10_000))
    answers = await asyncio.gather(*(c.post("/generate", BODY) for _ in range(300)))
    assert {status for status, _ in answers} == {500}
    sent = sum(len(server.bodies) for server in c.decode)
    assert sent <= 300 * 1.1 + 10 + 5  # and what comes back of the reserve meanwhile
    assert c.router.metrics.retries_over_budget > 0


async def test_a_server_that_is_gone_is_left_at_once_and_found_again(cluster):
    c = await cluster(2, 1)
    gone, port = c.prefill[0], c.prefill[0].port
    await gone.stop()
    answers = await asyncio.gather(*(c.post("/generate", BODY) for _ in range(40)))
    assert all(status == 200 for status, _ in answers)
    assert len(c.prefill[1].bodies) == 40
    assert not fleet_server(c, c.prefill[0]).healthy
    await gone.start(port)
    await until(lambda: fleet_server(c, gone).healthy)
    for _ in range(2):
        assert (await c.post("/generate", BODY))[0] == 200
    assert gone.bodies


async def test_requests_on_a_dying_server_move(cluster):
    c = await cluster(2, 1)
    c.prefill[0].scripts.extend(hang() for _ in range(50))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(c.post("/generate", BODY)) for _ in range(40)]
        await until(lambda: len(c.prefill[0].bodies) == 20)
        await c.prefill[0].stop()
    assert all(task.result()[0] == 200 for task in tasks)


def lose_engine():
    words = refuse(503, "the engine of this server has stopped; the request was lost", code=EngineLost.code)

    async def run(server, request, body):
        server.healthy = False
        return await words(server, request, body)

    return run


@pytest.mark.parametrize("death", [reset, lose_engine])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_request_under_which_two_servers_died_is_sent_to_no_third(cluster, role, death):
    c = await cluster(4, 4, disable_health_check=True)
    servers = getattr(c, role)
    for server in servers:
        server.scripts.append(death())
    async with c.http.post("/generate", json=BODY) as response:
        error = json.loads(await response.read())["error"]
        assert (response.status, response.headers["x-should-retry"]) == (500, "false")
    assert error["code"] == "servers_died" and "2 servers died" in error["message"]
    assert sum(len(server.bodies) for server in servers) == 2
    assert c.router.metrics.given_up == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_request_under_which_one_engine_died_is_served(cluster, role):
    c = await cluster(3, 3)
    getattr(c, role)[0].scripts.append(lose_engine())
    assert (await c.post("/generate", BODY))[0] == 200
    assert not fleet_server(c, getattr(c, role)[0]).healthy and c.router.metrics.given_up == 0


async def test_a_server_that_died_twice_under_a_request_counts_twice(cluster):
    c = await cluster(1, 1, health_check_interval_secs=0.02)
    c.decode[0].scripts.extend(lose_engine() for _ in range(3))
    asked = asyncio.create_task(c.post("/generate", BODY))
    await until(lambda: held(c) == 1)
    c.decode[0].healthy = True
    status, data = await asked
    assert status == 500 and b"servers_died" in data and len(c.decode[0].bodies) == 2


async def test_an_engine_that_died_is_the_cause_of_what_the_other_side_tells_first(cluster):
    c = await cluster(1, 4)
    told = [asyncio.Event() for _ in range(2)]

    def tell_first(event):
        async def run(server, request, body):
            asyncio.get_running_loop().call_later(2 * VERDICT_S, event.set)
            return await refuse(500, "the link broke", code="kv_transfer_failed")(server, request, body)

        return run

    def die_later(event):
        async def run(server, request, body):
            await event.wait()
            return await lose_engine()(server, request, body)

        return run

    for event, server in zip(told, c.decode, strict=False):
        c.prefill[0].scripts.append(tell_first(event))
        server.scripts.append(die_later(event))
    status, data = await c.post("/generate", BODY)
    assert status == 500 and b"servers_died" in data
    assert [fleet_server(c, server).healthy for server in c.decode] == [False, False, True, True]
    assert fleet_server(c, c.prefill[0]).healthy and fleet_server(c, c.prefill[0]).num_failed == 0


async def test_no_server_left_is_a_503_that_says_so(cluster):
    c = await cluster(1, 1, hold_timeout_secs=0)
    await c.decode[0].stop()
    async with c.http.post("/generate", json=BODY) as response:
        assert response.status == 503 and response.headers["retry-after"] == "1"
        assert "no decode server is healthy" in message(await response.read())
    assert c.prefill[0].num_cancelled + len(c.prefill[0].bodies) <= 2


@pytest.mark.parametrize(("own", "expected"), [({}, "1"), ({"retry-after": "7"}, "7")])
async def test_a_servers_own_503_says_when_to_try_again(cluster, own, expected):
    c = await cluster(1, 1, disable_retries=True)
    c.decode[0].scripts.append(say(b"{}", 503, own))
    async with c.http.post("/generate", json=BODY) as response:
        assert response.status == 503 and response.headers.getall("retry-after") == [expected]


async def test_so_does_one_that_is_told_in_a_stream(cluster):
    c = await cluster(1, 1, disable_retries=True)
    c.decode[0].scripts.append(refuse(503, sse=True))
    async with c.http.post("/generate", json={**BODY, "stream": True}) as response:
        assert response.status == 503 and response.headers.getall("retry-after") == ["1"]


async def test_a_stream_that_has_begun_ends_with_an_error(cluster):
    c = await cluster(1, 2)
    c.decode[0].scripts.append(die_after([b'data: {"text": "The"}\n\n', b'data: {"te']))
    async with c.http.post("/generate", json={**BODY, "stream": True}) as response:
        data = await response.read()  # the chunked body is whole, or this would raise
    assert data.startswith(b'data: {"text": "The"}\n\ndata: {"te\n\ndata: {"error"')
    events = data.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert "decode failed" in message(events[-3].removeprefix(b"data: "))
    assert not c.decode[1].bodies
    assert c.router.metrics.broken_streams == 1


async def test_a_prefill_that_dies_after_the_first_token_does_not_matter(cluster):
    c = await cluster(1, 1)
    c.decode[0].gates = [asyncio.Event() for _ in range(2)]
    c.decode[0].gates[0].set()

    async def meet_and_break(server, request, body):
        await server._meet(body)
        await c.decode[0].gates[1].wait()
        request.transport.abort()

    c.prefill[0].scripts.append(meet_and_break)
    body = {**BODY, "stream": True}
    async with c.http.post("/generate", json=body) as response:
        first = await response.content.readany()
        c.decode[0].gates[1].set()
        assert first + await response.read() == b"".join(c.decode[0].events("/generate", body))


# who is blamed


async def failing(c, script_of, count=12):
    """Requests that fail by prefill server 0, one after the other."""
    for _ in range(count):
        c.prefill[0].scripts.append(script_of())
        c.prefill[0].scripts.append(script_of())
        await c.post("/generate", BODY)


@pytest.mark.parametrize("script_of", [reset, lambda: refuse(500)])
async def test_only_the_guilty_side_is_charged(cluster, script_of):
    c = await cluster(1, 1, cb_failure_threshold=3, disable_retries=True)
    await failing(c, script_of)
    now = asyncio.get_running_loop().time()
    assert fleet_server(c, c.prefill[0]).breaker.state(now) is Circuit.OPEN
    assert fleet_server(c, c.decode[0]).breaker.state(now) is Circuit.CLOSED
    assert fleet_server(c, c.decode[0]).num_failed == 0


async def test_decodes_error_is_prefills_fault_if_prefill_was_lost(cluster):
    c = await cluster(1, 1, disable_retries=True, disable_health_check=True)
    decode_failed = asyncio.Event()

    async def break_soon(server, request, body):
        await decode_failed.wait()
        request.transport.abort()

    async def fail_first(server, request, body):
        asyncio.get_running_loop().call_later(0.02, decode_failed.set)
        return await refuse(500, "prefill was lost")(server, request, body)

    c.prefill[0].scripts.append(break_soon)
    c.decode[0].scripts.append(fail_first)
    assert (await c.post("/generate", BODY))[0] == 502
    assert fleet_server(c, c.prefill[0]).num_failed == 1 and fleet_server(c, c.decode[0]).num_failed == 0


@pytest.mark.parametrize(("teller", "silent"), [("prefill", "decode"), ("decode", "prefill")])
async def test_a_failed_hand_over_is_the_silent_sides_fault(cluster, teller, silent):
    c = await cluster(1, 1, disable_retries=True)
    getattr(c, teller)[0].scripts.append(refuse(500, "the other side is silent", code="kv_transfer_failed"))
    getattr(c, silent)[0].scripts.append(hang())
    status, data = await c.post("/generate", BODY)
    assert status == 500 and message(data) == "the other side is silent"
    assert fleet_server(c, getattr(c, teller)[0]).num_failed == 0
    assert fleet_server(c, getattr(c, silent)[0]).num_failed == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("status", [400, 408, 429, 503])
async def test_a_full_server_and_a_clients_error_are_nobodys_fault(cluster, role, status):
    c = await cluster(1, 1, disable_retries=True)
    getattr(c, role)[0].scripts.append(refuse(status))
    assert (await c.post("/generate", BODY))[0] == status
    assert all(server.num_failed == 0 for server in c.router.fleet.servers)


async def test_prefills_error_is_decodes_fault_if_decode_was_lost(cluster):
    c = await cluster(1, 1, disable_retries=True, disable_health_check=True)

    async def break_soon(server, request, body):
        await asyncio.sleep(0.02)
        request.transport.abort()

    c.decode[0].scripts.append(break_soon)
    c.prefill[0].scripts.append(refuse(500, "decode was lost"))
    assert (await c.post("/generate", BODY))[0] == 502
    assert fleet_server(c, c.prefill[0]).num_failed == 0 and fleet_server(c, c.decode[0]).num_failed == 1


async def test_a_failed_hand_over_of_two_that_answer_is_nobodys_fault(cluster):
    c = await cluster(1, 1, disable_retries=True)
    c.decode[0].scripts.append(say(b'{"error":{"code":"kv_transfer_failed"}}', 500))
    assert (await c.post("/generate", BODY))[0] == 500
    assert all(server.num_failed == 0 for server in c.router.fleet.servers)


async def test_an_open_circuit_is_avoided_unless_all_are_open(cluster):
    c = await cluster(1, 2, cb_failure_threshold=2, cb_timeout_duration_secs=600, disable_retries=True)
    c.decode[0].scripts.extend(refuse(500) for _ in range(2))
    for _ in range(8):
        await c.post("/generate", BODY)
    assert len(c.decode[0].bodies) == 2 and len(c.decode[1].bodies) == 6
    c.decode[1].scripts.extend(refuse(500) for _ in range(2))
    for _ in range(2):
        assert (await c.post("/generate", BODY))[0] == 500
    for _ in range(4):
        assert (await c.post("/generate", BODY))[0] == 200


async def test_a_kept_connection_that_had_ended_blames_nobody(cluster):
    c = await cluster(1, 1, disable_health_check=True)
    assert (await c.post("/generate", BODY))[0] == 200

    async def end_unasked(server, request, body):
        request.transport.abort()

    c.decode[0].scripts.append(end_unasked)  # as if the connection had ended while the request was on its way
    assert (await c.post("/generate", BODY))[0] == 200
    assert fleet_server(c, c.decode[0]).num_failed == 0 and len(c.decode[0].bodies) == 3


# servers that stop answering


async def test_a_server_that_fails_its_checks_loses_what_waits_for_it(cluster):
    settings = {"health_check_interval_secs": 0.02, "health_check_timeout_secs": 0.05, "health_failure_threshold": 2}
    c = await cluster(2, 1, **settings)
    c.prefill[0].scripts.append(hang())
    async with asyncio.TaskGroup() as group:
        first = group.create_task(c.post("/generate", BODY))
        await until(lambda: len(c.prefill[0].bodies) == 1)
        c.prefill[0].healthy = False
    assert first.result()[0] == 200 and len(c.prefill[1].bodies) == 1
    await c.prefill[0].left.wait()
    for _ in range(4):
        assert (await c.post("/generate", BODY))[0] == 200
    assert len(c.prefill[0].bodies) == 1
    c.prefill[0].healthy = True
    await until(lambda: fleet_server(c, c.prefill[0]).healthy)


async def test_a_stream_that_flows_outlives_failed_checks(cluster):
    settings = {"health_check_interval_secs": 0.3, "health_failure_threshold": 2}
    c = await cluster(1, 1, **settings)
    c.decode[0].gates = [asyncio.Event() for _ in range(3)]
    c.decode[0].gates[0].set()
    body = {**BODY, "stream": True}
    async with c.http.post("/generate", json=body) as response:
        data = await response.content.readany()
        c.decode[0].healthy = False
        await until(lambda: fleet_server(c, c.decode[0]).checks[False] == 1)
        c.decode[0].gates[1].set()
        data += await response.content.readany()
        await until(lambda: not fleet_server(c, c.decode[0]).healthy)
        c.decode[0].gates[2].set()
        data += await response.read()
    assert data == b"".join(c.decode[0].events("/generate", body))


async def test_a_silent_stream_ends_with_failed_checks(cluster):
    settings = {"health_check_interval_secs": 0.02, "health_failure_threshold": 2}
    c = await cluster(1, 1, **settings)
    c.decode[0].gates = [asyncio.Event() for _ in range(2)]
    c.decode[0].gates[0].set()
    async with c.http.post("/generate", json={**BODY, "stream": True}) as response:
        await response.content.readany()
        c.decode[0].healthy = False
        assert b'"error"' in await response.read()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_has_a_deadline(cluster, stream):
    c = await cluster(1, 1, request_timeout_secs=0.1)
    c.decode[0].scripts.append(hang())
    status, data = await c.post("/generate", {**BODY, "stream": stream})
    assert status == 504 and "longer than 0.1 s" in message(data)
    await c.decode[0].left.wait()


async def test_a_stream_has_a_deadline(cluster):
    c = await cluster(1, 1, request_timeout_secs=0.2)
    c.decode[0].gates = [asyncio.Event() for _ in range(2)]
    c.decode[0].gates[0].set()
    status, data = await c.post("/generate", {**BODY, "stream": True})
    assert status == 200 and b"deadline_exceeded" in data and data.endswith(b"data: [DONE]\n\n")
    await c.decode[0].left.wait()


async def test_a_prefill_that_never_ends_does_not_hold_the_answer(cluster, monkeypatch):
    monkeypatch.setattr("diptych.router.attempt.LINGER_S", 0.05)
    c = await cluster(1, 1)

    async def meet_and_hang(server, request, body):
        await server._meet(body)
        await asyncio.Event().wait()

    c.prefill[0].scripts.append(meet_and_hang)
    assert (await c.post("/generate", BODY))[0] == 200
    await c.prefill[0].left.wait()
    await until(lambda: fleet_server(c, c.prefill[0]).num_requests == 0)


@pytest.mark.parametrize(
    "raw", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: " + b"a" * (70 << 10), b"HTTP/1.1 101 Switching\r\n\r\n"]
)
async def test_nonsense_from_a_server_is_a_502(cluster, raw):
    c = await cluster(1, 1, disable_retries=True)

    async def say_raw(server, request, body):
        request.transport.write(raw)
        await asyncio.Event().wait()

    c.decode[0].scripts.append(say_raw)
    status, data = await c.post("/generate", BODY)
    assert status == 502 and "decode failed" in message(data)


async def test_an_answer_without_bound_is_cut(cluster):
    c = await cluster(1, 1, disable_retries=True, max_payload_size=1000)
    c.decode[0].scripts.append(say(b"x" * 1001))
    status, data = await c.post("/generate", BODY)
    assert status == 502 and "--max-payload-size" in message(data)


@pytest.mark.parametrize(
    "answer",
    [
        b'data: {"error":' + b"[" * 50_000 + b"\n\n",
        b'data: {"error": {"code": 1e999}}\n\n',
        b'data: {"error": 7}\n\n',
    ],
)
async def test_a_stream_of_nonsense_is_passed_on(cluster, answer):
    """What cannot be understood as an error is the client's to judge."""
    c = await cluster(1, 1)
    c.decode[0].scripts.append(say(answer, headers={"content-type": "text/event-stream"}))
    assert await c.post("/generate", {**BODY, "stream": True}) == (200, answer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "answer", [b"[" * 50_000, b'{"meta_info":7}', b'{"choices":[1]}', b"\x1f\x8b\x08\x00", b"7", b""]
)
async def test_nonsense_instead_of_logprobs(cluster, answer, stream):
    """An error in the envelope or an answer without them, never a failure of the router's own."""
    c = await cluster(1, 1)
    kind = "text/event-stream" if stream else "application/json"
    for server in (c.prefill[0], c.decode[0]):
        server.scripts.append(say(b"data: " + answer + b"\n\n" if stream else answer, headers={"content-type": kind}))
    status, data = await c.post("/generate", {**BODY, "stream": stream, "return_logprob": True})
    assert (status, b"see its log" in data) in ((200, False), (502, False))
    assert (await c.post("/generate", BODY))[0] == 200


async def test_an_endless_event_is_cut(cluster):
    c = await cluster(1, 1, max_payload_size=10_000)
    c.decode[0].scripts.append(say(b"data: " + b"x" * 20_000, headers={"content-type": "text/event-stream"}))
    status, data = await c.post("/generate", {**BODY, "stream": True, "return_logprob": True})
    assert status == 200 and b"--max-payload-size" in data and data.endswith(b"data: [DONE]\n\n")
