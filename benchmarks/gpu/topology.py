"""Servers on given GPUs behind one router.

`u+u` are two unified servers, `p+d` prefill and decode, `p+p+d2` two prefill servers and a decode server of two GPUs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.served import Served, serve_flags

IDLE_S = 60.0  # longest wait for requests to leave
ROLES = {"u": [], "p": ["--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", "0"]}
ROLES["d"] = ["--disaggregation-mode", "decode"]


@dataclass(frozen=True)
class Part:
    """One server: role u, p or d, on so many GPUs."""

    role: str
    tp: int


def parse(text: str) -> list[Part]:
    """The servers of a topology. Raises ValueError for one that cannot serve."""
    parts = []
    for item in text.split("+"):
        match = re.fullmatch(r"([upd])([1-9]?)", item)
        if match is None:
            raise ValueError(f"{item!r} is no server: u, p or d, and how many GPUs it takes, such as p or d2")
        parts.append(Part(match[1], int(match[2] or 1)))
    if {part.role for part in parts} not in ({"u"}, {"p", "d"}):
        raise ValueError(f"{text}: either unified servers, or prefill and decode servers")
    return parts


@dataclass
class Topology:
    """Running servers, and the router in front of them."""

    name: str
    parts: list[Part]
    servers: list[Served]
    router: Served

    @property
    def url(self) -> str:
        return self.router.url

    def of(self, *roles: str) -> list[Served]:
        return [server for part, server in zip(self.parts, self.servers, strict=True) if part.role in roles]

    def settle(self) -> None:
        """Return when no server has a request any more. Raises RuntimeError if that takes too long."""
        deadline = time.monotonic() + IDLE_S
        while any(_busy(server.info()["internal_states"][0]) for server in self.servers):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: requests that ended are still there after {IDLE_S:g} s")
            time.sleep(0.1)


def _busy(state: dict[str, Any]) -> bool:
    return any(value for key, value in state.items() if key.startswith("num_") and key.endswith("_reqs"))


@contextmanager
def running(
    text: str, folder: str, model: str, gpus: Sequence[int], flags: Sequence[str], policy: str, rehearse: bool
) -> Iterator[Topology]:
    """The servers of a topology, started side by side on the first of `gpus`, and their router, all ready."""
    parts = parse(text)
    needed = sum(part.tp for part in parts)
    if not rehearse and needed > len(gpus):
        raise ValueError(f"{text} takes {needed} GPUs, there are {len(gpus)}")
    free = [str(gpu) for gpu in gpus]
    with ExitStack() as stack:
        servers = []
        for part in parts:
            mine, free = free[: part.tp], free[part.tp :]
            env = None if rehearse else {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
            own = [*ROLES[part.role], "--tp", str(part.tp), *flags]
            servers.append(stack.enter_context(Served(serve_flags(folder, model, *own, rehearse=rehearse), env)))
        for server in servers:
            server.wait_ready()
        router = stack.enter_context(Served(_router_flags(parts, servers, policy))).wait_ready()
        yield Topology(text, parts, servers, router)


def _router_flags(parts: Sequence[Part], servers: Sequence[Served], policy: str) -> list[str]:
    flags = ["route", "--port", "0", "--log-level", "warning", "--policy", policy]
    for part, server in zip(parts, servers, strict=True):
        if part.role == "p":
            flags += ["--prefill", server.url, str(server.info()["disaggregation_bootstrap_port"])]
        else:
            flags += ["--decode" if part.role == "d" else "--worker-urls", server.url]
    return flags
