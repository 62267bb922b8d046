"""A whole cluster in one process, on a virtual clock: router, prefill and decode servers, a network with faults.

Everything but the model is the real thing: the router's core and health checks, the engine loop with its roles, the
scheduler, the page pool, the hand-over. HTTP exchanges and KV links run over one MemoryNetwork; MockRunner computes.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from diptych.engine.client import EngineLink
from diptych.engine.handover import Site, attach_decode, attach_prefill
from diptych.engine.loop import Engine
from diptych.errors import DiptychError, Unavailable
from diptych.kv.share import Grid
from diptych.router.config import RouterConfig, ServerAddress
from diptych.router.core import Core
from diptych.router.exchange import Body, Exchange, Headers, ServerLost
from diptych.router.fleet import Fleet
from diptych.router.health import HealthChecker
from diptych.router.metrics import RouterMetrics
from diptych.sched.state import SchedConfig, new_state
from diptych.testing.mock_model import MockRunner
from diptych.testing.network import MemoryNetwork
from diptych.transfer.bootstrap import Registration, Route, RouteTable
from diptych.transfer.link import Link, LinkClosed
from diptych.transfer.plane import DataPlane
from diptych.transfer.room import HubOptions
from diptych.types import Bootstrap, Plan, Request, Sampling, StepResult

PAGE_SIZE = 4
STEP_S = (0.002, 0.02)
HTTP_TIMEOUT_S = 5.0
ROUTER = "router"


class Head(msgspec.Struct, tag="head"):
    """First message of an answer."""

    status: int


class Part(msgspec.Struct, tag="part"):
    """`number` counts from 0: what a faulty network duplicates is dropped, as TCP does."""

    number: int
    data: bytes
    last: bool = False


class Call(msgspec.Struct, tag="call"):
    path: str
    body: bytes


class SimServer:
    """One prefill or decode server. `start`, then `kill` (it is gone at once) or `close` (orderly)."""

    def __init__(self, name: str, mode: str, cluster: Cluster, num_pages: int, *, radix: bool) -> None:
        self.name, self.mode = name, mode
        self._cluster = cluster
        self._rng = random.Random(cluster.rng.getrandbits(64))
        self.runner = MockRunner(num_pages, PAGE_SIZE, context_len=256)
        config = SchedConfig(
            page_size=PAGE_SIZE,
            context_len=256,
            max_running=8,
            chunk_tokens=self._rng.choice([4, 16, 64]),
            radix=radix,
            reserved_decode_tokens=8,
            eos_token_ids=self.runner.info.eos_token_ids,
        )
        self.state = new_state(config, num_pages)
        self.link = EngineLink(lambda message: self.engine.deliver(message), self.runner.info, num_pages * PAGE_SIZE)
        self.engine = Engine(self.state, self._compute, self.link.receive, grammars=None)
        self._transport = cluster.network.transport(name)
        grid = Grid(self.runner.info.num_kv_heads, self.runner.info.num_layers)
        self.plane = DataPlane(
            self.runner.store, [self._transport], 0, grid, self._on_event, rng=self._rng, send_timeout_s=5.0
        )
        self.hub: Any = None
        self.routes = RouteTable(asyncio.get_running_loop().time)
        self._tasks: dict[asyncio.Task[None], None] = {}  # in order of creation: a run must replay exactly

    async def start(self) -> None:
        site = Site(
            info=self.runner.info,
            layout=self.runner.store.layout,
            page_size=PAGE_SIZE,
            addresses=[await self.plane.start(self.name)],
            broadcast=self.plane.execute,
            counters=self.plane.counters,
            transport=self._transport,
            options=HubOptions(bootstrap_timeout_s=30.0, heartbeat_timeout_s=5.0),
            boot_id=f"{self.name}-{self._rng.getrandbits(32)}",
            rng=self._rng,
        )
        if self.mode == "decode":
            self.hub = attach_decode(self.engine, site, self._cluster.fetch_route(self.name))
        else:
            self.hub = await attach_prefill(self.engine, site, self.name, 0, self._register)
        listener = await self._transport.listen(self.name, self._on_link)
        self._cluster.http[self.name] = listener.address
        self._spawn(self.engine.run())

    def kill(self) -> None:
        """The process is gone; nothing of it runs on."""
        self._cluster.http.pop(self.name, None)
        self._cluster.network.kill(self.name)
        for task in list(self._tasks):
            task.cancel()
        self._closing = [asyncio.ensure_future(self.hub.close()), asyncio.ensure_future(self.plane.close())]

    def holds(self) -> dict[str, int]:
        """All zero when nothing is left of any request."""
        pool, tree = self.state.pool, self.state.tree
        cached = sum(len(node.pages) for node in tree.nodes())
        return {
            "requests": len(self.state.seqs),
            "held": len(self.engine.role.held()),
            "rooms": self.hub.snapshot()["rooms"],
            "transfers": self.plane.snapshot()["rooms"],
            "pages": pool.num_pages - pool.num_free - cached,
        }

    # ---- inside ----

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)

    async def _compute(self, plan: Plan) -> StepResult:
        await asyncio.sleep(self._rng.uniform(*STEP_S))
        return self.runner.run(plan)

    def _on_event(self, event: Any) -> None:
        if self.hub is not None:
            self.hub.handle_event(0, event)

    async def _register(self, registration: Registration) -> None:
        self.routes.register(registration)

    def _on_link(self, link: Link) -> None:
        self._spawn(self._serve(link))

    async def _serve(self, link: Link) -> None:
        """One HTTP exchange: a call comes in, a head and parts go out; a caller that hangs up aborts the request."""
        link.max_header_bytes = 1 << 20
        try:
            call = msgspec.msgpack.decode((await link.recv())[0], type=Call)
            answer = asyncio.ensure_future(self._answer(link, call))
            gone = asyncio.ensure_future(_until_closed(link))
            try:
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (answer, gone):
                    task.cancel()
                await asyncio.gather(answer, gone, return_exceptions=True)
        except LinkClosed:
            pass
        finally:
            link.close()

    async def _answer(self, link: Link, call: Call) -> None:
        number = 0

        async def part(data: bytes, *, last: bool = False) -> None:
            nonlocal number
            await link.send(msgspec.msgpack.encode(Part(number, data, last)))
            number += 1

        if call.path == "/health":
            await link.send(msgspec.msgpack.encode(Head(200)))
            await part(b"", last=True)
            return
        stream = self._generate(call.body)
        try:
            first = await anext(stream)
            await link.send(msgspec.msgpack.encode(Head(200)))
            await part(first)
            async for data in stream:
                await part(data)
            await part(b"", last=True)
        except DiptychError as error:
            if isinstance(error, LinkClosed):
                return
            body = msgspec.json.encode({"error": {"message": error.message, "code": error.code}})
            if number == 0:
                await link.send(msgspec.msgpack.encode(Head(error.status)))
                await part(body, last=True)
            else:
                await part(b"data: " + body + b"\n\n")
                await part(b"", last=True)
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def _generate(self, body: bytes) -> AsyncIterator[bytes]:
        """/generate, streamed, tokens only."""
        fields = msgspec.json.decode(body)
        request = Request(
            rid=f"{self.name}-{fields['bootstrap_room']}",
            prompt=fields["input_ids"],
            sampling=msgspec.convert(fields["sampling_params"], Sampling),
            bootstrap=Bootstrap(fields["bootstrap_host"], 0, fields["bootstrap_room"]),
        )
        async for output in self.link.generate(request):
            finish = output.finish
            if finish is not None and finish.type == "abort":
                error = Unavailable(finish.message)
                error.status, error.code = finish.status if finish.status >= 500 else 503, finish.code
                raise error
            frame = {"tokens": output.tokens, "finish": finish.type if finish else None}
            yield b"data: " + msgspec.json.encode(frame) + b"\n\n"
        yield b"data: [DONE]\n\n"


async def _until_closed(link: Link) -> None:
    try:
        while True:
            await link.recv()
    except LinkClosed:
        return


class SimExchange(Exchange):
    """The router's side of a call."""

    def __init__(self, link: Link, status: int) -> None:
        self.status = status
        self.headers = [(b"content-type", b"text/event-stream" if status == 200 else b"application/json")]
        self._link = link
        self._next = 0

    async def read(self) -> bytes:
        while True:
            try:
                message = msgspec.msgpack.decode((await self._link.recv())[0], type=Head | Part)
            except LinkClosed:
                raise ServerLost("the connection broke", sent=True) from None
            if isinstance(message, Part) and message.number == self._next:
                self._next += 1
                if message.last:
                    return b""
                if message.data:
                    return message.data

    def close(self) -> None:
        self._link.close()


class SimUpstream:
    """The router's way to the servers, over the simulated network."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._transport = cluster.network.transport(ROUTER)

    async def open(self, server: ServerAddress, method: str, path: str, headers: Headers, body: Body) -> Exchange:
        link: Link | None = None
        try:
            address = self._cluster.http.get(server.host, f"mem://{server.host}/0")
            link = await self._transport.connect(address, HTTP_TIMEOUT_S)
        except LinkClosed as error:
            raise ServerLost(error.message, sent=False) from None
        link.max_header_bytes = 1 << 20
        try:
            await link.send(msgspec.msgpack.encode(Call(path, b"".join(body))))
            head = msgspec.msgpack.decode((await link.recv())[0], type=Head | Part)
            assert isinstance(head, Head)
            return SimExchange(link, head.status)
        except LinkClosed:
            link.close()
            raise ServerLost("the connection broke before an answer", sent=True) from None
        except BaseException:
            link.close()
            raise


class Cluster:
    """`prefill` and `decode` servers behind a router; all randomness comes from `seed`."""

    def __init__(self, seed: int, *, prefill: int = 2, decode: int = 1) -> None:
        self.rng = random.Random(seed)
        self.network = MemoryNetwork(self.rng.getrandbits(64))
        self.http: dict[str, str] = {}  # where each server's HTTP is reached now
        self.names = {"prefill": [f"p{i}" for i in range(prefill)], "decode": [f"d{i}" for i in range(decode)]}
        self.servers: dict[str, SimServer] = {}
        self.num_pages = self.rng.choice([40, 64, 160])
        config = RouterConfig(
            prefill=tuple(ServerAddress(name, 80) for name in self.names["prefill"]),
            decode=tuple(ServerAddress(name, 80) for name in self.names["decode"]),
            policy=self.rng.choice(["random", "round_robin", "power_of_two", "cache_aware"]),
            request_timeout_secs=120.0,
            health_check_interval_secs=2.0,
        )
        loop = asyncio.get_running_loop()
        router_rng = random.Random(self.rng.getrandbits(64))
        self.fleet = Fleet(config, router_rng, loop.time)
        upstream = SimUpstream(self)
        self.core = Core(config, self.fleet, upstream, router_rng, RouterMetrics(("/generate",)))
        self._health = HealthChecker(config, self.fleet, upstream, [])

    async def start(self) -> None:
        for mode, names in self.names.items():
            for name in names:
                await self.start_server(name, mode)
        self._health.start()
        async with asyncio.timeout(60):
            await self.fleet.complete.wait()

    async def start_server(self, name: str, mode: str) -> None:
        """A new process under this name, with an empty pool."""
        self.network.revive(name)
        radix = mode == "prefill" or self.rng.random() < 0.5
        server = SimServer(name, mode, self, self.num_pages, radix=radix)
        await server.start()
        self.servers[name] = server

    def kill_server(self, name: str) -> str:
        """End a server at once. Returns its mode."""
        server = self.servers.pop(name)
        server.kill()
        return server.mode

    def fetch_route(self, caller: str) -> Any:
        """The bootstrap lookup of a decode server, over the same faulty network."""

        async def fetch(host: str, port: int, timeout_s: float) -> Route:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(2 * self.network.draw_delay())
                while self.network.is_stalled((caller, host)) or self.network.is_stalled((host, caller)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            server = self.servers.get(host)
            if server is None:
                raise Unavailable("its bootstrap service does not answer")
            return server.routes.route()

        return fetch

    async def close(self) -> None:
        await self._health.stop()
        for name in list(self.servers):
            self.kill_server(name)
