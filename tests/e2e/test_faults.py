"""Real processes that die, stop, leave and drain under load: errors are clean, pages come back, nothing hangs.

The tests of one cluster run in the order of the file: each takes something away. Prefill 0 sends slowly (a wait before
each frame), so that transfers can be caught half-way.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import aiohttp
import psutil
import pytest
from asking import ask, counters, endless, in_flight, is_idle, settle, until
from mixed_requests import generate
from pd_cluster import MODEL, PDCluster, assert_idle, start_decode, start_prefill, start_router

from diptych.testing.processes import ServerProcess

pytestmark = pytest.mark.timeout(300)

HEARTBEAT_S = 2.0
ABORT_S = 0.25  # from a client's leaving until both servers have forgotten the request


@pytest.fixture(scope="module")
def fragile() -> Iterator[PDCluster]:
    with ExitStack() as stack:
        common = ("--disaggregation-heartbeat-timeout", str(HEARTBEAT_S))
        slow = {"DIPTYCH_TEST_FAULTS": json.dumps({"frame_delay_s": 0.05})}
        prefill = [
            start_prefill(stack, *common, "--chunked-prefill-size", "64", env=slow),
            start_prefill(stack, *common),
        ]
        decode = [start_decode(stack, *common)]
        for server in (*prefill, *decode):
            server.wait_ready()
        checks = ("--health-check-interval-secs", "1", "--health-check-timeout-secs", "2", "--hold-timeout-secs", "0")
        yield PDCluster(prefill, decode, start_router(stack, prefill, decode, *checks))


def test_clients_that_leave_free_everything_at_once(fragile: PDCluster) -> None:
    """Clients of the router hang up at random points: before, during and after the hand-over."""
    rng = random.Random(11)
    delays = [rng.uniform(0, 0.8) for _ in range(12)]
    took = [asyncio.run(_leave_after(fragile, endless(index, 500, 400), delay)) for index, delay in enumerate(delays)]
    # The median is what the servers need; single ones wait for a processor that other programs use.
    assert sorted(took)[len(took) // 2] <= ABORT_S, took
    assert max(took) < 2.0, took
    settle(fragile)


async def _leave_after(pd: PDCluster, body: dict[str, Any], delay_s: float) -> float:
    """Seconds from the client's leaving until no server holds anything."""
    async with aiohttp.ClientSession() as session:
        request = asyncio.create_task(session.post(pd.router.url + "/generate", json={**body, "stream": True}))
        await asyncio.sleep(delay_s)
        request.cancel()
        (reply,) = await asyncio.gather(request, return_exceptions=True)
        if isinstance(reply, aiohttp.ClientResponse):
            reply.close()
    left_at = time.monotonic()
    while not all(is_idle(server) for server in pd.servers):
        assert time.monotonic() - left_at < 10
    return time.monotonic() - left_at


def test_a_stopped_prefill_server_is_noticed(fragile: PDCluster) -> None:
    """SIGSTOP in the middle of a transfer: no socket closes, yet decode gives up by its heartbeat and takes its pages
    back; what comes after SIGCONT is refused, and the two servers find each other again.
    """
    decode, prefill = fragile.decode[0], fragile.prefill[0]
    body = endless(77, 4000, 4, **fragile.bootstrap(4001))
    before = _bytes_received(decode)
    with in_flight(prefill, [body]) as prefilled, in_flight(decode, [body]) as decoded:
        until(lambda: _bytes_received(decode) > before, "the first pages are there")
        with _stopped(prefill):
            stopped_at = time.monotonic()
            status, text = decoded[0].result()
            assert status >= 500 and "lost the prefill server" in json.loads(text)["error"]["message"]
            assert time.monotonic() - stopped_at < 3 * HEARTBEAT_S
            until(lambda: is_idle(decode), "decode's pages are back", 2.0)
            assert_idle(decode)
            taken = _bytes_received(decode)
        status, text = prefilled[0].result()
        assert status >= 500, text
    settle(fragile)
    assert _bytes_received(decode) == taken
    assert len(json.loads(_both(fragile, endless(78, 30, 3), 4002))["output_ids"]) == 3


@contextmanager
def _stopped(server: ServerProcess) -> Iterator[None]:
    """SIGSTOP to all processes of a server, SIGCONT at the end."""
    processes = server.tree()
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


def _bytes_received(decode: ServerProcess) -> int:
    return int(decode.get("/audit")["counters"]["bytes_received"])


def _both(pd: PDCluster, body: dict[str, Any], room: int) -> str:
    """Decode's answer to a request that is sent to prefill 0 and decode, as a router would."""
    body = {**body, **pd.bootstrap(room)}
    with in_flight(pd.prefill[0], [body]) as prefilled, in_flight(pd.decode[0], [body]) as decoded:
        assert prefilled[0].result()[0] == 200, prefilled[0].result()
        status, text = decoded[0].result()
        assert status == 200, text
        return text


def test_a_killed_prefill_server_costs_no_answer(fragile: PDCluster) -> None:
    """SIGKILL of all its processes under load: what had not been answered is served by the other one."""
    bodies = [endless(index, 300, 8) for index in range(24)]
    expected = generate(fragile.router, bodies[0])["output_ids"]
    with in_flight(fragile.router, bodies) as replies:
        until(lambda: fragile.prefill[0].get("/audit")["sequences"] > 2, "prefill 0 has work")
        for process in reversed(fragile.prefill[0].tree()):
            process.kill()
        killed_at = time.monotonic()
        answers = [reply.result() for reply in replies]
    assert [status for status, _ in answers] == [200] * len(bodies), [a for a in answers if a[0] != 200]
    assert json.loads(answers[0][1])["output_ids"] == expected
    assert time.monotonic() - killed_at < 60
    fragile.prefill.pop(0)
    until(lambda: _healths(fragile.router) == [False, True, True], "the router knows", 20)
    settle(fragile)


def _healths(router: ServerProcess) -> list[bool]:
    return sorted(worker["is_healthy"] for worker in router.get("/workers")["workers"])


def test_a_decode_server_whose_engine_dies_says_so(fragile: PDCluster) -> None:
    """SIGKILL of the engine process alone: its API process notices at once, tells its clients, and ends with 1."""
    decode = fragile.decode[0]
    engine = next(p for p in decode.tree() if "diptych.engine.worker" in p.cmdline())
    with in_flight(fragile.router, [endless(index, 30, 2000) for index in range(4)]) as replies:
        until(lambda: counters(decode).get("num_running_reqs", 0) == 4, "all decode")
        engine.kill()
        killed_at = time.monotonic()
        assert decode.process.wait(10) == 1
        assert time.monotonic() - killed_at < 5
        answers = [reply.result() for reply in replies]
    for status, text in answers:
        assert status in (500, 502, 503) and json.loads(text)["error"]["message"], (status, text)
    until(lambda: ask(fragile.router.url, "/ready")[0] == 503, "the router knows", 10)
    status, text = ask(fragile.router.url, "/generate", endless(1, 10, 1))
    assert status == 503 and "decode" in json.loads(text)["error"]["message"]
    until(lambda: is_idle(fragile.prefill[0]), "prefill has let go")
    assert_idle(fragile.prefill[0])


async def _streams(url: str, bodies: list[dict[str, Any]], begun: asyncio.Event) -> list[list[str]]:
    """All requests at once, streamed: the events of each. `begun` is set when every stream has."""
    started = 0

    async def one(session: aiohttp.ClientSession, body: dict[str, Any]) -> list[str]:
        nonlocal started
        text = b""
        async with session.post(url + "/generate", json={**body, "stream": True}) as reply:
            assert reply.status == 200, await reply.text()
            async for part in reply.content.iter_any():
                if not text:
                    started += 1
                    if started == len(bodies):
                        begun.set()
                text += part
        return [event.removeprefix("data: ") for event in text.decode().split("\n\n") if event]

    async with aiohttp.ClientSession() as session:
        return list(await asyncio.gather(*(one(session, body) for body in bodies)))


async def _drain(server: ServerProcess, url: str, bodies: list[dict[str, Any]]) -> None:
    """SIGTERM to `server` once all streams have begun: they finish, and it exits with 0."""
    begun = asyncio.Event()
    streams = asyncio.create_task(_streams(url, bodies, begun))
    async with asyncio.timeout(120):
        await asyncio.wait((asyncio.create_task(begun.wait()), streams), return_when=asyncio.FIRST_COMPLETED)
        assert not streams.done()
        server.signal(signal.SIGTERM)
        for events, body in zip(await streams, bodies, strict=True):
            assert events[-1] == "[DONE]"
            last = json.loads(events[-2])
            assert len(last["output_ids"]) == body["sampling_params"]["max_new_tokens"]
        assert await asyncio.to_thread(server.process.wait, 30) == 0, server.tail()


def test_every_role_drains() -> None:
    """SIGTERM under streaming load: the streams end as they should, then the process ends with 0."""
    with ExitStack() as stack:
        prefill, decode = start_prefill(stack), start_decode(stack)
        for server in (prefill, decode):
            server.wait_ready()
        routers = [start_router(stack, [prefill], [decode]) for _ in range(2)]
        bodies = [endless(index, 40, 120) for index in range(6)]
        asyncio.run(_drain(routers[0], routers[0].url, bodies))
        # Prefill has done its part when the streams have begun, but for one prompt that is still on its way.
        with in_flight(routers[1], [endless(9, 6000, 2)]) as late:
            until(lambda: prefill.get("/audit")["sequences"] > 0, "the long prompt has arrived")
            asyncio.run(_drain(prefill, decode.url, [{**body, "bootstrap_host": None} for body in bodies]))
            assert late[0].result()[0] == 200
        asyncio.run(_drain(decode, decode.url, [{**body, "bootstrap_host": None} for body in bodies]))


def test_a_taken_port_is_a_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        _fails_to_start(("serve", "--model-path", "models/demo", "--port", port), port)
        servers = ("--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2")
        _fails_to_start(("route", *servers, "--port", port), port)
        prefill = ("--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", port)
        _fails_to_start(("serve", *MODEL, *prefill), port)


def test_a_bad_model_path_is_a_clear_error(tmp_path: Any) -> None:
    _fails_to_start(("serve", "--model-path", str(tmp_path / "none"), "--port", "0"), "model")
    (tmp_path / "config.json").write_text("{}")
    _fails_to_start(("serve", "--model-path", str(tmp_path), "--port", "0"), "tokenizer.json")


def _fails_to_start(args: tuple[str, ...], word: str) -> None:
    """The process ends soon with status 2, an error of one line that has `word` in it, and without a traceback."""
    with ServerProcess(*args) as server:
        with pytest.raises(RuntimeError):
            server.wait_ready(30)
        assert server.process.wait() == 2
        assert word in server.tail() and "Traceback" not in server.tail(), server.tail()
        assert not psutil.pid_exists(server.process.pid) or not server.tree()[1:]


def test_a_bootstrap_port_that_is_nobodys() -> None:
    """A request that names a prefill server which is not there fails by its deadline, with a reason."""
    with ExitStack() as stack:
        decode = start_decode(stack, "--disaggregation-heartbeat-timeout", "1").wait_ready()
        dead = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 1, "bootstrap_room": 5}
        started = time.monotonic()
        status, text = ask(decode.url, "/generate", endless(1, 20, 2, **dead))
        assert status in (502, 503, 504, 500) and "cannot reach the prefill server" in text
        assert time.monotonic() - started < 10
        until(lambda: is_idle(decode), "pages back")
        assert_idle(decode)
