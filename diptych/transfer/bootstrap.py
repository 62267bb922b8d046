"""The bootstrap service of a prefill server: where decode servers learn how to reach it.

Routes as SGLang's (HTTP, port 8998 unless told otherwise).

    PUT  /route             a prefill rank registers                              (bearer secret, if one is set)
    GET  /route?…=-1        what decode must know of the server; 503 until every rank has registered
    GET  /route?…ranks…     where one rank is reached; 404 if unknown
    POST /register_dp_rank  room -> data-parallel rank, forgotten after 120 s     (bearer secret, if one is set)
    POST /query_dp_ranks    those of several rooms
    GET  /health

Our own fields ride along: `control_address`, `boot_id`, `layout`, `fingerprint`.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import aiohttp
import msgspec
from aiohttp import web
from msgspec import Meta

from diptych.errors import BadRequest, DiptychError, NotFound, ProtocolError, Unauthorized, Unavailable
from diptych.net import Resolver, is_host

MAX_BODY_BYTES = 64 << 10
DP_RANK_EXPIRES_S = 120.0
MAX_DP_RANKS = 65536

Size = Annotated[int, Meta(ge=1, le=1024)]
Rank = Annotated[int, Meta(ge=0, le=1023)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Name = Annotated[str, Meta(max_length=256)]
T = TypeVar("T")
RoomNumber = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """Body of PUT /route: one rank of this prefill server. Fields that we do not know are ignored."""

    attn_tp_size: Size
    attn_tp_rank: Rank
    attn_cp_size: Size = 1
    attn_cp_rank: Rank = 0
    attn_dp_size: Size = 1
    attn_dp_rank: Rank = 0
    pp_size: Size = 1
    pp_rank: Rank = 0
    system_dp_size: Size = 1
    system_dp_rank: Rank = 0
    rank_ip: Name
    rank_port: Port
    page_size: Annotated[int, Meta(ge=1)]
    kv_cache_dtype: Name
    kv_layout: Name | None = None
    load_balance_method: Name = "follow_bootstrap_room"
    prefill_http_port: Port | None = None
    decode_allocation_policy: Name = "early"
    control_address: Name = ""
    boot_id: Name = ""
    fingerprint: Name = ""

    @property
    def place(self) -> tuple[int, int, int, int]:
        return self.attn_dp_rank, self.attn_cp_rank, self.attn_tp_rank, self.pp_rank

    @property
    def common(self) -> tuple[object, ...]:
        """What all ranks of one server must agree on."""
        sizes = (self.attn_dp_size, self.attn_cp_size, self.attn_tp_size, self.pp_size)
        return (
            *sizes,
            self.page_size,
            self.kv_cache_dtype,
            self.kv_layout,
            self.load_balance_method,
            self.decode_allocation_policy,
            self.fingerprint,
        )


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of GET /route with all ranks -1."""

    attn_tp_size: Size
    attn_cp_size: Size = 1
    dp_size: Size = 1
    pp_size: Size = 1
    page_size: int
    kv_cache_dtype: str
    kv_layout: str | None = None
    follow_bootstrap_room: bool = True
    prefill_http_port: int | None = None
    decode_allocation_policy: str = "early"
    control_address: str = ""
    boot_id: str = ""
    fingerprint: str = ""


class RouteTable:
    """The ranks that have registered, and the rooms' data-parallel ranks. `now` is the event loop's clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._ranks: dict[tuple[int, int, int, int], Registration] = {}
        self._dp_ranks: OrderedDict[int, tuple[int, float]] = OrderedDict()  # room -> rank, registered at

    def register(self, rank: Registration) -> None:
        """Raises BadRequest if it does not fit the ranks that are there; a restarted server replaces them."""
        sizes = (rank.attn_dp_size, rank.attn_cp_size, rank.attn_tp_size, rank.pp_size)
        if any(place >= size for place, size in zip(rank.place, sizes, strict=True)):
            raise BadRequest(f"rank {rank.place} is outside sizes {sizes}")
        others = {place: other for place, other in self._ranks.items() if other.boot_id == rank.boot_id}
        if any(other.common != rank.common for place, other in others.items() if place != rank.place):
            raise BadRequest("this rank's sizes, page size, KV layout or policies are not those of the other ranks")
        self._ranks = others | {rank.place: rank}

    def route(self) -> Route:
        """Raises Unavailable until every rank has registered."""
        any_rank = next(iter(self._ranks.values()), None)
        if any_rank is None:
            raise Unavailable("no rank of this prefill server has registered yet")
        total = any_rank.attn_dp_size * any_rank.attn_cp_size * any_rank.attn_tp_size * any_rank.pp_size
        if len(self._ranks) < total:
            raise Unavailable(f"{len(self._ranks)} of {total} ranks of this prefill server have registered")
        first = self._ranks[0, 0, 0, 0]
        return Route(
            attn_tp_size=first.attn_tp_size,
            attn_cp_size=first.attn_cp_size,
            dp_size=first.attn_dp_size,
            pp_size=first.pp_size,
            page_size=first.page_size,
            kv_cache_dtype=first.kv_cache_dtype,
            kv_layout=first.kv_layout,
            follow_bootstrap_room=first.load_balance_method == "follow_bootstrap_room",
            prefill_http_port=first.prefill_http_port,
            decode_allocation_policy=first.decode_allocation_policy,
            control_address=first.control_address,
            boot_id=first.boot_id,
            fingerprint=first.fingerprint,
        )

    def rank(self, dp: int, cp: int, tp: int, pp: int) -> Registration:
        """Raises NotFound."""
        found = self._ranks.get((dp, cp, tp, pp))
        if found is None:
            raise NotFound("no such rank has registered")
        return found

    def register_dp_rank(self, room: int, dp_rank: int) -> None:
        self._expire()
        self._dp_ranks[room] = (dp_rank, self._now())
        self._dp_ranks.move_to_end(room)
        if len(self._dp_ranks) > MAX_DP_RANKS:
            self._dp_ranks.popitem(last=False)

    def query_dp_ranks(self, rooms: list[int]) -> dict[str, int]:
        """Only the rooms that are known."""
        self._expire()
        return {str(room): self._dp_ranks[room][0] for room in rooms if room in self._dp_ranks}

    def _expire(self) -> None:
        while self._dp_ranks:
            room, (_, at) = next(iter(self._dp_ranks.items()))
            if at + DP_RANK_EXPIRES_S > self._now():
                break
            del self._dp_ranks[room]


# ---- service -----------------------------------------------------------------------------------------------------


class _DpRank(msgspec.Struct, frozen=True):
    bootstrap_room: RoomNumber
    dp_rank: Rank


class _Rooms(msgspec.Struct, frozen=True):
    bootstrap_rooms: Annotated[list[RoomNumber], Meta(max_length=4096)]


def bootstrap_app(secret: str) -> web.Application:
    """The service, with an empty table. Runs in the API process; ranks register over HTTP."""
    service = _Service(secret)
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors])
    app.router.add_put("/route", service.put_route)
    app.router.add_get("/route", service.get_route)
    app.router.add_post("/register_dp_rank", service.register_dp_rank)
    app.router.add_post("/query_dp_ranks", service.query_dp_ranks)
    app.router.add_get("/health", service.health)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except DiptychError as error:
        body = {"error": {"message": error.message, "type": error.type, "code": error.code, "param": error.param}}
        return web.json_response(body, status=error.status)


class _Service:
    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._table = RouteTable(lambda: asyncio.get_running_loop().time())

    async def put_route(self, request: web.Request) -> web.Response:
        self._check_secret(request)
        self._table.register(await _body(request, Registration))
        return web.Response(text="OK")

    async def get_route(self, request: web.Request) -> web.Response:
        dp, cp, tp, pp = (
            _query_int(request, name)
            for name in ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
        )
        if dp == cp == tp == pp == -1:
            return web.json_response(msgspec.to_builtins(self._table.route()))
        rank = self._table.rank(dp, cp, tp, pp)
        return web.json_response({"rank_ip": rank.rank_ip, "rank_port": rank.rank_port, "boot_id": rank.boot_id})

    async def register_dp_rank(self, request: web.Request) -> web.Response:
        self._check_secret(request)
        body = await _body(request, _DpRank)
        self._table.register_dp_rank(body.bootstrap_room, body.dp_rank)
        return web.Response(text="OK")

    async def query_dp_ranks(self, request: web.Request) -> web.Response:
        body = await _body(request, _Rooms)
        return web.json_response(self._table.query_dp_ranks(body.bootstrap_rooms))

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(text="OK")

    def _check_secret(self, request: web.Request) -> None:
        """Raises Unauthorized unless the request carries the secret, or none is set."""
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self._secret and not hmac.compare_digest(given, f"Bearer {self._secret}".encode()):
            raise Unauthorized("this route needs the hand-over's secret as a bearer token")


async def _body(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not what this route takes: {error}") from None


def _query_int(request: web.Request, name: str) -> int:
    text = request.query.get(name, "")
    if not re.fullmatch("-1|[0-9]{1,5}", text):
        raise BadRequest(f"{name} must be a number (-1 for all)", param=name)
    return int(text)


# ---- clients -----------------------------------------------------------------------------------------------------


def _url(host: str, port: int, path: str) -> str:
    """Raises ProtocolError for what is no host: it comes from a request, and must not become another URL."""
    if not is_host(host) or not 0 < port < 65536:
        raise ProtocolError("bootstrap_host and bootstrap_port are no host name and port")
    bare = host.strip("[]")
    return f"http://[{bare}]:{port}{path}" if ":" in bare else f"http://{bare}:{port}{path}"


def _session(timeout_s: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=Resolver(), force_close=True),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
    )


async def register(host: str, port: int, rank: Registration, secret: str, timeout_s: float) -> None:
    """Tell the bootstrap service about a rank. Raises Unauthorized, BadRequest, or Unavailable (no answer)."""
    url = _url(host, port, "/route")
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    try:
        async with (
            _session(timeout_s) as session,
            session.put(url, json=msgspec.to_builtins(rank), headers=headers, allow_redirects=False) as response,
        ):
            text = await response.text()
            if response.status == 401:
                raise Unauthorized("the bootstrap service has another secret (--disaggregation-secret-file)")
            if response.status != 200:
                raise BadRequest(f"the bootstrap service refused this rank: {response.status} {text[:200]}")
    except (aiohttp.ClientError, TimeoutError, OSError, UnicodeError):
        raise Unavailable(f"the bootstrap service did not answer within {timeout_s:g} s") from None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The whole body, in however many pieces it comes; what is longer than any answer is cut off."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            break
    return bytes(body)


async def fetch_route(host: str, port: int, timeout_s: float) -> Route:
    """Ask a prefill server's bootstrap service. Raises Unavailable (try again) or ProtocolError (do not)."""
    url = _url(host, port, "/route")
    ranks = dict.fromkeys(("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank"), "-1")
    try:
        async with (
            _session(timeout_s) as session,
            session.get(url, params=ranks, allow_redirects=False) as response,
        ):
            body = await _read(response)
            status = response.status
    except (aiohttp.ClientError, TimeoutError, OSError, UnicodeError):
        raise Unavailable("its bootstrap service does not answer") from None
    if status == 503:
        raise Unavailable("its ranks have not all registered yet")
    try:
        route = msgspec.json.decode(body, type=Route)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ProtocolError("bootstrap_host and bootstrap_port lead to no bootstrap service") from None
    if status != 200 or not route.control_address:
        raise ProtocolError("bootstrap_host and bootstrap_port lead to a prefill server that is not a Diptych server")
    return route
