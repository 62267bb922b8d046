"""The servers behind the router: what is known of each, and who may get the next request."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection
from typing import Any

from diptych.errors import Unavailable
from diptych.router.breaker import Breaker
from diptych.router.config import RouterConfig, ServerAddress
from diptych.router.exchange import Exchange
from diptych.router.pick import PickState, pick
from diptych.router.retry import Suspect

log = logging.getLogger(__name__)


class NoServer(Unavailable):
    """None of the servers that could take the request is healthy."""


class Server:
    """One server. `healthy` is what checks and connections say; the breaker is what requests say."""

    def __init__(self, address: ServerAddress, role: str, config: RouterConfig) -> None:
        self.address = address
        self.role = role  # prefill | decode | worker
        self.healthy = config.disable_health_check
        self.num_lives = 0  # times it has become healthy
        self.leaving = False  # as it said last: unhealthy then, but it ends the requests it has
        self.draining = False  # it leaves in order: not because its engine died
        self.local_prefill = False  # a decode server that can do both phases, as its last good check said
        self.breaker = Breaker(config)
        self.num_requests = 0
        self.prompt_bytes = 0
        self.legs: dict[Leg, None] = {}  # in order of opening, so that a simulation replays exactly
        self.suspected = asyncio.Event()  # wakes its health check before the time
        # counters for metrics
        self.num_selected = 0
        self.num_failed = 0
        self.checks = {True: 0, False: 0}

    def report(self, now: float) -> dict[str, Any]:
        """What /workers tells."""
        return {
            "url": self.address.url,
            "worker_type": self.role,
            "bootstrap_port": self.address.bootstrap_port,
            "is_healthy": self.healthy,
            "local_prefill": self.local_prefill,
            "load": self.num_requests,
            "prompt_bytes": self.prompt_bytes,
            "circuit": self.breaker.state(now).name.lower(),
        }


class Leg:
    """One server's part in serving a request: counts as load until `end`."""

    def __init__(self, server: Server, prompt_bytes: int, now: float, suspect: Suspect) -> None:
        self.server = server
        self.suspect = suspect  # the request, if the server dies
        self.task: asyncio.Task[Any] | None = None  # that waits for the answer to begin
        self.exchange: Exchange | None = None  # once it has begun
        self.given_up = False
        self._prompt_bytes = prompt_bytes
        self._trial = server.breaker.begin(now)
        self._open = True
        server.legs[self] = None
        server.num_requests += 1
        server.prompt_bytes += prompt_bytes
        server.num_selected += 1

    def end(self, now: float, failed: bool | None = None) -> None:
        """The server has done its part, or failed in it; None: its part ended for other reasons. Idempotent."""
        if not self._open:
            return
        self._open = False
        self.server.legs.pop(self, None)
        self.server.num_requests -= 1
        self.server.prompt_bytes -= self._prompt_bytes
        self.server.num_failed += bool(failed)
        self.server.breaker.end(now, failed, self._trial)

    def give_up(self) -> None:
        """The server is taken for dead: end the wait for it, unless something still comes from it."""
        self.given_up = True
        if self.exchange is not None:
            if not self.exchange.active:
                self.exchange.close()
        elif self.task is not None:
            self.task.cancel()


class Fleet:
    """All servers by role, and the choice among them. `now`: the loop's clock."""

    def __init__(self, config: RouterConfig, rng: random.Random, now: Callable[[], float]) -> None:
        by_role = {"prefill": config.prefill, "decode": config.decode, "worker": config.workers}
        self.roles = {
            role: [Server(address, role, config) for address in addresses]
            for role, addresses in by_role.items()
            if addresses
        }
        self.servers = [server for servers in self.roles.values() for server in servers]
        self.complete = asyncio.Event()  # there has been a healthy server of each role
        self.news = asyncio.Event()  # set when a server becomes healthy, and replaced by a new one
        self._states = {role: PickState(config, role) for role in self.roles}
        self._checked = not config.disable_health_check
        self._rng = rng
        self._now = now
        if self.ready:
            self.complete.set()

    @property
    def ready(self) -> bool:
        """At least one server of each role can serve."""
        return all(any(server.healthy for server in servers) for servers in self.roles.values())

    @property
    def missing(self) -> list[str]:
        return [role for role, servers in self.roles.items() if not any(server.healthy for server in servers)]

    @property
    def falls_back(self) -> bool:
        """No prefill server is healthy, but a decode server is that can do both phases."""
        lacks = not any(server.healthy for server in self.roles.get("prefill", ()))
        return lacks and any(server.healthy and server.local_prefill for server in self.roles.get("decode", ()))

    def choose(self, role: str, key: bytes, avoid: Collection[Server], *, alone: bool = False) -> Server:
        """The server of `role` for a request; `alone`: one that can do both phases. Raises NoServer when none is
        healthy.

        Servers to `avoid`, and those whose circuit is open, are taken only when there is no other: breakers tell who is
        better, and when all are open they tell nothing.
        """
        now = self._now()
        healthy = [server for server in self.roles[role] if server.healthy and (server.local_prefill or not alone)]
        if not healthy:
            raise NoServer(f"no {role} server is healthy; try again in a moment")
        closed = [server for server in healthy if server.breaker.allows(now)] or healthy
        wanted = [server for server in closed if server not in avoid] or closed
        return pick(self._states[role], wanted, key, self._rng)

    def mark(self, server: Server, healthy: bool, why: str) -> None:
        """A check or a connection has shown what a server is. What waits for one that is gone is given up."""
        if not healthy and not server.leaving:
            for leg in list(server.legs):
                leg.give_up()
        if server.healthy == healthy:
            return
        server.healthy = healthy
        server.num_lives += healthy
        log.log(
            logging.INFO if healthy else logging.WARNING, "%s server %s is %s", server.role, server.address.url, why
        )
        if self.ready:
            self.complete.set()
        if healthy:
            self.news.set()
            self.news = asyncio.Event()
        else:
            self._states[server.role].tree.remove(server.address)  # it comes back with an empty cache

    def leave(self, server: Server, *, in_order: bool) -> None:
        """A server has told a request that it takes nothing new. What it has begun it may end."""
        if self._checked:
            server.suspected.set()
            server.leaving, server.draining = True, in_order
            self.mark(server, False, "leaving: it takes nothing new")

    def suspect(self, server: Server, *, gone: bool) -> None:
        """A request has lost a server; `gone`: it takes no connections. Its health is checked at once."""
        if self._checked:
            server.suspected.set()
            if gone:
                self.mark(server, False, "gone: it takes no connections")
