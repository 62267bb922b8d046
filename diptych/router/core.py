"""Serves one inference request: picks servers, and tries again elsewhere while nothing has reached the client."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from functools import partial

from diptych.errors import DeadlineExceeded
from diptych.router.attempt import Attempt, Failure
from diptych.router.body import Ask, add_rooms, read_body, without_rooms
from diptych.router.config import RouterConfig
from diptych.router.exchange import Body, Client, ClientRequest, Headers, Upstream
from diptych.router.fleet import Fleet, Leg, NoServer, Server
from diptych.router.headers import to_client, to_server
from diptych.router.limits import Gate, Hold, Line, Turn
from diptych.router.metrics import RouterMetrics
from diptych.router.replies import error_event, with_retry_after
from diptych.router.retry import GivenUp, RetryBudget, Suspect, backoff_s

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
        self.alone = Line()  # those that may be deadly

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
        job = _Job(request, read_body(request.body, request.route), extra, Turn(self.alone))
        self._budget.earn()
        arrived_at = self._loop.time()
        headers = to_server(request.headers, self._config.key, extra)
        for retry in itertools.count():
            try:
                attempt, body = await self._prepare(job)
                failure = await attempt.run(request.method, request.path, headers, body, client)
            finally:
                job.turn.leave()
            if failure is None:
                self._metrics.broken_streams += attempt.broken is not None
                self._metrics.fallbacks += attempt.alone and self._config.disaggregated
                self._metrics.served(request.route, arrived_at, attempt.first_at, self._loop.time())
                return
            self._note(job, attempt, failure)
            if job.suspect.is_guilty:
                self._metrics.given_up += 1
                count = job.suspect.num_deaths
                raise GivenUp(f"{count} servers died while they had this request; it is sent to no other")
            if not self._may_retry(failure, retry):
                status, told = failure.reply.status, to_client(failure.reply.headers, extra)
                client.send(status, with_retry_after(status, told), failure.reply.data)
                return
            self._metrics.retries += 1
            if retry > 0 or not failure.lost:  # the first time a lost server is left without delay
                await asyncio.sleep(backoff_s(self._config, retry, self._rng))

    async def _prepare(self, job: _Job) -> tuple[Attempt, Body]:
        """Choose who serves, and where they meet; hold the request while there is nobody. One that goes alone has its
        turn then.
        """
        deadline = self._loop.time() + self.hold.timeout_s
        while True:
            if job.suspect.goes_alone:
                came_at = self._loop.time()
                await job.turn.take()
                deadline += self._loop.time() - came_at  # there were servers meanwhile
            news = self._fleet.news
            try:
                return self._choose(job)
            except NoServer as error:
                job.turn.leave()
                await self.hold.wait(news, deadline, len(job.request.body) + len(job.ask.key), error)

    def _choose(self, job: _Job) -> tuple[Attempt, Body]:
        ask, avoid = job.ask, (job.suspect.goes_alone and self._under_suspicion()) or job.avoid
        leg = partial(Leg, prompt_bytes=len(job.request.body), now=self._loop.time(), suspect=job.suspect)
        if not self._config.disaggregated:
            prefill, decode = None, leg(self._fleet.choose("worker", ask.key, avoid))
            body: Body = (job.request.body,)
        elif self._fleet.falls_back and not self._config.disable_prefill_fallback:
            prefill, decode = None, leg(self._fleet.choose("decode", ask.key, avoid, alone=True))
            body = without_rooms(ask)
        else:
            chosen = self._fleet.choose("prefill", ask.key, avoid)
            decode = leg(self._fleet.choose("decode", ask.key, avoid))
            prefill, body = leg(chosen), add_rooms(ask, chosen.address, self._rng)
        limit, begun, fresh = self._config.max_payload_size, job.turn.leave, bool(job.avoid)
        return Attempt(
            self._upstream, ask, prefill, decode, max_bytes=limit, headers=job.extra, begun=begun, fresh=fresh
        ), body

    def _under_suspicion(self) -> set[Server]:
        """Servers that still have a request whose turn is over: of the death of such a one two would be suspected."""
        return {server for server in self._fleet.servers if any(leg.suspect.goes_alone for leg in server.legs)}

    def _note(self, job: _Job, attempt: Attempt, failure: Failure) -> None:
        """Remember who failed, for this request and for others."""
        died = next((blame.leg.server for blame in failure.blames if blame.died), None)
        if died is not None:  # of a pair that went at once, as with their machine, one counts
            job.suspect.had((died, died.num_lives), [leg.suspect for leg in died.legs])
        if not failure.blames:
            log.info("the hand-over of a pair failed with status %d", failure.reply.status)
            job.avoid.update(leg.server for leg in attempt.legs)
        for blame in failure.blames:
            server, lost = blame.leg.server, blame.lost
            job.avoid.add(server)
            if failure.retryable:
                why = lost.message if lost is not None else f"it answered {blame.reply.status}"
                log.info("%s server %s failed: %s", server.role, server.address.url, why)
            if lost is not None:
                self._fleet.suspect(server, gone=lost.gone)
            elif blame.leaving:
                self._fleet.leave(server, in_order=blame.draining)

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


class _Job:
    """A request on its way to an answer."""

    def __init__(self, request: ClientRequest, ask: Ask, extra: Headers, turn: Turn) -> None:
        self.request = request
        self.ask = ask
        self.extra = extra
        self.turn = turn  # to be tried alone
        self.suspect = Suspect()
        self.avoid: set[Server] = set()  # servers that have failed
