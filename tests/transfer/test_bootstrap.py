"""The bootstrap service over real HTTP, and its client."""

import asyncio

import aiohttp
import msgspec
import pytest
from aiohttp import web
from transfer_registration import announce, registrations

from diptych.errors import BadRequest, ProtocolError, Unauthorized, Unavailable
from diptych.kv.share import Grid
from diptych.net import listen_socket
from diptych.transfer.bootstrap import (
    DP_RANK_EXPIRES_S,
    Registration,
    RouteTable,
    bootstrap_app,
    fetch_route,
    register,
)
from diptych.transfer.wire import Terms

TERMS = Terms("page,head,layer,kv,slot,dim:float32:16:2:64", "abc", 16, 4, 2)
ALL = {"prefill_dp_rank": -1, "prefill_cp_rank": -1, "target_tp_rank": -1, "target_pp_rank": -1}


def ranks(tp=2, boot_id="boot-1", pp=1, **change):
    made = registrations(TERMS, Grid(4, 2, tp, pp), "tcp://127.0.0.1:4321", boot_id, "float32", 8000)
    return [msgspec.structs.replace(rank, **change) for rank in made]


class Service:
    def __init__(self, secret=""):
        self.secret = secret

    async def __aenter__(self):
        self.runner = web.AppRunner(bootstrap_app(self.secret))
        await self.runner.setup()
        sock = listen_socket("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        await web.SockSite(self.runner, sock).start()
        self.session = aiohttp.ClientSession(f"http://127.0.0.1:{self.port}")
        return self

    async def __aexit__(self, *_):
        await self.session.close()
        await self.runner.cleanup()

    async def ask(self, method, path, **kwargs):
        async with self.session.request(method, path, **kwargs) as response:
            return response.status, await response.text()


async def test_register_then_fetch():
    async with Service() as service:
        with pytest.raises(Unavailable):
            await fetch_route("127.0.0.1", service.port, 5.0)
        first, second = ranks()
        await register("127.0.0.1", service.port, first, "", 5.0)
        with pytest.raises(Unavailable):
            await fetch_route("127.0.0.1", service.port, 5.0)
        await register("localhost", service.port, second, "", 5.0)
        route = await fetch_route("127.0.0.1", service.port, 5.0)
        assert (route.attn_tp_size, route.page_size, route.kv_cache_dtype) == (2, 16, "float32")
        assert (route.control_address, route.boot_id) == ("tcp://127.0.0.1:4321", "boot-1")
        assert (route.dp_size, route.pp_size, route.attn_cp_size, route.follow_bootstrap_room) == (1, 1, 1, True)
        where = ALL | {"prefill_dp_rank": 0, "prefill_cp_rank": 0, "target_tp_rank": 1, "target_pp_rank": 0}
        async with service.session.get("/route", params=where) as response:
            assert await response.json() == {"rank_ip": "127.0.0.1", "rank_port": 4321, "boot_id": "boot-1"}
        async with service.session.get("/route", params=where | {"target_tp_rank": 2}) as response:
            assert response.status == 404
        assert await service.ask("GET", "/health") == (200, "OK")


async def test_every_rank_of_every_stage_registers():
    async with Service() as service:
        made = ranks(2, pp=2)
        await announce("127.0.0.1", service.port, made[:3], "", 5.0)
        with pytest.raises(Unavailable, match="not all registered"):
            await fetch_route("127.0.0.1", service.port, 5.0)
        await announce("127.0.0.1", service.port, made[3:], "", 5.0)
        route = await fetch_route("127.0.0.1", service.port, 5.0)
        assert (route.attn_tp_size, route.pp_size) == (2, 2)
        assert [(rank.pp_rank, rank.attn_tp_rank) for rank in made] == [(0, 0), (0, 1), (1, 0), (1, 1)]


async def test_a_restarted_server_replaces_the_old_one():
    async with Service() as service:
        await announce("127.0.0.1", service.port, ranks(2), "", 5.0)
        fresh = ranks(1, "boot-2")
        await announce("127.0.0.1", service.port, fresh, "", 5.0)
        route = await fetch_route("127.0.0.1", service.port, 5.0)
        assert (route.boot_id, route.attn_tp_size) == ("boot-2", 1)


async def test_nobody_answers():
    sock = listen_socket("127.0.0.1", 0)
    port = sock.getsockname()[1]
    sock.close()
    with pytest.raises(Unavailable):
        await register("127.0.0.1", port, ranks()[0], "", 1.0)
    with pytest.raises(Unavailable):
        await fetch_route("127.0.0.1", port, 1.0)
    listening = listen_socket("127.0.0.1", 0)  # accepts, says nothing
    with pytest.raises(Unavailable):
        await fetch_route("127.0.0.1", listening.getsockname()[1], 0.2)
    listening.close()


@pytest.mark.parametrize(
    "host", ["", "a/b", "a?b", "a#b", "user@a", "a b", "a\nb", "a\x00b", "a:b:zz", "é", "[", "x" * 300, "a\\b", "%2e"]
)
async def test_a_host_that_is_none_goes_nowhere(host):
    """It comes from a client's request."""
    with pytest.raises(ProtocolError, match="no host name"):
        await fetch_route(host, 80, 1.0)


async def test_a_name_that_no_resolver_takes():
    with pytest.raises(Unavailable):
        await fetch_route("a" * 100 + ".example", 80, 5.0)
    with pytest.raises(ProtocolError):
        await fetch_route("127.0.0.1", 0, 1.0)


@pytest.mark.parametrize("given", [None, "", "Bearer ", "Bearer wrong", "Bearer s3cret ", "bearer s3cret", "s3cret"])
async def test_writes_need_the_secret(given):
    headers = {} if given is None else {"Authorization": given}
    async with Service("s3cret") as service:
        await announce("127.0.0.1", service.port, ranks(1), "s3cret", 5.0)
        before = await service.ask("GET", "/route", params=ALL)
        assert before[0] == 200
        forged = msgspec.to_builtins(ranks(1, control_address="tcp://6.6.6.6:1")[0])
        status, text = await service.ask("PUT", "/route", json=forged, headers=headers)
        if given == "Bearer s3cret ":  # HTTP strips spaces around a header's value
            assert status == 200
            return
        assert status == 401 and "s3cret" not in text
        body = {"bootstrap_room": 1, "dp_rank": 0}
        assert (await service.ask("POST", "/register_dp_rank", json=body, headers=headers))[0] == 401
        assert await service.ask("GET", "/route", params=ALL) == before
        status, text = await service.ask("POST", "/query_dp_ranks", json={"bootstrap_rooms": [1]})
        assert (status, text) == (200, "{}")


async def test_a_secret_that_is_no_text():
    """Raw bytes in the header are a wrong secret, not a failure."""
    async with Service("s3cret") as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        head = b"PUT /route HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer \xff\xfe\r\n"
        writer.write(head + b"Content-Length: 2\r\n\r\n{}")
        assert (await reader.readline()).split()[1] == b"401"
        writer.close()
        await writer.wait_closed()


async def test_a_wrong_secret():
    async with Service("s3cret") as service:
        with pytest.raises(Unauthorized):
            await announce("127.0.0.1", service.port, ranks(), "other", 5.0)


@pytest.mark.parametrize(
    "change",
    [
        {"attn_tp_rank": 2},
        {"attn_tp_rank": -1},
        {"attn_tp_size": 0},
        {"attn_tp_size": "2"},
        {"page_size": 0},
        {"rank_port": 70000},
        {"rank_ip": None},
        {"kv_cache_dtype": "x" * 300},
    ],
)
async def test_bad_registrations_are_4xx_and_change_nothing(change):
    async with Service() as service:
        await announce("127.0.0.1", service.port, ranks(2), "", 5.0)
        before = await service.ask("GET", "/route", params=ALL)
        body = msgspec.to_builtins(ranks(2)[1]) | change
        status, text = await service.ask("PUT", "/route", json=body)
        assert status == 400 and "Traceback" not in text
        assert await service.ask("GET", "/route", params=ALL) == before


async def test_ranks_must_agree():
    async with Service() as service:
        first, second = ranks(2)[0], ranks(2, page_size=32)[1]
        await register("127.0.0.1", service.port, first, "", 5.0)
        with pytest.raises(BadRequest, match="not those of the other ranks"):
            await register("127.0.0.1", service.port, second, "", 5.0)


@pytest.mark.parametrize(
    "method, path, data, status",
    [
        ("PUT", "/route", b"", 400),
        ("PUT", "/route", b"[]", 400),
        ("PUT", "/route", b"\x80\x04K\x01.", 400),
        ("PUT", "/route", b"[" * 5000, 400),
        ("PUT", "/route", b" " * 70000, 413),
        ("POST", "/register_dp_rank", b'{"bootstrap_room": -1, "dp_rank": 0}', 400),
        ("POST", "/register_dp_rank", b'{"bootstrap_room": 9223372036854775808, "dp_rank": 0}', 400),
        ("POST", "/query_dp_ranks", b'{"bootstrap_rooms": 5}', 400),
        ("GET", "/route", None, 400),
        ("GET", "/route?prefill_dp_rank=a&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0", None, 400),
        ("GET", "/route?prefill_dp_rank=²&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0", None, 400),
        ("GET", "/route?prefill_dp_rank=--1&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0", None, 400),
        ("GET", "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0", None, 404),
        ("GET", "/nothing", None, 404),
        ("DELETE", "/route", None, 405),
    ],
)
async def test_nonsense_is_4xx(method, path, data, status):
    async with Service() as service:
        assert (await service.ask(method, path, data=data))[0] == status
        assert await service.ask("GET", "/health") == (200, "OK")


async def test_dp_ranks():
    async with Service() as service:
        for room, rank in ((5, 1), (2**63 - 1, 3)):
            body = {"bootstrap_room": room, "dp_rank": rank}
            assert (await service.ask("POST", "/register_dp_rank", json=body))[0] == 200
        async with service.session.post("/query_dp_ranks", json={"bootstrap_rooms": [5, 6, 2**63 - 1]}) as response:
            assert await response.json() == {"5": 1, str(2**63 - 1): 3}


def test_dp_ranks_expire():
    now = 0.0
    table = RouteTable(lambda: now)
    table.register_dp_rank(1, 1)
    now = DP_RANK_EXPIRES_S / 2
    table.register_dp_rank(2, 0)
    assert table.query_dp_ranks([1, 2]) == {"1": 1, "2": 0}
    now = DP_RANK_EXPIRES_S
    assert table.query_dp_ranks([1, 2]) == {"2": 0}


async def test_what_is_no_bootstrap_service():
    replies = [{"attn_tp_size": 1, "page_size": 16, "kv_cache_dtype": "auto"}, [1]]

    async def other(request):
        return web.json_response(replies.pop(0))

    app = web.Application()
    app.router.add_get("/route", other)
    runner = web.AppRunner(app)
    await runner.setup()
    sock = listen_socket("127.0.0.1", 0)
    await web.SockSite(runner, sock).start()
    for message in ("not a Diptych server", "no bootstrap service"):
        with pytest.raises(ProtocolError, match=message):
            await fetch_route("127.0.0.1", sock.getsockname()[1], 5.0)
    await runner.cleanup()


async def test_an_answer_in_pieces():
    """A network may cut it anywhere."""
    table = RouteTable(lambda: 0.0)
    table.register(ranks(1)[0])
    body = msgspec.json.encode(table.route())

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:20])
        for _ in range(100):  # the asker, on this loop too, reads what there is
            await asyncio.sleep(0)
        writer.write(body[20:])
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    route = await fetch_route("127.0.0.1", server.sockets[0].getsockname()[1], 5.0)
    assert route == table.route()
    server.close()


def test_unknown_fields_are_ignored():
    """Another system's rank sends more than we know."""
    body = msgspec.to_builtins(ranks(1)[0]) | {"attn_sharding": {"x": 1}, "rank_zone": "a"}
    assert msgspec.convert(body, Registration) == ranks(1)[0]
