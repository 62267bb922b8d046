"""Active health checks: one task a server."""

from __future__ import annotations

import asyncio
import logging

from diptych.errors import Unavailable, UpstreamError
from diptych.router.config import RouterConfig
from diptych.router.exchange import Headers, Upstream, read_all
from diptych.router.fleet import Fleet, Server
from diptych.router.verdict import does_prefill, is_draining, is_leaving

RECHECK_S = 1.0  # between checks of a server that is not healthy, or has just failed one
MAX_ANSWER_BYTES = 1 << 20

log = logging.getLogger(__name__)


class HealthChecker:
    """Asks each server how it is. At first one good answer is enough; later it takes as many as configured.

    A server that says that it is leaving is believed at once.
    """

    def __init__(self, config: RouterConfig, fleet: Fleet, upstream: Upstream, headers: Headers) -> None:
        self._config = config
        self._fleet = fleet
        self._upstream = upstream
        self._headers = headers
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        if not self._config.disable_health_check:
            self._tasks = [asyncio.create_task(self._watch(server)) for server in self._fleet.servers]
            for task in self._tasks:
                task.add_done_callback(_tell_defect)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, server: Server) -> None:
        config = self._config
        seen = False  # it has been healthy before
        good = bad = 0
        while True:
            server.suspected.clear()
            ok = await self.check(server)
            good, bad = (good + 1, 0) if ok else (0, bad + 1)
            if bad == 1:
                for leg in server.legs:
                    if leg.exchange is not None:
                        leg.exchange.active = False
            if ok and not server.healthy and good >= (config.health_success_threshold if seen else 1):
                seen = True
                self._fleet.mark(server, True, "healthy")
            elif server.healthy and server.leaving:
                self._fleet.mark(server, False, "leaving: it takes nothing new")
            elif bad >= config.health_failure_threshold:
                self._fleet.mark(server, False, f"unhealthy: {bad} checks failed")
            steady = ok and server.healthy
            await self._pause(server, config.health_check_interval_secs if steady else self._soon(seen))

    def _soon(self, seen: bool) -> float:
        again = RECHECK_S if seen else self._config.worker_startup_check_interval
        return min(again, self._config.health_check_interval_secs)

    async def _pause(self, server: Server, seconds: float) -> None:
        """Sleep, unless a request finds the server gone meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await server.suspected.wait()
        except TimeoutError:
            return

    async def check(self, server: Server) -> bool:
        """One check: whether the server answers 2xx in time; if the router is out of sockets, what was known before."""
        try:
            async with asyncio.timeout(self._config.health_check_timeout_secs):
                exchange = await self._upstream.open(
                    server.address, "GET", self._config.health_check_endpoint, self._headers, ()
                )
                try:
                    answer = await read_all(exchange, MAX_ANSWER_BYTES)
                finally:
                    exchange.close()
            ok = 200 <= exchange.status < 300
            server.leaving = is_leaving(exchange.status, answer)
            server.draining = is_draining(exchange.status, answer)
            if ok:
                server.local_prefill = does_prefill(answer)
        except Unavailable:
            return server.healthy
        except (UpstreamError, TimeoutError):
            ok = server.leaving = server.draining = False
        server.checks[ok] += 1
        return ok


def _tell_defect(task: asyncio.Task[None]) -> None:
    """A checker ends only when it is stopped."""
    if not task.cancelled():
        log.critical("a health checker has died; restart the router", exc_info=task.exception())
