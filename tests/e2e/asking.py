"""Ways to ask servers that several tests share: errors as values, keys, many at once; and to wait for servers."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from pd_cluster import PDCluster, assert_idle

from diptych.testing.processes import ServerProcess


def ask(url: str, path: str, body: Any = None, *, key: str = "", timeout_s: float = 120.0) -> tuple[int, str]:
    """Status and text of the answer: POST with a body, GET without. Errors of HTTP are answers too."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=timeout_s) as reply:
            return int(reply.status), reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def until(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> float:
    """Look every few milliseconds until `condition` holds. Returns the seconds it took; fails after `timeout_s`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)
    return time.monotonic() - started


def counters(server: ServerProcess) -> dict[str, Any]:
    """The engine's figures after what it has just done: a report that follows a question answers the next one."""
    server.get("/server_info")
    state: dict[str, Any] = server.get("/server_info")["internal_states"][0]
    return {name: value for name, value in state.items() if isinstance(value, int | float)}


def is_idle(server: ServerProcess) -> bool:
    """Nothing is held for any request any more."""
    report = server.get("/audit")
    return not any(report[name] for name in ("requests", "held", "grammars", "rooms", "transfers", "sequences"))


def settle(pd: PDCluster, timeout_s: float = 20.0) -> None:
    """Wait until every server is idle, and check its ledger."""
    for server in pd.servers:
        until(lambda server=server: is_idle(server), f"idle: {server.args}", timeout_s)
        assert_idle(server)


@contextmanager
def in_flight(
    server: ServerProcess, bodies: list[dict[str, Any]], path: str = "/generate"
) -> Iterator[list[Future[tuple[int, str]]]]:
    """All requests at once, one thread each; the answers are (status, text)."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        yield [pool.submit(ask, server.url, path, body) for body in bodies]


def prompt(index: int, length: int) -> list[int]:
    """Token ids that no other index shares."""
    return [(index * 7919 + position * 104729) % 2600 + 300 for position in range(length)]


def endless(index: int, length: int, most: int, **fields: Any) -> dict[str, Any]:
    """A greedy request that makes exactly `most` tokens."""
    sampling = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
    return {"input_ids": prompt(index, length), "sampling_params": sampling, **fields}
