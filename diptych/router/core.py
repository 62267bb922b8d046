"""Serves one inference request: picks servers, and tries again elsewhere while nothing has reached the client."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random

from diptych.errors import DeadlineExceeded
from diptych.router.attempt import Attempt, Failure
from diptych.router.body import Ask, add_rooms, read_body, without_rooms
from diptych.router.config import RouterConfig
from diptych.router.exchange import Body, Client, ClientRequest, Headers, Upstream
from diptych.router.fleet import Fleet, Leg, NoServer, Server
from diptych.router.headers import to_client, to_server
from diptych.router.limits import Gate, Hold
from diptych.router.metrics import RouterMetrics
from diptych.router.replies import error_event
from diptych.router.retry import MAX_DEATHS, GivenUp, RetryBudget, backoff_s

log = logging.getLogger(__name__)


class Core:
    """Independent of sockets: `upstream` is the way to the servers, time is the loop's, randomness is `rng`'s."""

    def __init__(
        self, config: RouterConfig, fleet: Fleet, upstream: Upstream, rng: random.Random, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._upstream = upstream
        self._rng = rng
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._budget = RetryBudget(self._loop.time())
        self.gate = Gate(config)
        self.hold = Hold(config)

    async def serve(self, request: ClientRequest, client: Client, extra: Headers) -> None:
        """Answer `client`. `extra`: headers for servers and client. Raises DiptychError, mostly before any answer."""
        limit_s = self._config.request_timeout_secs
        try:
            async with asyncio.timeout(limit_s):
                await self.gate.enter()
                try:
                    await self._serve(request, client, extra)
                finally:
                    self.gate.leave()
        except TimeoutError:
            late = DeadlineExceeded(f"the request took longer than {limit_s:g} s")
            if not client.started:
                raise late from None
            client.write(error_event(late))
            client.finish()

    async def _serve(self, request: ClientRequest, client: Client, extra: Headers) -> None:
        ask = read_body(request.body, request.route)
        self._budget.earn()
        arrived_at = self._loop.time()
        headers = to_server(request.headers, self._config.key, extra)
        avoid: set[Server] = set()
        deaths: set[tuple[Server, int]] = set()  # servers that died while they had it, each in one of its lives
        for retry in itertools.count():
            attempt, body = await self._prepare(request, ask, avoid, extra)
            failure = await attempt.run(request.method, request.path, headers, body, client)
            if failure is None:
                self._metrics.broken_streams += attempt.broken is not None
                self._metrics.fallbacks += attempt.alone and self._config.disaggregated
                self._metrics.served(request.route, arrived_at, attempt.first_at, self._loop.time())
                return
            died = next((b.leg.server for b in failure.blames if b.died and not b.leg.server.draining), None)
            if died is not None:  # of a pair that went at once, as with their machine, one counts
                deaths.add((died, died.num_lives))
            self._note(attempt, failure, avoid)
            if len(deaths) == MAX_DEATHS:
                self._metrics.given_up += 1
                raise GivenUp(f"{MAX_DEATHS} servers died while they had this request; it is sent to no other")
            if not self._may_retry(failure, retry):
                client.send(failure.reply.status, to_client(failure.reply.headers, extra), failure.reply.data)
                return
            self._metrics.retries += 1
            if retry > 0 or not failure.lost:  # the first time a lost server is left without delay
                await asyncio.sleep(backoff_s(self._config, retry, self._rng))

    async def _prepare(
        self, request: ClientRequest, ask: Ask, avoid: set[Server], extra: Headers
    ) -> tuple[Attempt, Body]:
        """Choose who serves, and where they meet; hold the request while there is nobody."""
        deadline = self._loop.time() + self.hold.timeout_s
        while True:
            news = self._fleet.news
            try:
                return self._choose(request, ask, avoid, extra)
            except NoServer as error:
                await self.hold.wait(news, deadline, error)

    def _choose(self, request: ClientRequest, ask: Ask, avoid: set[Server], extra: Headers) -> tuple[Attempt, Body]:
        now, size = self._loop.time(), len(request.body)
        if not self._config.disaggregated:
            prefill, decode = None, Leg(self._fleet.choose("worker", ask.key, avoid), size, now)
            body: Body = (request.body,)
        elif self._fleet.falls_back and not self._config.disable_prefill_fallback:
            prefill, decode = None, Leg(self._fleet.choose("decode", ask.key, avoid, alone=True), size, now)
            body = without_rooms(ask)
        else:
            chosen = self._fleet.choose("prefill", ask.key, avoid)
            decode = Leg(self._fleet.choose("decode", ask.key, avoid), size, now)
            prefill, body = Leg(chosen, size, now), add_rooms(ask, chosen.address, self._rng)
        limit = self._config.max_payload_size
        return Attempt(self._upstream, ask, prefill, decode, max_bytes=limit, headers=extra), body

    def _note(self, attempt: Attempt, failure: Failure, avoid: set[Server]) -> None:
        """Remember who failed, for this request and for others."""
        if not failure.blames:
            log.info("the hand-over of a pair failed with status %d", failure.reply.status)
            avoid.update(leg.server for leg in attempt.legs)
        for blame in failure.blames:
            server, lost = blame.leg.server, blame.lost
            avoid.add(server)
            if failure.retryable:
                why = lost.message if lost is not None else f"it answered {blame.reply.status}"
                log.info("%s server %s failed: %s", server.role, server.address.url, why)
            if lost is not None:
                self._fleet.suspect(server, gone=lost.gone)
            elif blame.leaving:
                self._fleet.leave(server)

    def _may_retry(self, failure: Failure, retry: int) -> bool:
        """The requests of a server that is lost or leaving may all move, as it goes once; other failures share the
        budget.
        """
        if not failure.retryable or self._config.disable_retries:
            return False
        if retry >= self._config.retry_max_retries:
            self._metrics.retries_exhausted += 1
            return False
        if failure.moves or self._budget.spend(self._loop.time()):
            return True
        self._metrics.retries_over_budget += 1
        return False
