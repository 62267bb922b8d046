"""The shared secret of the hand-over and the API keys: right, wrong, missing; clear errors, nothing hangs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from asking import ask, endless, until
from pd_cluster import start_decode, start_prefill

from diptych.testing.processes import ServerProcess

pytestmark = pytest.mark.timeout(300)

KEY = "a-key-for-clients"


class Locked:
    """A prefill server with a secret and a key; decode servers with the right, a wrong and no secret, a router each."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        (folder / "right").write_text("the secret of this test\n")
        (folder / "wrong").write_text("another secret\n")
        key, secret = ("--api-key", KEY), "--disaggregation-secret-file"
        self.prefill = start_prefill(stack, *key, secret, str(folder / "right"))
        self.decode = {
            "right": start_decode(stack, *key, secret, str(folder / "right")),
            "wrong": start_decode(stack, *key, secret, str(folder / "wrong")),
            "missing": start_decode(stack, *key),
        }
        for server in (self.prefill, *self.decode.values()):
            server.wait_ready()
        port = json.loads(ask(self.prefill.url, "/server_info", key=KEY)[1])["disaggregation_bootstrap_port"]
        route = ("route", "--port", "0", "--disable-retries", *key, "--prefill", self.prefill.url, str(port))
        self.router = {
            name: stack.enter_context(ServerProcess(*route, "--decode", server.url)).wait_ready()
            for name, server in self.decode.items()
        }


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    with ExitStack() as stack:
        yield Locked(stack, tmp_path_factory.mktemp("secrets"))


def test_the_right_secret_and_key(locked: Locked) -> None:
    status, text = ask(locked.router["right"].url, "/generate", endless(1, 40, 5), key=KEY)
    assert status == 200 and len(json.loads(text)["output_ids"]) == 5


@pytest.mark.parametrize("secret", ["wrong", "missing"])
def test_another_secret_is_refused_at_once(locked: Locked, secret: str) -> None:
    started = time.monotonic()
    status, text = ask(locked.router[secret].url, "/generate", endless(1, 40, 5), key=KEY, timeout_s=20)
    assert time.monotonic() - started < 5
    assert status in (401, 500, 502, 503) and "secret" in json.loads(text)["error"]["message"], (status, text)
    for server in (locked.prefill, locked.decode[secret]):
        until(lambda server=server: _holds_nothing(server), f"idle: {server.args}", 5)
    test_the_right_secret_and_key(locked)


def _holds_nothing(server: ServerProcess) -> bool:
    report = json.loads(ask(server.url, "/audit", key=KEY)[1])
    return report["ok"] and not any(report[name] for name in ("requests", "held", "rooms", "transfers"))


@pytest.mark.parametrize("key", ["", "a-wrong-key", KEY[:-1]])
def test_without_the_key_nothing_is_served(locked: Locked, key: str) -> None:
    for server in (locked.router["right"], locked.prefill, locked.decode["right"]):
        for path, body in (("/generate", endless(1, 4, 1)), ("/flush_cache", {}), ("/server_info", None)):
            status, text = ask(server.url, path, body, key=key)
            assert status == 401 and "API key" in json.loads(text)["error"]["message"], (path, status, text)
        for path in ("/health", "/ready"):
            assert ask(server.url, path)[0] == 200


def test_a_secret_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = start_prefill(stack, "--disaggregation-secret-file", str(tmp_path / "none"))
        with pytest.raises(RuntimeError, match="--disaggregation-secret-file: cannot read it"):
            server.wait_ready(30)
        assert server.process.returncode == 2
