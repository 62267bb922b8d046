"""What a server tells at its start about who can reach it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import AsyncExitStack

import pytest

from diptych.config import ServerConfig
from diptych.engine.launch import EngineProcesses
from diptych.errors import ConfigError
from diptych.net import is_exposed
from diptych.router.config import parse_router_args
from diptych.server import _start_bootstrap, exposure
from diptych.testing.processes import ServerProcess, assert_backlog

WORDS = "anybody who reaches this"
ROUTE = ("route", "--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2", "--port", "0")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIPTYCH_API_KEY", "DIPTYCH_PD_SECRET", "DIPTYCH_POD_IP", "DIPTYCH_HOSTS"):
        monkeypatch.delenv(name, raising=False)


def test_which_addresses_are_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [host for host in ("127.0.0.1", "127.9.8.7", "localhost", "::1") if is_exposed(host)] == []
    for host in ("0.0.0.0", "", "*", "::", "10.0.0.1", "192.0.2.1", "2001:db8::1"):
        assert is_exposed(host), host
    monkeypatch.setenv("DIPTYCH_POD_IP", "127.0.0.7")  # a pod of a local run
    assert not is_exposed("0.0.0.0")


@pytest.mark.parametrize("mode", ["null", "prefill", "decode"])
def test_a_server_that_anybody_can_use_says_so(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**settings: str) -> str:
        return exposure(ServerConfig(model_path="m", disaggregation_mode=mode, **{"host": "0.0.0.0", **settings}))

    assert "--api-key" in told() and ("DIPTYCH_PD_SECRET" in told()) == (mode != "null")
    assert told(host="127.0.0.1") == "" and told(api_key="k") == ""
    monkeypatch.setenv("DIPTYCH_PD_SECRET", "s")
    assert (told() == "") == (mode != "null")  # a server of both phases has no use for the secret
    monkeypatch.setenv("DIPTYCH_API_KEY", "k")
    assert told() == ""


async def test_a_burst_of_decode_servers_finds_room_at_the_bootstrap_service() -> None:
    config = ServerConfig(model_path="m", disaggregation_mode="prefill", disaggregation_bootstrap_port=0)
    async with AsyncExitStack() as stack:
        place = await _start_bootstrap(config, "k", stack)
        assert place is not None
        assert_backlog(place[1])


def _wait_for(server: ServerProcess, word: str) -> None:
    deadline = time.monotonic() + 60
    while not any(word in line for line in list(server.log)):
        assert server.process.poll() is None and time.monotonic() < deadline, server.tail()
        time.sleep(0.005)


def test_it_is_one_line_at_the_start() -> None:
    serve = ("serve", "--model-path", "models/demo", "--port", "0")
    for args, told in (
        ((*serve, "--host", "0.0.0.0"), True),
        ((*ROUTE, "--host", "0.0.0.0"), True),
        ((*ROUTE, "--host", "0.0.0.0", "--api-key", "k"), False),
        (ROUTE, False),
    ):
        with ServerProcess(*args) as server:
            _wait_for(server, "loading" if args[0] == "serve" else "listening on")
        lines = [line for line in server.log if WORDS in line]
        assert len(lines) == told and all(" W" in line for line in lines), list(server.log)


def test_the_routers_default_is_this_machine() -> None:
    assert not is_exposed(parse_router_args(list(ROUTE[1:])).host)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--tp", "3"), "--tp 3 does not divide the model's 8 attention heads; choose another --tp"),
        (("--pp-size", "100"), "--pp-size 100 is more than the model's 6 layers; choose a smaller one"),
        (("--context-length", "100000000"), "--context-length 100000000 is more than this model's positions allow"),
        (("--max-total-tokens", "10"), "--max-total-tokens 10 is less than a page of 16"),
        (("--model-impl", "transformers", "--tp", "2"), "--model-impl transformers cannot split a model"),
        (("--device", "cuda"), "--device cuda: torch finds no GPU here"),
        (("--device", "cuda", "--tp", "2"), "--device cuda: torch finds no GPU here"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(flags: tuple[str, ...], reason: str) -> None:
    env = {"CUDA_VISIBLE_DEVICES": ""}
    with ServerProcess("serve", "--model-path", "models/demo", "--port", "0", *flags, env=env) as server:
        assert server.process.wait(60) == 2
        with pytest.raises(RuntimeError, match="ended with status 2"):  # reads the log to its end
            server.wait_ready()
    told = [line for line in server.log if reason in line]
    assert len(told) == 1 and told[0].startswith("diptych: "), list(server.log)
    assert server.log[-1] == told[0] and not any("Traceback" in line for line in server.log)


def test_checks_of_the_model_start_no_process() -> None:
    engine = EngineProcesses(ServerConfig(model_path="models/demo", tp_size=3))
    with pytest.raises(ConfigError, match="--tp 3"):
        asyncio.run(engine.start())
    assert engine._processes == []


def test_ctrl_c_ends_all_in_peace_and_tells_how_to_hurry() -> None:
    serve = ("serve", "--model-path", "models/demo", "--served-model-name", "foo", "--port", "0")
    with ServerProcess(*serve) as server:
        server.wait_ready()
        os.killpg(server.process.pid, signal.SIGINT)  # all of the process group hear it, the engine's processes too
        assert server.process.wait(60) == 0
        with pytest.raises(RuntimeError, match="ended with status 0"):  # reads the log to its end
            server.url = ""
            server.wait_ready()
    log = list(server.log)
    assert any("loading models/demo as foo" in line for line in log)
    assert any("a second signal (Ctrl-C) cuts them off" in line for line in log)
    assert not any("Traceback" in line or "Interrupt" in line for line in log), log
