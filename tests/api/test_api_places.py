"""Where a request may send a decode server: its bootstrap_host is checked by the address that it leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_server import Serve

from diptych.api.places import MAX_NAMES, Places
from diptych.config import ANYWHERE, PRIVATE
from diptych.errors import BadRequest, Unavailable

ROOM = {"bootstrap_port": 34000, "bootstrap_room": 7}
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"input_ids": [1]},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}
NEAR = ("127.0.0.1", "127.0.7.9", "::1", "10.244.1.5", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fd12::5")
FAR = (
    *("8.8.8.8", "169.254.169.254", "fe80::1", "0.0.0.0", "::", "224.0.0.1", "255.255.255.255", "172.32.0.1"),
    *("100.100.100.200", "2001:4860:4860::8888", "::ffff:169.254.169.254", "64:ff9b::a00:1", "2002:a00:1::1"),
    *("127.1", "2130706433", "0177.0.0.1", "10.0.0.1.", "", "ff02::1"),
)


@pytest.fixture(autouse=True)
def hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Names as pods of a local run have them, and no secret."""
    file = tmp_path / "hosts"
    file.write_text("127.0.0.5 p0.prefill\n8.8.4.4 far.away\n169.254.169.254 metadata\n")
    monkeypatch.setenv("DIPTYCH_HOSTS", str(file))
    monkeypatch.delenv("DIPTYCH_PD_SECRET", raising=False)
    return file


def test_what_is_near_by_default() -> None:
    places = Places(PRIVATE)
    assert [address for address in NEAR if not places.has(address)] == []
    assert [address for address in FAR if places.has(address)] == []
    assert places.has("::ffff:10.0.0.1")


async def test_names_lead_to_their_address() -> None:
    places = Places(PRIVATE)
    assert await places.find("p0.prefill") == "127.0.0.5"
    assert await places.find("[::1]") == "::1" and await places.find("10.0.0.1") == "10.0.0.1"
    assert await places.find("0x7f.1") == "127.0.0.1"  # what the system takes for an address is one
    for host in ("far.away", "metadata", "[fe80::1]", "2852039166", "0xa9.0xfea9fe", "1.1.1.1"):
        with pytest.raises(BadRequest, match="--disaggregation-bootstrap-allow"):
            await places.find(host)
    with pytest.raises(Unavailable, match="does not resolve"):
        await places.find("no-such-host.invalid")
    with pytest.raises(Unavailable, match="does not resolve"):
        await places.find("a..b")


async def test_a_name_is_not_resolved_again_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is what is handed on: there is no second look-up that could say otherwise."""
    monkeypatch.setattr("diptych.api.places.NAME_TTL_S", 1000.0)
    places = Places(PRIVATE)
    assert await places.find("p0.prefill") == "127.0.0.5"

    async def elsewhere(host: str) -> str:
        return "8.8.8.8" if host == "p0.prefill" else host

    monkeypatch.setattr("diptych.api.places.resolve", elsewhere)
    assert await places.find("p0.prefill") == "127.0.0.5"
    for index in range(2 * MAX_NAMES):
        await places.find(f"127.0.{index // 250}.{index % 250}")
    assert len(places._resolved) == MAX_NAMES
    with pytest.raises(BadRequest):
        await places.find("p0.prefill")


async def test_what_is_allowed_by_name_or_network() -> None:
    places = Places(("8.8.0.0/16", "Far.Away", "*.svc.local", "2001:db8::/32"))
    for host, address in (
        ("8.8.4.4", "8.8.4.4"),
        ("far.AWAY", "far.AWAY"),
        ("far.away.", "far.away."),
        ("p0.prefill.svc.local", "p0.prefill.svc.local"),
        ("2001:db8::1", "2001:db8::1"),
        ("2.2.2.2", "2.2.2.2"),  # nobody: nothing is connected to
    ):
        assert await places.find(host) == address
    for host in ("127.0.0.1", "p0.prefill", "svc.local.", "xsvc.local", "not.far.away", "2.2.2.3"):
        with pytest.raises((BadRequest, Unavailable)):
            await places.find(host)
    assert await Places((ANYWHERE,)).find("no-such-host.invalid") == "no-such-host.invalid"


@pytest.mark.parametrize("path", BODIES)
async def test_a_decode_server_refuses(serve: Serve, path: str) -> None:
    server = await serve(disaggregation_mode="decode")
    for host in ("8.8.8.8", "metadata", "169.254.169.254", "127.1"):
        status, reply = await server.post(path, {**BODIES[path], **ROOM, "bootstrap_host": host})
        assert (status, reply["error"]["param"]) == (400, "bootstrap_host")
        assert "--disaggregation-bootstrap-allow" in reply["error"]["message"]
    assert (await server.post(path, {**BODIES[path], **ROOM, "bootstrap_host": "no-such-host.invalid"}))[0] == 503
    assert server.engine.requests == []
    assert (await server.post(path, {**BODIES[path], **ROOM, "bootstrap_host": "p0.prefill"}))[0] == 200
    assert server.engine.requests[0].bootstrap is not None
    assert server.engine.requests[0].bootstrap.host == "127.0.0.5"


async def test_one_bad_place_of_a_batch_is_enough(serve: Serve) -> None:
    server = await serve(disaggregation_mode="decode")
    body = {"input_ids": [[1], [2]], "bootstrap_room": [5, 6], "bootstrap_host": ["127.0.0.1", "8.8.8.8"]}
    status, reply = await server.post("/generate", body)
    assert (status, reply["error"]["param"]) == (400, "bootstrap_host") and server.engine.requests == []


async def test_a_secret_or_the_flag_opens_more(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {**BODIES["/generate"], **ROOM, "bootstrap_host": "8.8.8.8"}
    for settings, status in (
        ({"disaggregation_bootstrap_allow": "8.8.8.0/24"}, 200),
        ({"disaggregation_bootstrap_allow": "any"}, 200),
        ({"disaggregation_bootstrap_allow": "9.0.0.0/8"}, 400),
    ):
        server = await serve(disaggregation_mode="decode", **settings)
        assert (await server.post("/generate", body))[0] == status
    monkeypatch.setenv("DIPTYCH_PD_SECRET", "s")
    assert (await (await serve(disaggregation_mode="decode")).post("/generate", body))[0] == 200
    closed = await serve(disaggregation_mode="decode", disaggregation_bootstrap_allow="127.0.0.0/8")
    assert (await closed.post("/generate", body))[0] == 400


@pytest.mark.parametrize("mode", ["prefill", "null"])
async def test_other_servers_connect_to_nobody(serve: Serve, mode: str) -> None:
    server = await serve(disaggregation_mode=mode)
    assert (await server.post("/generate", {**BODIES["/generate"], **ROOM, "bootstrap_host": "8.8.8.8"}))[0] == 200
