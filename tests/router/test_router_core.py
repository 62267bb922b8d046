"""The core without sockets: any `Upstream` and any `Client` will do, as in a simulation."""

from __future__ import annotations

import asyncio
import json
import random

from router_cluster import until

from diptych.errors import Unavailable
from diptych.router.config import RouterConfig, ServerAddress
from diptych.router.core import Core
from diptych.router.exchange import Client, ClientRequest, Exchange, ServerLost
from diptych.router.fleet import Fleet
from diptych.router.health import HealthChecker
from diptych.router.metrics import RouterMetrics

P0, P1, D0 = ServerAddress("p0", 1, 9), ServerAddress("p1", 1, 9), ServerAddress("d0", 1)
CONFIG = RouterConfig(
    prefill=(P0, P1), decode=(D0,), policy="round_robin", health_check_interval_secs=0.01, hold_timeout_secs=0
)
REQUEST = ClientRequest("POST", "/generate", [], b'{"text":"a","stream":true}')


class MemoryExchange(Exchange):
    def __init__(self, status: int, kind: bytes, parts: list[bytes]) -> None:
        self.status, self.headers, self.closed = status, [(b"content-type", kind)], False
        self._parts = parts

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        return self._parts.pop(0) if self._parts else b""

    def close(self) -> None:
        self.closed = True


class MemoryUpstream:
    """Servers that answer at once; those in `dead` cannot be reached."""

    def __init__(self) -> None:
        self.dead: set[ServerAddress] = set()
        self.sent: list[tuple[ServerAddress, dict]] = []
        self.exchanges: list[MemoryExchange] = []

    async def open(self, server, method, path, headers, body, *, fresh=False):
        await asyncio.sleep(0)
        if server in self.dead:
            raise ServerLost("the server could not be reached", sent=False, gone=True)
        if method == "POST":
            self.sent.append((server, json.loads(b"".join(body))))
        stream = [b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"]
        kind = b"text/event-stream" if method == "POST" else b"text/plain"
        self.exchanges.append(MemoryExchange(200, kind, stream))
        return self.exchanges[-1]


class MemoryClient(Client):
    def __init__(self) -> None:
        self.data, self.ended, self.num_drains, self.headers = b"", False, 0, []

    def send(self, status, headers, body):
        self.status, self.headers, self.data, self.ended = status, headers, body, True

    def start(self, status, headers):
        self.status, self.headers = status, headers

    def write(self, data):
        self.data += data
        return False

    async def drain(self):
        self.num_drains += 1

    def finish(self):
        self.ended = True

    def break_off(self):
        raise AssertionError


def make(upstream):
    rng = random.Random(4)
    fleet = Fleet(CONFIG, rng, asyncio.get_running_loop().time)
    health = HealthChecker(CONFIG, fleet, upstream, [])
    return fleet, health, Core(CONFIG, fleet, upstream, rng, RouterMetrics(["/generate"]))


async def test_serves_once_the_servers_are_healthy_and_moves_when_one_is_gone():
    upstream = MemoryUpstream()
    fleet, health, core = make(upstream)
    client = MemoryClient()
    try:
        await core.serve(REQUEST, client, [])
    except Unavailable as error:
        assert "no prefill server" in error.message
    health.start()
    await until(lambda: all(server.healthy for server in fleet.servers))
    assert fleet.complete.is_set()
    for _ in range(2):
        client = MemoryClient()
        await core.serve(REQUEST, client, [(b"x-request-id", b"i")])
        assert client.status == 200 and client.ended
        assert client.data == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n" and client.num_drains == 3
        assert (b"x-request-id", b"i") in client.headers
    upstream.sent.clear()
    upstream.dead.add(P0)
    client = MemoryClient()
    await core.serve(REQUEST, client, [])
    assert client.status == 200
    by_server = [server for server, _ in upstream.sent]
    rooms = [body["bootstrap_room"] for server, body in upstream.sent if server == D0]
    assert by_server.count(P1) == 1 and len(set(rooms)) == len(rooms)
    assert not fleet.servers[0].healthy
    await health.stop()
    assert all(exchange.closed for exchange in upstream.exchanges)


async def test_the_same_seed_draws_the_same_rooms():
    found = []
    for _ in range(2):
        upstream = MemoryUpstream()
        fleet, _, core = make(upstream)
        for server in fleet.servers:
            fleet.mark(server, True, "healthy")
        for _ in range(5):
            await core.serve(REQUEST, MemoryClient(), [])
        found.append([(server.url, body["bootstrap_room"]) for server, body in upstream.sent])
    assert found[0] == found[1]
