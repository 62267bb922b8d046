"""Requests that are not inference through a pair: asked of one server, or of all."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from diptych.errors import DiptychError, Unavailable, UpstreamError
from diptych.router.attempt import Reply
from diptych.router.config import RouterConfig
from diptych.router.exchange import Client, ClientRequest, Headers, ServerLost, Upstream, read_all
from diptych.router.fleet import Fleet, Leg, Server
from diptych.router.headers import to_client, to_server
from diptych.router.replies import send_json
from diptych.router.retry import Suspect

ASK_S = 60.0  # longest wait for one server's answer to a control request


class Control:
    """Each method is a handler: `(request, client, extra headers)`. Raises DiptychError before any answer."""

    def __init__(self, config: RouterConfig, fleet: Fleet, upstream: Upstream) -> None:
        self._config = config
        self._fleet = fleet
        self._upstream = upstream

    async def first(self, request: ClientRequest, client: Client, extra: Headers) -> None:
        """Ask the servers one after the other, prefill servers first, until one can be reached; its answer as it is."""
        for server in self._fleet.servers:
            if not server.healthy:
                continue
            try:
                reply = await self._ask(server, request, extra)
            except ServerLost as lost:
                self._fleet.suspect(server, gone=lost.gone)
                continue
            client.send(reply.status, to_client(reply.headers, extra), reply.data)
            return
        raise Unavailable("no server is healthy; try again in a moment")

    async def any_post(self, request: ClientRequest, client: Client, extra: Headers) -> None:
        """One decode server (or worker) answers, streamed or not. Its answer is passed on as it comes."""
        role = "decode" if self._config.disaggregated else "worker"
        leg = Leg(self._fleet.choose(role, b"", ()), len(request.body), asyncio.get_running_loop().time(), Suspect())
        try:
            async with asyncio.timeout(self._config.request_timeout_secs):
                await self._pass_on(leg, request, client, extra)
        except TimeoutError:
            raise UpstreamError("the server did not answer in time") from None
        finally:
            if leg.exchange is not None:
                leg.exchange.close()
            leg.end(asyncio.get_running_loop().time())

    async def _pass_on(self, leg: Leg, request: ClientRequest, client: Client, extra: Headers) -> None:
        headers = to_server(request.headers, self._config.key, extra)
        try:
            exchange = leg.exchange = await self._upstream.open(
                leg.server.address, request.method, request.path, headers, (request.body,)
            )
        except ServerLost as lost:
            self._fleet.suspect(leg.server, gone=lost.gone)
            raise
        kind = next((value for name, value in exchange.headers if name == b"content-type"), b"")
        if not kind.startswith(b"text/event-stream"):
            whole = await read_all(exchange, self._config.max_payload_size)
            client.send(exchange.status, to_client(exchange.headers, extra), whole)
            return
        client.start(exchange.status, to_client(exchange.headers, extra))
        await exchange.relay(client)
        client.finish()

    async def everywhere(self, request: ClientRequest, client: Client, extra: Headers) -> None:
        """Ask every healthy server. 200 only if all say so, else the worst status; each one's answer is told."""
        replies = await self._ask_all(request, extra)
        results = [
            {
                "worker": server.address.url,
                "worker_type": server.role,
                "status": reply.status,
                "answer": _readable(reply.data),
            }
            for server, reply in replies
        ]
        worst = max(reply.status for _, reply in replies)
        send_json(client, {"success": worst < 400, "results": results}, extra, 200 if worst < 400 else worst)

    async def server_info(self, request: ClientRequest, client: Client, extra: Headers) -> None:
        """Every server's own, by role, and internal states of those that generate, as SGLang's benchmarks read them."""
        replies = await self._ask_all(request, extra)
        found: dict[str, list[Any]] = {role: [] for role in self._fleet.roles}
        for server, reply in replies:
            if reply.status >= 400:
                raise UpstreamError(f"a {server.role} server answered {reply.status} to {request.route}")
            found[server.role].append(_readable(reply.data))
        generating = found["decode" if self._config.disaggregated else "worker"]
        states = [state for info in generating for state in _states(info)]
        named = found if self._config.disaggregated else {"workers": found["worker"]}
        send_json(client, {"internal_states": states, **named}, extra)

    async def _ask_all(self, request: ClientRequest, extra: Headers) -> list[tuple[Server, Reply]]:
        servers = [server for server in self._fleet.servers if server.healthy]
        if not servers:
            raise Unavailable("no server is healthy; try again in a moment")
        return list(zip(servers, await asyncio.gather(*(self._try(s, request, extra) for s in servers)), strict=True))

    async def _try(self, server: Server, request: ClientRequest, extra: Headers) -> Reply:
        """A server's answer, or what went wrong as one."""
        try:
            return await self._ask(server, request, extra)
        except DiptychError as error:
            return Reply(error.status, [], msgspec.json.encode(error.message))

    async def _ask(self, server: Server, request: ClientRequest, extra: Headers) -> Reply:
        headers = to_server(request.headers, self._config.key, extra)
        try:
            async with asyncio.timeout(ASK_S):
                exchange = await self._upstream.open(
                    server.address, request.method, request.path, headers, (request.body,)
                )
                try:
                    data = await read_all(exchange, self._config.max_payload_size)
                finally:
                    exchange.close()
        except TimeoutError:
            raise UpstreamError(f"a {server.role} server did not answer within {ASK_S:g} s") from None
        return Reply(exchange.status, exchange.headers, data)


def _states(info: Any) -> list[Any]:
    """The internal states that a server tells, none if it is another kind of server."""
    found = info.get("internal_states") if isinstance(info, dict) else None
    return found if isinstance(found, list) else []


def _readable(data: bytes) -> Any:
    """An answer as JSON where it is JSON, else as text."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return data.decode("utf-8", "replace")
